"""Documents packed into sequences: what one computes does not depend on the others."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from vllm_effplugin.preparation import packed
from vllm_effplugin.preparation.base import load_model, load_tokenizer
from vllm_effplugin.preparation.decoder import Decoder
from vllm_effplugin.preparation.text import TextShape, from_file

DOCUMENTS = ["A short one.", "Another, somewhat longer document.", "Third.", "And the last one."]


PACKED = torch.randint(3, 256, (2, 24), generator=torch.Generator().manual_seed(0))


def packed_starts() -> torch.Tensor:
    """Where the documents of `PACKED` start."""
    starts = torch.zeros(2, 24, dtype=torch.bool)
    starts[0, [0, 5, 17]] = True
    starts[1, 9] = True  # what comes before is the end of a document
    return starts


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_packed_documents_are_those_alone(tiny, family):
    decoder = Decoder(load_model(tiny(family)))
    tokens, starts = PACKED, packed_starts()

    def states(ids, begins=None):
        hidden, context = decoder.embed(ids, begins)
        return decoder.run_layers(range(12), hidden, context)

    packed = states(tokens, starts)
    for row, edges in ((0, [0, 5, 17, 24]), (1, [0, 9, 24])):
        for first, last in itertools.pairwise(edges):
            alone = states(tokens[row : row + 1, first:last])
            torch.testing.assert_close(packed[row, first:last], alone[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(packed, states(tokens), atol=1e-3)


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_blocks_of_xformers_are_the_mask(tiny, family, monkeypatch):
    """Its kernels need a GPU: here PyTorch computes what they are asked for."""
    asked: list[list[int]] = []

    def memory_efficient_attention(query, key, value, attn_bias, p, scale):
        assert query.shape == key.shape == value.shape
        asked.append(attn_bias)
        document = torch.arange(len(attn_bias)).repeat_interleave(torch.tensor(attn_bias))
        same = document[:, None] == document[None]
        mask = same & torch.ones_like(same).tril()
        heads = (states.transpose(1, 2) for states in (query, key, value))
        output = scaled_dot_product_attention(*heads, attn_mask=mask, dropout_p=p, scale=scale)
        return output.transpose(1, 2)

    ops = ModuleType("xformers.ops")
    ops.memory_efficient_attention = memory_efficient_attention
    bias = ModuleType("xformers.ops.fmha.attn_bias")
    bias.BlockDiagonalCausalMask = SimpleNamespace(from_seqlens=lambda lengths: lengths)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    monkeypatch.setitem(sys.modules, "xformers.ops.fmha.attn_bias", bias)
    decoder = Decoder(load_model(tiny(family)))
    for starts in (packed_starts(), None):
        hidden, context = decoder.embed(PACKED, starts)
        expected = decoder.run_layers(range(12), hidden, context)
        with monkeypatch.context() as here:
            here.setattr(packed, "available", lambda config: True)
            with decoder.fastest_attention():
                hidden, context = decoder.embed(PACKED, starts)
                found = decoder.run_layers(range(12), hidden, context)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert asked == [[5, 12, 7, 9, 15]] * 12 + [[24, 24]] * 12


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a CUDA device")
def test_xformers_computes_the_same(tiny):
    """Under autocast, as in training; in fp32 PyTorch's attention stays."""
    pytest.importorskip("xformers")
    if not packed._has_kernels():
        pytest.skip("xformers is there for another PyTorch")
    decoder = Decoder(load_model(tiny()).cuda())
    ids, starts = PACKED.cuda(), packed_starts().cuda()

    def states():
        hidden, context = decoder.embed(ids, starts)
        return decoder.run_layers(range(12), hidden, context)

    exact = states()
    with torch.autocast("cuda", torch.bfloat16):
        expected = states()
        with decoder.fastest_attention():
            assert decoder.model.config._attn_implementation == packed.XFORMERS
            found = states()
    rounding = torch.linalg.vector_norm(expected - exact)
    assert torch.linalg.vector_norm(found - exact) <= 1.5 * rounding
    with decoder.fastest_attention():
        assert decoder.model.config._attn_implementation != packed.XFORMERS


def test_sliding_windows_are_left_to_pytorch(tiny, monkeypatch):
    """Where xformers would run what has none."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(packed, "_has_kernels", lambda: True)
    config = load_model(tiny()).config
    assert packed.available(config)
    config.sliding_window = 8
    assert not packed.available(config)


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
