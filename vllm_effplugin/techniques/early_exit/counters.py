"""What exits did: running totals of one worker, readable from another process of the machine."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np

FIELDS = {
    "decoded": "decoded tokens that might have left",
    "left": "tokens that left the batch",
    "recomputed": "waiting tokens taken along, once per exit that they pass",
    "layer_tokens": "layers run times tokens, prompts included",
    "full_layer_tokens": "what that would have been without exits",
    "pending": "tokens that wait for their skipped layers now",
    "shadowed": "tokens that left at an exit and ran all layers for comparison",
    "shadow_agreed": "of these, those whose exit said what the full model says",
}
"""Name -> meaning. All but `pending` only grow. Behind them, per exit: tokens whose gate fired."""

_PLACES = {name: place for place, name in enumerate(FIELDS)}


class Counters:
    """The totals.

    Args:
        exits: number of exits.
        values: where to keep them; in this process by default.
    """

    def __init__(self, exits: int, values: np.ndarray | None = None) -> None:
        self._values = np.zeros(len(FIELDS) + exits, dtype=np.int64) if values is None else values

    def add(self, name: str, count: int) -> None:
        """Add to one of `FIELDS`."""
        self._values[_PLACES[name]] += count

    def set(self, name: str, count: int) -> None:
        """Set one of `FIELDS` that is not a total."""
        self._values[_PLACES[name]] = count

    def add_exits(self, exit: int, count: int) -> None:
        """Tokens whose gate fired at an exit."""
        self._values[len(FIELDS) + exit] += count

    def __getitem__(self, name: str) -> int:
        return int(self._values[_PLACES[name]])

    @property
    def exits(self) -> list[int]:
        """Tokens whose gate fired, per exit."""
        return [int(value) for value in self._values[len(FIELDS) :]]

    def as_dict(self) -> dict[str, int | list[int]]:
        """All of them."""
        return {**{name: self[name] for name in FIELDS}, "exits": self.exits}


def counters_path(instance: str, replica: int) -> Path:
    """Where the worker of an engine keeps its totals.

    Args:
        instance: the `instance_id` of the server's configuration.
        replica: the engine's data-parallel index, 0 where there is one engine.
    """
    name = f"vllm-effplugin-{os.getuid()}-{instance}-{replica}.counters"
    return Path(tempfile.gettempdir()) / name


def publish(path: Path, exits: int) -> Counters:
    """New totals that other processes of this user can read at `path`, until this one ends."""
    path.unlink(missing_ok=True)
    size = (len(FIELDS) + exits) * np.dtype(np.int64).itemsize
    # Exclusive: nobody else may have put a link where the file is going to be.
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.ftruncate(handle, size)
    os.close(handle)
    # A plain view: every access to a `memmap` itself takes a detour through Python.
    return Counters(exits, np.memmap(path, dtype=np.int64, mode="r+").view(np.ndarray))


def read(path: Path, exits: int) -> Counters:
    """The totals that another process publishes.

    Raises:
        OSError: when there are none.
        ValueError: when they are of another number of exits.
    """
    values = np.memmap(path, dtype=np.int64, mode="r")
    if len(values) != len(FIELDS) + exits:
        raise ValueError(f"{path} does not hold the totals of {exits} exits")
    return Counters(exits, values)
