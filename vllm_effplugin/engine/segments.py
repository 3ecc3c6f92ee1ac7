"""Segments: runs of units that are compiled together.

Run eagerly, segments compute bit for bit what the whole stack computes. Compiled in bf16 they
differ from it by rounding: within one graph Inductor carries sums in fp32, and a segment's end
rounds them to bf16.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig

from vllm_effplugin.plan import Plan, Unit


def run_units(
    units: Sequence[Unit],
    layers: nn.ModuleList,
    positions: Tensor,
    hidden: Tensor,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Run units in order. `hidden` and `residual` are vLLM's pair `[T, d]`; their sum is the
    hidden state. The pair is kept between units because adding it would change the rounding.
    """
    for unit in units:
        hidden, residual = layers[unit.first](positions, hidden, residual)
    return hidden, residual


class _Segment(nn.Module):
    def __init__(self, units: Sequence[Unit], layers: nn.ModuleList) -> None:
        super().__init__()
        self.units = tuple(units)
        # In a tuple, not as a submodule: the trunk owns the layers and their parameter names.
        self.owned = (layers,)


def _forward(
    self: Any, positions: Tensor, hidden: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    return run_units(self.units, self.owned[0], positions, hidden, residual)


def _segment_class(index: int) -> type[Any]:
    """A compiled class of its own for each segment.

    vLLM keys its ahead-of-time artifacts by `forward.__qualname__` and its line, and Dynamo its
    caches by the code object: two instances of one class would load each other's artifact.
    """
    name = f"Segment{index}"
    code = _forward.__code__.replace(co_name=name, co_qualname=f"{name}.forward")
    forward = FunctionType(code, _forward.__globals__, name)
    forward.__qualname__ = f"{name}.forward"
    forward.__annotations__ = dict(_forward.__annotations__)
    cls = type(name, (_Segment,), {"forward": forward, "__module__": __name__})
    return support_torch_compile(
        dynamic_arg_dims={"positions": {-1: "b"}, "hidden": {0: "b"}, "residual": {0: "b"}}
    )(cls)


def build_segments(
    plan: Plan, layers: nn.ModuleList, vllm_config: VllmConfig, prefix: str
) -> nn.ModuleList | None:
    """One compiled module per segment; None for a single segment, which the trunk runs itself."""
    if not plan.boundaries:
        return None
    segments = []
    for index, segment in enumerate(plan.segments):
        tag = f"{prefix}.segment{index}"
        with set_model_tag(tag):
            segment_class = _segment_class(index)
            # By name: the compile decorator checks positional arguments against annotations.
            segments.append(
                segment_class(
                    units=segment.units, layers=layers, vllm_config=vllm_config, prefix=tag
                )
            )
    return nn.ModuleList(segments)
