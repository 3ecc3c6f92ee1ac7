"""What tests of preparation share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import add_tokenizer, make_checkpoint


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
