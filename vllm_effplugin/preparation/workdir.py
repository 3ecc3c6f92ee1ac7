"""The work directory of one `prepare`: finished stages, kept until the checkpoint is written.

fingerprint.json     the arguments that everything else here belongs to
NAME.safetensors     a stage's tensors
NAME.json            a stage's result
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from vllm_effplugin.errors import CheckpointError

logger = logging.getLogger(__name__)

Result = TypeVar("Result", bound=BaseModel)


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

    def tensors(self, stage: str) -> dict[str, Tensor] | None:
        """A stage's tensors, if it was finished."""
        path = self.folder / f"{stage}.safetensors"
        return load_file(path) if path.exists() else None

    def save_tensors(self, stage: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep a stage's tensors.

        Raises:
            CheckpointError: when the folder cannot be written.
        """
        self.make()
        path = self.folder / f"{stage}.safetensors"
        temporary = path.with_name(path.name + ".tmp")
        save_file(dict(tensors), temporary)
        os.replace(temporary, path)

    def result(self, stage: str, kind: type[Result]) -> Result | None:
        """A stage's result, if it was finished."""
        path = self.folder / f"{stage}.json"
        return kind.model_validate_json(path.read_text()) if path.exists() else None

    def save_result(self, stage: str, result: BaseModel) -> None:
        """Keep a stage's result.

        Raises:
            CheckpointError: when the folder cannot be written.
        """
        self.make()
        _write_text(self.folder / f"{stage}.json", result.model_dump_json(indent=2))

    def remove(self) -> None:
        """Delete everything: the checkpoint is written."""
        shutil.rmtree(self.folder)

    def make(self) -> None:
        """Create the folder, for a stage that keeps files of its own in it.

        Raises:
            CheckpointError: when it cannot be written.
        """
        if self._mark.is_file():
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_text(self._mark, self._fingerprint)
        except OSError as error:
            raise CheckpointError(f"the work directory cannot be written: {error}") from None


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
