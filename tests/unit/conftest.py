"""What tests of preparation share."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.tiny import LAYERS, add_tokenizer, make_checkpoint
from vllm_effplugin.config import parse_efficiency
from vllm_effplugin.config.checkpoint import (
    base_tensors,
    replaced_tensor_names,
    write_checkpoint,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with a tokenizer of one token per character."""
    folder = make_checkpoint(tmp_path_factory.mktemp("prepare") / "model")
    add_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """640 characters."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(chr(33 + i * i % 90) for i in range(16 * 40)))
    return path


@pytest.fixture(scope="module")
def grouped(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with groups of layers, whose weights were changed for it."""
    efficiency = parse_efficiency(
        {"layer_parallel": {"groups": [[1, 2], [4, 5], [8, 9, 10]], "bypass": 1, "trained": True}}
    )
    names = replaced_tensor_names(efficiency, LAYERS, base_tensors(model))
    weights = load_file(model / "model.safetensors")
    folder = tmp_path_factory.mktemp("grouped") / "model"
    changed = {name: 0.9 * weights[name] for name in names}
    write_checkpoint(model, folder, efficiency, tensors=changed, provenance={})
    return folder
