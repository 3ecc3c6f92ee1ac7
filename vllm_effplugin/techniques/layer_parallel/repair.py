"""Least-squares repair: grouped layers refitted to the original model, without a gradient.

Grouping changes what a layer reads: a member's attention sees the group's input instead of the
output of the layer before, and its MLP lacks a few terms. Much of the difference is linear in what
it does see, so linear regressions take it back, two per member and one per group:

1. `Norm1_j(x)` to the original's input of attention `j`, folded into the q, k and v projections;
2. `Norm2_j(u_j)` to the original's input of MLP `j`, folded into the gate and up projections;
3. the activations of all members to what the group's output still lacks, folded into the down
   projections.

Groups are repaired in order, each on the states that the repaired groups before it produce, so
that a later group also corrects what earlier ones left. A part of the text is kept from the
regressions; a group that they do not bring closer to the original there stays as it was.

Shapes: `M` sequences, `S` positions, `N` tokens, `B` sequences of a batch, `d` hidden size, `f`
features and `o` targets of a regression.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from tqdm.auto import tqdm

from vllm_effplugin.plan import Unit
from vllm_effplugin.preparation.precision import Precision, autocast
from vllm_effplugin.techniques.layer_parallel.config import LayerParallelConfig
from vllm_effplugin.techniques.layer_parallel.reference import ReferenceDecoder, group_states
from vllm_effplugin.techniques.layer_parallel.search import partition_units

logger = logging.getLogger(__name__)

BATCH = 8
"""Sequences that run through a layer at a time."""

HELD_OUT = 8
"""One sequence in so many is kept from the regressions."""


class RepairSettings(BaseModel):
    """How to repair."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: int = Field(32768, ge=1, description="Most tokens of the training text to fit on.")
    ridge: float = Field(
        0.1, gt=0, description="Regularisation, relative to the mean square of the features."
    )
    precision: Precision = Field(
        "fp32", description="Of the layers' products; the regressions are in fp32 and fp64."
    )


class LeastSquares:
    """Ridge regression `argmin_W |R - F W|^2 + ridge * N * mean(F^2) |W|^2`, fed in batches.

    Args:
        features: `f`.
        targets: `o`.
    """

    def __init__(self, features: int, targets: int, device: torch.device) -> None:
        self._gram = torch.zeros(features, features, device=device)
        self._cross = torch.zeros(features, targets, device=device)

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Take `[n, f]` features and `[n, o]` targets into account."""
        features = features.float()
        self._gram.addmm_(features.T, features)
        self._cross.addmm_(features.T, targets.float())

    def solve(self, ridge: float) -> Tensor:
        """`W`, `[f, o]`. To be called once: what was gathered is given back."""
        gram = self._gram.double()
        del self._gram
        gram.diagonal().add_(ridge * gram.diagonal().mean())
        factor = torch.linalg.cholesky(gram)
        return torch.cholesky_solve(self._cross.double(), factor).float()


class Repair:
    """Refits the grouped layers of one model.

    Args:
        original: a Hugging Face causal language model in fp32; it is not changed.
        grouped: a copy of it whose grouped layers are its own; they are changed in place.
        config: groups and schedule.
        tokens: `[M, S]` token ids, `M` at least 2.
        settings: how to repair.
    """

    def __init__(
        self,
        original: Any,
        grouped: Any,
        config: LayerParallelConfig,
        tokens: Tensor,
        settings: RepairSettings,
    ) -> None:
        self._original = ReferenceDecoder(original)
        self._grouped = ReferenceDecoder(grouped)
        self._config = config
        self._settings = settings
        num_layers = len(self._original.layers)
        self._units = partition_units(config.resolve_groups(num_layers), num_layers)
        held_out = max(1, len(tokens) // HELD_OUT)
        fitted = tokens[held_out:].split(BATCH)
        self._batches = (*fitted, *tokens[:held_out].split(BATCH))
        self._fitted = slice(len(fitted))
        self._held_out = slice(len(fitted), None)

    @torch.no_grad()
    def run(self) -> None:
        """Repair all groups, first to last."""
        with autocast(self._batches[0].device, self._settings.precision):
            self._run_units()

    def _run_units(self) -> None:
        last = max(i for i, unit in enumerate(self._units) if unit.is_group)
        hidden, self._contexts = zip(*map(self._original.embed, self._batches), strict=True)
        target = states = list(hidden)
        del hidden
        for unit in tqdm(self._units[: last + 1], desc="least-squares repair", unit="unit"):
            if unit.is_group:
                target, states = self._repair(unit, target, states)
                continue
            same = states is target  # before the first group
            target = self._run(self._original, unit, target)
            states = target if same else self._run(self._grouped, unit, states)

    def _run(self, decoder: ReferenceDecoder, unit: Unit, states: Sequence[Tensor]) -> list[Tensor]:
        return [
            decoder.run((unit,), hidden, context, self._config)
            for hidden, context in zip(states, self._contexts, strict=True)
        ]

    def _repair(
        self, unit: Unit, target: list[Tensor], states: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """One group.

        Args:
            target: the original's input of the group, one `[B, S, d]` per batch.
            states: the grouped model's.

        Returns:
            both models' states behind the group.
        """
        attention_inputs, mlp_inputs, target = self._original_states(unit, target)
        untouched = self._run(self._grouped, unit, states)
        layers = nn.ModuleList(self._grouped.layers[index] for index in unit.layers)
        weights = {name: value.clone() for name, value in layers.state_dict().items()}
        repaired = self._refit(unit, states, attention_inputs, mlp_inputs, target)
        if self._error(repaired, target) < self._error(untouched, target):
            return target, repaired
        logger.warning("the repair of layers %s does not carry over: left out", list(unit.layers))
        layers.load_state_dict(weights)
        return target, untouched

    def _error(self, states: Sequence[Tensor], target: Sequence[Tensor]) -> float:
        """Mean over held-out tokens of the squared distance, relative to the target's norm."""
        pairs = zip(states[self._held_out], target[self._held_out], strict=True)
        ratios = [
            (ours - theirs).square().sum(-1) / theirs.square().sum(-1) for ours, theirs in pairs
        ]
        return float(torch.cat(ratios).mean())

    def _refit(
        self,
        unit: Unit,
        states: list[Tensor],
        attention_inputs: list[list[Tensor]],
        mlp_inputs: list[list[Tensor]],
        target: list[Tensor],
    ) -> list[Tensor]:
        """Refit one group's weights; the states behind it."""
        attention: list[list[Tensor]] = []  # per member, per batch
        for j, index in enumerate(unit.layers):
            layer = self._grouped.layers[index]
            projections = [
                getattr(layer.self_attn, name) for name in ("q_proj", "k_proj", "v_proj")
            ]
            self._fold(layer.input_layernorm, projections, states, attention_inputs[j])
            attention.append(
                [
                    self._grouped.attention_delta(index, x, context)
                    for x, context in zip(states, self._contexts, strict=True)
                ]
            )
        carried, inputs = zip(
            *(
                group_states(x, deltas, self._config)
                for x, *deltas in zip(states, *attention, strict=True)
            ),
            strict=True,
        )
        for j, index in enumerate(unit.layers):
            layer = self._grouped.layers[index]
            projections = [layer.mlp.gate_proj, layer.mlp.up_proj]
            own = [per_member[j] for per_member in inputs]
            self._fold(layer.post_attention_layernorm, projections, own, mlp_inputs[j])
        return self._fit_output(unit, carried, inputs, target)

    def _original_states(
        self, unit: Unit, states: list[Tensor]
    ) -> tuple[list[list[Tensor]], list[list[Tensor]], list[Tensor]]:
        """Per member and batch the normed inputs of attention and MLP; and the output."""
        attention_inputs, mlp_inputs = [], []
        for index in unit.layers:
            layer = self._original.layers[index]
            attention_inputs.append([layer.input_layernorm(x) for x in states])
            states = [
                x + self._original.attention_delta(index, x, context)
                for x, context in zip(states, self._contexts, strict=True)
            ]
            mlp_inputs.append([layer.post_attention_layernorm(u) for u in states])
            states = [u + self._original.mlp_delta(index, u) for u in states]
        return attention_inputs, mlp_inputs, states

    def _fold(
        self,
        norm: nn.Module,
        projections: Sequence[nn.Linear],
        inputs: Sequence[Tensor],
        wanted: Sequence[Tensor],
    ) -> None:
        """Regress what the projections should read from what they do read; fold it into them.

        With `wanted ~ norm(inputs) (1 + W)`, a projection `P` becomes `P (1 + W)^T`.
        """
        size = wanted[0].shape[-1]
        regression = LeastSquares(size, size, wanted[0].device)
        for x, goal in zip(inputs[self._fitted], wanted[self._fitted], strict=True):
            normed = norm(x)
            regression.add(normed.flatten(0, 1), (goal - normed).flatten(0, 1))
        correction = regression.solve(self._settings.ridge)
        for projection in projections:
            weight = projection.weight.clone()
            projection.weight.addmm_(weight, correction.T)  # in place: not subject to autocast

    def _fit_output(
        self,
        unit: Unit,
        carried: Sequence[Tensor],
        inputs: Sequence[Sequence[Tensor]],
        target: Sequence[Tensor],
    ) -> list[Tensor]:
        """Fit the down projections of all members together; the group's output with them.

        Tokens count by their error relative to the target's norm: a few positions have states
        hundreds of times as large as the rest.
        """
        layers = [self._grouped.layers[index] for index in unit.layers]
        projections = [layer.mlp.down_proj for layer in layers]
        down = torch.cat([projection.weight for projection in projections], dim=-1)  # [d, f]
        bias = sum(p.bias for p in projections if p.bias is not None)
        regression = LeastSquares(down.shape[1], down.shape[0], down.device)
        known = []
        for i, (base, members, goal) in enumerate(zip(carried, inputs, target, strict=True)):
            activations = torch.cat(
                [_activations(layer, u) for layer, u in zip(layers, members, strict=True)], dim=-1
            )
            output = base + activations @ down.T + bias
            known.append((output, activations))
            if i >= self._fitted.stop:
                continue
            weight = goal.norm(dim=-1, keepdim=True).reciprocal()
            regression.add(
                (weight * activations).flatten(0, 1), (weight * (goal - output)).flatten(0, 1)
            )
        correction = regression.solve(self._settings.ridge)
        parts = correction.T.split([projection.in_features for projection in projections], dim=-1)
        for projection, part in zip(projections, parts, strict=True):
            projection.weight.add_(part)
        return [output + activations @ correction for output, activations in known]


def _activations(layer: nn.Module, u: Tensor) -> Tensor:
    """What the down projection of a layer's MLP reads, `[B, S, f]`."""
    mlp = layer.mlp
    normed = layer.post_attention_layernorm(u)
    return mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed)
