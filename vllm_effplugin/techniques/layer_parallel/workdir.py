"""The work directory of one `prepare`: finished stages, kept until the checkpoint is written.

fingerprint.json     the arguments that everything else here belongs to
text.safetensors     calibration and held-out token ids
search.json          the search's result
repair.safetensors   grouped layers after the least-squares repair
train.json           training state, see `distill`
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from vllm_effplugin.errors import CheckpointError
from vllm_effplugin.techniques.layer_parallel.calibration import Calibration
from vllm_effplugin.techniques.layer_parallel.search import SearchResult

logger = logging.getLogger(__name__)


class WorkDirectory:
    """The folder of a run: found and kept, found and emptied, or made with the first stage.

    Args:
        folder: it may be missing, empty, or the work directory of an earlier run.
        fingerprint: all that the stages depend on; state of another fingerprint is discarded.

    Raises:
        CheckpointError: when the folder holds anything else.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any]) -> None:
        self.folder = folder
        self._fingerprint = json.dumps(fingerprint, indent=2, sort_keys=True)
        self._mark = folder / "fingerprint.json"
        if folder.exists() and not folder.is_dir():
            raise CheckpointError(f"the work directory {folder} is not a directory")
        if not folder.is_dir() or not any(folder.iterdir()):
            return
        if not self._mark.is_file():
            raise CheckpointError(f"{folder} holds other files; give another --work-dir")
        if self._mark.read_text(encoding="utf-8") == self._fingerprint:
            logger.warning("resuming from %s", folder)
            return
        logger.warning("the arguments differ from those of %s: starting over", folder)
        shutil.rmtree(folder)

    def load_text(self) -> Calibration | None:
        """The text, if that stage was finished."""
        path = self.folder / "text.safetensors"
        return Calibration(**load_file(path)) if path.exists() else None

    def save_text(self, text: Calibration) -> None:
        """Keep the text, the first stage.

        Raises:
            CheckpointError: when the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_text(self._mark, self._fingerprint)
        except OSError as error:
            raise CheckpointError(f"the work directory cannot be written: {error}") from None
        _write_tensors(
            self.folder / "text.safetensors", {"train": text.train, "held_out": text.held_out}
        )

    def load_search(self) -> SearchResult | None:
        """The search's result, if that stage was finished."""
        path = self.folder / "search.json"
        return SearchResult.model_validate_json(path.read_text()) if path.exists() else None

    def save_search(self, result: SearchResult) -> None:
        """Keep the search's result."""
        _write_text(self.folder / "search.json", result.model_dump_json(indent=2))

    def load_repair(self) -> dict[str, Tensor] | None:
        """The repaired layers' tensors, if that stage was finished."""
        path = self.folder / "repair.safetensors"
        return load_file(path) if path.exists() else None

    def save_repair(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep the repaired layers' tensors."""
        _write_tensors(self.folder / "repair.safetensors", tensors)

    def remove(self) -> None:
        """Delete everything: the checkpoint is written."""
        shutil.rmtree(self.folder)


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    save_file(dict(tensors), temporary)
    os.replace(temporary, path)
