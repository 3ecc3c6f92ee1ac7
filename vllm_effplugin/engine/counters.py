"""What an engine did: running totals of one part of it, readable from another process."""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True)
class Layout:
    """Which totals there are.

    Attributes:
        fields: names of single numbers.
        lists: names and lengths of lists.
    """

    fields: Sequence[str]
    lists: Mapping[str, int]

    @property
    def size(self) -> int:
        """Numbers in all."""
        return len(self.fields) + sum(self.lists.values())

    def places(self) -> dict[str, slice]:
        """Where each name's numbers lie."""
        found, start = {}, 0
        for name, length in (*((name, 1) for name in self.fields), *self.lists.items()):
            found[name] = slice(start, start + length)
            start += length
        return found


class Counters:
    """The totals.

    Args:
        layout: which there are.
        values: where to keep them; in this process by default.
    """

    def __init__(self, layout: Layout, values: np.ndarray | None = None) -> None:
        self._layout = layout
        self._values = np.zeros(layout.size, dtype=np.int64) if values is None else values
        self._places = {name: place.start for name, place in layout.places().items()}

    def add(self, name: str, count: int, index: int = 0) -> None:
        """Add to a number, or to one of a list."""
        self._values[self._places[name] + index] += count

    def set(self, name: str, count: int) -> None:
        """Set a number that is not a total."""
        self._values[self._places[name]] = count

    def __getitem__(self, name: str) -> int:
        return int(self._values[self._places[name]])

    def numbers(self, name: str) -> list[int]:
        """All numbers of a list."""
        start = self._places[name]
        return [int(v) for v in self._values[start : start + self._layout.lists[name]]]

    def as_dict(self) -> dict[str, int | list[int]]:
        """All of them."""
        return {name: self[name] for name in self._layout.fields} | {
            name: self.numbers(name) for name in self._layout.lists
        }


def shared_by_api_servers() -> Path | None:
    """The folder through which several API servers show the same; None where there is one."""
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    return Path(folder) if folder else None


def counters_path(instance: str, replica: int, part: str = "worker") -> Path:
    """Where a part of an engine keeps its totals.

    Args:
        instance: the `instance_id` of the server's configuration.
        replica: the engine's data-parallel index, 0 where there is one engine.
        part: `worker`, `scheduler`, or `link` and `cloud` of a split model.
    """
    folder = shared_by_api_servers()
    if folder is not None:  # of one server, each of whose processes has another `instance`
        return folder / f"effplugin-{replica}-{part}.counters"
    name = f"{_mine()}{instance}-{replica}-{part}.counters"
    return Path(tempfile.gettempdir()) / name


def _mine() -> str:
    """What the names of this user's files begin with."""
    return f"vllm-effplugin-{os.getuid()}-"


def publish(path: Path, layout: Layout) -> Counters:
    """New totals that other processes of this user can read at `path`, until this one ends."""
    _remove_orphans(path.parent)
    path.unlink(missing_ok=True)
    # Exclusive: nobody else may have put a link where the file is going to be.
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "r+b") as file:
        # For as long as the map, which keeps the file open.
        fcntl.flock(handle, fcntl.LOCK_EX)
        os.ftruncate(handle, layout.size * np.dtype(np.int64).itemsize)
        values = np.memmap(file, dtype=np.int64, mode="r+")
    # A plain view: every access to a `memmap` itself takes a detour through Python.
    return Counters(layout, values.view(np.ndarray))


def _remove_orphans(folder: Path, age_s: float = 60.0) -> None:
    """Files of processes of this user that were killed."""
    for path in folder.glob(f"{_mine()}*.counters"):
        with suppress(OSError):
            # Anybody may put anything there; a pipe would have nobody at its other end.
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                found = os.fstat(handle)
                ours = stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid()
                # One that was just made may not be locked yet.
                if ours and time.time() - found.st_mtime > age_s:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
            finally:
                os.close(handle)


def publish_for(
    owner: object, vllm_config: VllmConfig, layout: Layout, part: str = "worker"
) -> Counters:
    """New totals of a part of an engine, which are gone when their owner is."""
    replica = vllm_config.parallel_config.data_parallel_index
    path = counters_path(vllm_config.instance_id, replica, part)
    weakref.finalize(owner, path.unlink, missing_ok=True)
    return publish(path, layout)


def read(path: Path, layout: Layout) -> Counters:
    """The totals that another process publishes.

    Raises:
        OSError: when there are none.
        ValueError: when they are others.
    """
    values = np.memmap(path, dtype=np.int64, mode="r")
    if len(values) != layout.size:
        raise ValueError(f"{path} does not hold the {layout.size} totals that were expected")
    return Counters(layout, values)
