"""Merging and taking apart: exact, and what the released code does instead."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_effplugin.techniques.multiplex.config import multiplexer_tensors
from vllm_effplugin.techniques.multiplex.layers import Multiplexer, mix, multiplexers, unmix

SIZES = (2, 3, 4, 8)


def multiplexer(size: int, hidden_size: int = 48, dtype: torch.dtype = torch.float64):
    torch.manual_seed(size)
    return Multiplexer(hidden_size, size).to(dtype).eval()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_taking_apart_inverts_merging(size: int, dtype: torch.dtype, tolerance: float) -> None:
    couplings = multiplexer(size, dtype=dtype).couplings
    z = list(torch.randn(size, 5, 48 // size, dtype=dtype))
    mixed = mix(couplings, z)
    assert all((a - b).abs().max() > 0.01 for a, b in zip(mixed, reversed(z), strict=True))
    for ours, theirs in zip(unmix(couplings, mixed), z, strict=True):
        assert torch.allclose(ours, theirs, atol=tolerance, rtol=tolerance)


@settings(max_examples=25, deadline=None)
@given(size=st.sampled_from(SIZES), rest=st.integers(0, 7), seed=st.integers(0, 2**16))
def test_the_composite_holds_all_slots(size: int, rest: int, seed: int) -> None:
    """Whatever the hidden size; what is left over is zero."""
    hidden_size = 5 * size + rest % size
    layer = multiplexer(size, hidden_size)
    generator = torch.Generator().manual_seed(seed)
    members = torch.randn(size, 3, hidden_size, generator=generator, dtype=torch.float64)
    composite = layer.merge(members, torch.ones(size, 3, dtype=torch.bool))
    assert composite.shape == (3, hidden_size)
    assert not composite[:, size * layer.width :].any()
    norms = members.square().mean(-1, keepdim=True).sqrt()
    slots = layer.split(composite / norms.mean(0))
    for slot, z in enumerate(slots):
        assert torch.allclose(z, layer.down(members[slot] / norms[slot]), atol=1e-6)


def test_slots_keep_their_order() -> None:
    """What one slot's head reads depends on its own member, when nothing lies between."""
    layer = multiplexer(3)
    members = torch.randn(3, 1, 48, dtype=torch.float64)
    present = torch.ones(3, 1, dtype=torch.bool)
    changed = members.clone()
    changed[1] += 1
    norms = [m.square().mean(-1, keepdim=True).sqrt().mean(0) for m in (members, changed)]
    before, after = (
        torch.stack(layer.split(layer.merge(each, present) / norm))
        for each, norm in zip((members, changed), norms, strict=True)
    )
    same = torch.isclose(before, after, atol=1e-9).all(-1).all(-1)
    assert same.tolist() == [True, False, True]


def test_a_member_that_has_ended_counts_no_more() -> None:
    """Neither does its place weigh on the composite's size."""
    layer = multiplexer(2)
    members = torch.randn(2, 1, 48, dtype=torch.float64) * 7
    members[1] = 0
    present = torch.tensor([[True], [False]])
    alone = layer.merge(members, present)
    both = layer.merge(members, torch.ones(2, 1, dtype=torch.bool))
    assert torch.allclose(alone, 2 * both)


def test_the_released_layout_is_no_inverse() -> None:
    torch.manual_seed(0)
    layer = Multiplexer(48, 2, "released").double().eval()
    members = torch.randn(2, 4, 48, dtype=torch.float64)
    norms = members.square().mean(-1, keepdim=True).sqrt()
    composite = layer.merge(members, torch.ones(2, 4, dtype=torch.bool)) / norms.mean(0)
    for slot, z in enumerate(layer.split(composite)):
        own = layer.down(members[slot] / norms[slot])
        assert (z - own).abs().max() > 0.1
    with pytest.raises(ValueError, match="two"):
        Multiplexer(48, 3, "released")


def test_plain_adapters_do_not_mix() -> None:
    layer = Multiplexer(48, 3, "none").double()
    z = torch.randn(3, 2, 16, dtype=torch.float64)
    assert torch.equal(torch.stack(layer.split(layer._joined(z.unbind(0)))), z)


def test_dropout_in_training_only() -> None:
    layer = multiplexer(2)
    members, present = torch.randn(2, 3, 48).double(), torch.ones(2, 3, dtype=torch.bool)
    assert torch.equal(layer.merge(members, present), layer.merge(members, present))
    layer.train()
    assert not torch.equal(layer.merge(members, present), layer.merge(members, present))


@pytest.mark.parametrize("size", SIZES)
def test_answers_are_each_members_own(size: int) -> None:
    layer = multiplexer(size)
    read = torch.randn(5, size, 48, dtype=torch.float64)
    answers = layer.answers(read)
    assert answers.shape == read.shape
    for slot in range(size):
        own = layer.lift(layer.split(read[2, slot])[slot])
        assert torch.allclose(answers[2, slot], own)


def test_parameters_are_those_of_a_checkpoint() -> None:
    for size in SIZES:
        shapes = {n: tuple(t.shape) for n, t in Multiplexer(50, size).state_dict().items()}
        assert shapes == multiplexer_tensors(50, size)
    assert set(multiplexers(48, (2, 4))) == {"2", "4"}


def test_a_fresh_one_hands_on_what_it_can() -> None:
    torch.manual_seed(0)
    layer = Multiplexer(48, 2).eval()
    layer.initialise()
    members = torch.randn(2, 200, 48)
    composite = layer.merge(members, torch.ones(2, 200, dtype=torch.bool))
    ratio = composite.square().mean().sqrt() / members.square().mean().sqrt()
    assert 0.8 < ratio.item() < 1.3
