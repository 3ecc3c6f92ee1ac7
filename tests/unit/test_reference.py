"""The reference decoder against Hugging Face's own forward and against the written equations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny import FAMILIES, LAYERS, VOCAB
from vllm_effplugin.plan import Unit
from vllm_effplugin.preparation.base import load_model
from vllm_effplugin.techniques.layer_parallel.config import LayerParallelConfig
from vllm_effplugin.techniques.layer_parallel.reference import ReferenceDecoder
from vllm_effplugin.techniques.layer_parallel.search import partition_units

Tiny = Callable[..., Path]

TOKENS = torch.randint(0, VOCAB, (2, 17), generator=torch.Generator().manual_seed(1))
SCHEDULES = [
    *((p, {"bypass": d}) for p in (2, 3, 4) for d in range(p)),
    *((p, {"bypass": d, "double_count_bypass": True}) for p in (2, 3, 4) for d in range(1, p)),
    *((p, {"schedule": "fused"}) for p in (2, 3, 4)),
]


def attention(layer: Any, x: Tensor) -> Tensor:
    """`A(x)` with softmax, causal mask and rotary embedding (half rotation) written out."""
    attn = layer.self_attn
    x = layer.input_layernorm(x)
    batch, length, _ = x.shape
    head = attn.head_dim
    q, k, v = (
        projection(x).view(batch, length, -1, head)
        for projection in (attn.q_proj, attn.k_proj, attn.v_proj)
    )
    if hasattr(attn, "q_norm"):
        q, k = attn.q_norm(q), attn.k_norm(k)
    inverse = 10000.0 ** -(torch.arange(0, head, 2) / head)
    angle = torch.outer(torch.arange(length), inverse)[:, None]

    def rotate(value: Tensor) -> Tensor:
        a, b = value.chunk(2, -1)
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)

    repeat = q.shape[2] // k.shape[2]
    k, v = (value.repeat_interleave(repeat, 2) for value in (rotate(k), v))
    scores = torch.einsum("bqhe,bkhe->bhqk", rotate(q), k) / head**0.5
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
    mixed = torch.einsum("bhqk,bkhe->bqhe", scores.softmax(-1), v)
    return attn.o_proj(mixed.flatten(2))


def mlp(layer: Any, u: Tensor) -> Tensor:
    """`M(u)`."""
    n, m = layer.post_attention_layernorm(u), layer.mlp
    return m.down_proj(torch.nn.functional.silu(m.gate_proj(n)) * m.up_proj(n))


def group_output(layers: list[Any], x: Tensor, schedule: dict[str, Any]) -> Tensor:
    """The equations of methods.md, section 1, member by member."""
    a = [attention(layer, x) for layer in layers]
    y = x.clone()
    for j, layer in enumerate(layers):
        if schedule.get("schedule") == "fused":
            y += a[j] + mlp(layer, x + sum(a))
            continue
        b = torch.zeros_like(x)
        for i in range(1, min(schedule["bypass"], j) + 1):
            b += a[j - i]
        y += a[j] + mlp(layer, x + a[j] + b)
        if schedule.get("double_count_bypass"):
            y += b
    return y


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_trivial_plan_is_the_stock_model(tiny: Tiny, family: str) -> None:
    model = load_model(tiny(family))
    ours = ReferenceDecoder(model)(TOKENS, partition_units((), LAYERS))
    torch.testing.assert_close(ours, model(TOKENS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("p", "schedule"), SCHEDULES)
@torch.no_grad()
def test_group_follows_the_equations(
    tiny: Tiny, family: str, p: int, schedule: dict[str, Any]
) -> None:
    decoder = ReferenceDecoder(load_model(tiny(family)))
    layers = tuple(range(3, 3 + p))
    x, context = decoder.embed(TOKENS)
    ours = decoder.run(
        (Unit(layers),), x, context, LayerParallelConfig(groups=(layers,), **schedule)
    )
    theirs = group_output([decoder.layers[i] for i in layers], x, schedule)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_schedules_differ(tiny: Tiny) -> None:
    """Guards the test above: on these weights each schedule gives another output."""
    decoder = ReferenceDecoder(load_model(tiny()))
    layers = [decoder.layers[i] for i in (3, 4, 5)]
    x, _ = decoder.embed(TOKENS)
    outputs = [group_output(layers, x, schedule) for p, schedule in SCHEDULES if p == 3]
    for i, first in enumerate(outputs):
        for second in outputs[:i]:
            assert (first - second).abs().max() > 1e-3


def test_a_group_needs_a_schedule(tiny: Tiny) -> None:
    decoder = ReferenceDecoder(load_model(tiny()))
    with pytest.raises(ValueError, match=r"no schedule given for the group \[3, 4\]"):
        decoder(TOKENS, partition_units(((3, 4),), LAYERS))
