"""Segments: runs of units that are compiled together.

Run eagerly, segments compute bit for bit what the whole stack computes. Compiled in bf16 they
differ from it by rounding: within one graph Inductor carries sums in fp32, and a segment's end
rounds them to bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig

from vllm_effplugin.plan import Plan, Unit

Pair = tuple[Tensor, Tensor | None]
"""vLLM's hidden states and residual, `[T, d]`; their sum is the residual stream. The pair is kept
between units because adding it would change the rounding."""


def run_units(
    units: Sequence[Unit],
    layers: nn.ModuleList,
    positions: Tensor,
    hidden: Tensor,
    residual: Tensor | None,
) -> Pair:
    """Run units in order."""
    for unit in units:
        # By name: layers without attention take positions only so.
        hidden, residual = layers[unit.first](
            positions=positions, hidden_states=hidden, residual=residual
        )
    return hidden, residual


def _copies(hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    return hidden.clone(), residual.clone()


_LIBRARY = torch.library.Library("effplugin", "FRAGMENT")
for _name, _results, _function in (
    ("apart", "(Tensor, Tensor)", _copies),
    ("joined", "Tensor", torch.add),
):
    _LIBRARY.define(f"{_name}(Tensor hidden, Tensor residual) -> {_results}")
    _LIBRARY.impl(_name, _function, "CPU")
    torch.library.register_fake(f"effplugin::{_name}", _function, lib=_LIBRARY)


def apart(hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Copies, `[T, d]` each, for what branches off between two layers of one graph.

    Copies, because vLLM's kernels work in place. On a CPU Inductor must not see through them: it
    fuses what reads the same tensors, there forgets which custom operation filled a buffer, and
    then reads buffers before they are filled (`patches/inductor-mutation-renames.diff`).
    """
    if hidden.device.type == "cpu":
        return torch.ops.effplugin.apart(hidden, residual)
    return _copies(hidden, residual)


def joined(hidden: Tensor, residual: Tensor) -> Tensor:
    """Their sum, `[T, d]`, for what branches off and needs no more; apart for the same reason."""
    if hidden.device.type == "cpu":
        return torch.ops.effplugin.joined(hidden, residual)
    return hidden + residual


class _Part(nn.Module):
    """Some or all of a trunk's units, compiled as one graph.

    Args:
        trunk: owns the layers and their parameter names; not a submodule here.
        units: what to run.
        arguments: further constants of the forward function.
    """

    def __init__(self, trunk: nn.Module, units: Sequence[Unit], **arguments: Any) -> None:
        super().__init__()
        self.units = tuple(units)
        self.owned = (trunk,)
        for name, value in arguments.items():
            # In a tuple for the same reason as the trunk.
            setattr(self, name, (value,))


def segment(self: Any, positions: Tensor, hidden: Tensor, residual: Tensor | None) -> Pair:
    """Forward function of a part: its units."""
    return run_units(self.units, self.owned[0].layers, positions, hidden, residual)


def to_end(self: Any, positions: Tensor, hidden: Tensor, residual: Tensor | None) -> Tensor:
    """Forward function of a part: its units, which are the last, and the final norm."""
    trunk = self.owned[0]
    hidden, residual = run_units(self.units, trunk.layers, positions, hidden, residual)
    return trunk.norm(hidden, residual)[0]


def whole_stack(
    self: Any, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None
) -> Tensor:
    """Forward function of a part: embedding, all units, final norm."""
    trunk = self.owned[0]
    hidden = trunk.embed(input_ids, inputs_embeds)
    hidden, residual = run_units(self.units, trunk.layers, positions, hidden, None)
    return trunk.norm(hidden, residual)[0]


def compiled_part(
    forward: Callable[..., Any],
    name: str,
    trunk: nn.Module,
    units: Sequence[Unit],
    vllm_config: VllmConfig,
    prefix: str,
    **arguments: Any,
) -> nn.Module:
    """A module that runs `forward` on `units`, with a compiled class of its own.

    vLLM keys its ahead-of-time artifacts by `forward.__qualname__` and its line, and Dynamo its
    caches by the code object: two instances of one class would load each other's artifact.

    Args:
        forward: the forward function. Its tensors but `None` have the batch as first dimension.
    """
    code = forward.__code__.replace(co_name=name, co_qualname=f"{name}.forward")
    function = FunctionType(code, forward.__globals__, name, forward.__defaults__)
    function.__qualname__ = f"{name}.forward"
    function.__annotations__ = dict(forward.__annotations__)
    tensors = [
        argument for argument in function.__annotations__ if argument not in ("self", "return")
    ]
    cls = support_torch_compile(dynamic_arg_dims={argument: {0: "b"} for argument in tensors})(
        type(name, (_Part,), {"forward": function, "__module__": __name__})
    )
    tag = f"{prefix}.{name.lower()}"
    with set_model_tag(tag):
        # By name: the compile decorator checks positional arguments against annotations.
        return cls(trunk=trunk, units=units, vllm_config=vllm_config, prefix=tag, **arguments)


def build_segments(
    plan: Plan, trunk: nn.Module, vllm_config: VllmConfig, prefix: str
) -> nn.ModuleList | None:
    """One compiled module per segment; None for a single segment, which the trunk runs itself."""
    if not plan.boundaries:
        return None
    return nn.ModuleList(
        compiled_part(segment, f"Segment{index}", trunk, part.units, vllm_config, prefix)
        for index, part in enumerate(plan.segments)
    )
