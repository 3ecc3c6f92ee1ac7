"""Documents packed into sequences: what one computes does not depend on the others."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from vllm_effplugin.preparation.base import load_model, load_tokenizer
from vllm_effplugin.preparation.decoder import Decoder
from vllm_effplugin.preparation.text import TextShape, from_file

DOCUMENTS = ["A short one.", "Another, somewhat longer document.", "Third.", "And the last one."]


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_packed_documents_are_those_alone(tiny, family):
    decoder = Decoder(load_model(tiny(family)))
    tokens = torch.randint(3, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    starts = torch.zeros(2, 24, dtype=torch.bool)
    starts[0, [0, 5, 17]] = True
    starts[1, 9] = True  # what comes before is the end of a document

    def states(ids, begins=None):
        hidden, context = decoder.embed(ids, begins)
        return decoder.run_layers(range(12), hidden, context)

    packed = states(tokens, starts)
    for row, edges in ((0, [0, 5, 17, 24]), (1, [0, 9, 24])):
        for first, last in itertools.pairwise(edges):
            alone = states(tokens[row : row + 1, first:last])
            torch.testing.assert_close(packed[row, first:last], alone[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(packed, states(tokens), atol=1e-3)


def test_a_file_says_where_its_documents_start(model: Path, tmp_path: Path) -> None:
    """One character is one token here."""
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in DOCUMENTS))
    shape = TextShape(sequence_length=8, train=100, held_out=2, at_least=2)
    found = from_file(path, load_tokenizer(model), shape, seed=0)
    whole = "".join(text + "\n\n" for text in DOCUMENTS)
    begins = {sum(len(text) + 2 for text in DOCUMENTS[:count]) for count in range(len(DOCUMENTS))}
    windows = torch.cat([found.train, found.held_out]).tolist()
    starts = torch.cat([found.train_starts, found.held_out_starts]).tolist()
    assert len(windows) == len(whole) // 8
    for window, marks in zip(windows, starts, strict=True):
        place = whole.index("".join(map(chr, window)))
        assert place % 8 == 0
        assert [place + i for i, mark in enumerate(marks) if mark] == [
            place + i for i in range(8) if place + i in begins
        ]


def test_plain_text_is_one_document(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(DOCUMENTS))
    shape = TextShape(sequence_length=8, train=100, held_out=2, at_least=2)
    found = from_file(path, load_tokenizer(model), shape, seed=0)
    assert int(found.train_starts.sum() + found.held_out_starts.sum()) == 1
