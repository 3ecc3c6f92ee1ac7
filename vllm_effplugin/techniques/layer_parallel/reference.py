"""CQIL in plain PyTorch, on a Hugging Face decoder: the contract that the engine is held to.

Also the model that the search scores and that distillation trains.

Shapes: `B` sequences, `S` positions, `d` hidden size, `V` vocabulary, `p` layers per group.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vllm_effplugin.config import EfficiencyConfig
from vllm_effplugin.plan import Unit, build_plan
from vllm_effplugin.preparation.decoder import Decoder
from vllm_effplugin.techniques.layer_parallel.config import LayerParallelConfig


class ReferenceDecoder(Decoder):
    """Runs a plan's units on the layers of a Hugging Face causal language model."""

    def run(
        self,
        units: Sequence[Unit],
        hidden: Tensor,
        context: dict[str, Any],
        config: LayerParallelConfig | None = None,
    ) -> Tensor:
        """Run `units` in order on `[B, S, d]` hidden states."""
        for unit in units:
            hidden = (
                self._group(unit, hidden, context, config)
                if unit.is_group
                else self.run_layers(unit.layers, hidden, context)
            )
        return hidden

    def __call__(
        self,
        input_ids: Tensor,
        units: Sequence[Unit],
        config: LayerParallelConfig | None = None,
    ) -> Tensor:
        """Logits `[B, S, V]` of `[B, S]` token ids under the plan's units."""
        hidden, context = self.embed(input_ids)
        return self.logits(self.run(units, hidden, context, config))

    def _group(
        self, unit: Unit, x: Tensor, context: dict[str, Any], config: LayerParallelConfig | None
    ) -> Tensor:
        if config is None:
            raise ValueError(f"no schedule given for the group {list(unit.layers)}")
        attention = [self.attention_delta(index, x, context) for index in unit.layers]
        output, inputs = group_states(x, attention, config)
        for index, u in zip(unit.layers, inputs, strict=True):
            output = output + self.mlp_delta(index, u)
        return output


class GroupedDecoder(ReferenceDecoder):
    """The same for those who ask for layers: groups run at once.

    Args:
        block: the checkpoint's `efficiency` block.
    """

    def __init__(self, model: PreTrainedModel, block: Mapping[str, Any]) -> None:
        super().__init__(model)
        config = EfficiencyConfig.model_validate(block)
        self._parallel = config.layer_parallel
        self._unit_of = build_plan(config, len(self.layers)).unit_of

    def run_layers(self, indices: Iterable[int], hidden: Tensor, context: dict[str, Any]) -> Tensor:
        """Run layers in order; of a group, all of them, where its first one is."""
        for index in indices:
            unit = self._unit_of[index]
            if not unit.is_group:
                hidden = super().run_layers((index,), hidden, context)
            elif index == unit.first:
                hidden = self._group(unit, hidden, context, self._parallel)
        return hidden


def group_states(
    x: Tensor, attention: Sequence[Tensor], config: LayerParallelConfig
) -> tuple[Tensor, list[Tensor]]:
    """What the schedule makes of a group's input and its members' attention deltas.

    Returns:
        the group's output without its MLP deltas, and the input `u_j` of each member's MLP.
    """
    carried = x + sum(attention)
    if config.schedule == "fused":
        return carried, [carried] * len(attention)
    inputs = []
    for j, delta in enumerate(attention):
        bypass = sum(attention[max(0, j - config.bypass) : j], torch.zeros_like(x))
        inputs.append(x + delta + bypass)
        if config.double_count_bypass:
            carried = carried + bypass
    return carried, inputs
