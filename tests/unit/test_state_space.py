"""Mamba-2 in plain PyTorch against Transformers, and the chunked scan against the recurrence."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from tests.tiny import LAYERS, VOCAB
from vllm_effplugin.preparation import state_space
from vllm_effplugin.preparation.base import load_model
from vllm_effplugin.preparation.decoder import take_apart
from vllm_effplugin.preparation.mixer_shape import MixerShape
from vllm_effplugin.preparation.state_space import (
    StateSpaceDecoder,
    causal_conv,
    gated_norm,
    scan,
    split_mixed,
)
from vllm_effplugin.techniques.early_exit.gates import MambaGate
from vllm_effplugin.techniques.early_exit.state_reference import MixerTrace
from vllm_effplugin.techniques.early_exit.state_space_reference import StateSpaceSequence

LENGTH = 150  # more than two chunks, and not a multiple


def test_it_is_transformers_model(tmp_path):
    """Of one group: with more, Transformers norms all of them together, and vLLM does not."""
    from tests.tiny import make_checkpoint

    model = load_model(make_checkpoint(tmp_path, "Mamba2", n_groups=1))
    tokens = torch.randint(3, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    decoder = take_apart(model)
    assert isinstance(decoder, StateSpaceDecoder)
    hidden, context = decoder.embed(tokens)
    with torch.no_grad():
        ours = decoder.logits(decoder.run_layers(range(LAYERS), hidden, context))
        assert (ours - model(tokens).logits).abs().max() <= 1e-3


def test_it_is_the_recurrence(tiny):
    """Of several groups."""
    model = load_model(tiny("Mamba2"))
    tokens = torch.randint(3, VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    decoder = take_apart(model)
    config = SimpleNamespace(exits=(), cache="recompute")
    with torch.no_grad():
        hidden, context = decoder.embed(tokens)
        ours = decoder.logits(decoder.run_layers(range(LAYERS), hidden, context))
        theirs = StateSpaceSequence(model, config, []).run(tokens[0].tolist(), 0)
    assert (ours[0] - theirs).abs().max() <= 1e-3


@pytest.mark.parametrize("groups", [1, 2])
def test_documents_do_not_see_each_other(groups, monkeypatch):
    """A packed sequence is what its documents are apart."""
    monkeypatch.setattr(state_space, "CHUNK", 16)
    torch.manual_seed(0)
    shape = MixerShape(heads=4, head_size=8, groups=groups, state=6)
    mixed, dt = torch.randn(1, LENGTH, shape.channels), torch.rand(1, LENGTH, 4)
    weight, bias, a = torch.randn(shape.channels, 4), torch.randn(shape.channels), -torch.rand(4)
    starts = torch.zeros(1, LENGTH, dtype=torch.bool)
    edges = [0, 16, 17, 80, LENGTH]  # at a chunk's start, next to it, and inside one
    starts[0, edges[:-1]] = True

    def run(part: slice, begins: torch.Tensor | None) -> torch.Tensor:
        x, b, c = split_mixed(shape, causal_conv(mixed[:, part], weight, bias, begins))
        return scan(x, dt[:, part], a, b, c, begins)

    together = run(slice(None), starts)
    apart = [run(slice(*edge), None) for edge in itertools.pairwise(edges)]
    torch.testing.assert_close(together, torch.cat(apart, 1), atol=1e-3, rtol=1e-3)


def test_groups_are_normed_apart():
    y, gate, weight = torch.randn(3, 5, 8), torch.randn(3, 5, 8), torch.randn(8)
    product = y * torch.nn.functional.silu(gate)
    halves = [
        half * torch.rsqrt(half.square().mean(-1, keepdim=True) + 1e-5)
        for half in product.split(4, -1)
    ]
    found = gated_norm(y, gate, weight, 1e-5, groups=2)
    torch.testing.assert_close(found, torch.cat(halves, -1) * weight)


@torch.no_grad()
def test_a_gate_on_sequences_is_the_gate_token_by_token():
    torch.manual_seed(0)
    gate = MambaGate(hidden_size=24, width=32)
    for parameter in gate.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    hidden = torch.randn(1, LENGTH, 24)
    trace = MixerTrace(gate)
    said = []
    for position in range(LENGTH):
        gate.states = lambda *driven, position=position: trace.take(position, *driven)
        said.append(gate(hidden[0, position : position + 1]))
    torch.testing.assert_close(gate.of_sequences(hidden)[0], torch.cat(said), atol=1e-3, rtol=1e-3)
