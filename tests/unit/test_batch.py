"""Layers that run on another batch than the step's."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from vllm.forward_context import get_forward_context, override_forward_context

from vllm_effplugin.engine.batch import _STEP, OtherBatch, Step, running_on


@dataclass
class Context:
    """As much of vLLM's forward context as is replaced."""

    attn_metadata: dict[str, Any]
    slot_mapping: dict[str, Any]
    skip_compiled: bool = False


class Builder:
    """Counts what it builds."""

    def __init__(self, heads: int) -> None:
        self.heads = heads
        self.built: list[Any] = []

    def build(self, prefix: int, common: Any, fast_build: bool) -> tuple[int, Any]:
        assert (prefix, fast_build) == (0, True)
        self.built.append(common)
        return self.heads, common


def test_each_layer_has_the_metadata_of_its_own_builder() -> None:
    """Groups of layers have more heads than single ones; what all share is built once."""
    single, wide = Builder(4), Builder(8)
    names: dict[str, Any] = {"layers.0": single, "layers.1": wide, "layers.3": single}
    step = {
        name: SimpleNamespace(**{_STEP: Step(SimpleNamespace(), builder)})  # type: ignore[arg-type]
        for name, builder in names.items()
    }
    common: Any = object()
    other, slots = OtherBatch(common), torch.arange(3)
    with override_forward_context(Context(step, {})):  # type: ignore[arg-type]
        for _ in range(2):
            with running_on(other, slots, skip_compiled=True):
                context: Any = get_forward_context()
                assert {name: heads for name, (heads, _) in context.attn_metadata.items()} == {
                    "layers.0": 4,
                    "layers.1": 8,
                    "layers.3": 4,
                }
                assert all(context.slot_mapping[name] is slots for name in names)
                assert context.skip_compiled
        assert get_forward_context().attn_metadata is step
    assert single.built == wide.built == [common]
