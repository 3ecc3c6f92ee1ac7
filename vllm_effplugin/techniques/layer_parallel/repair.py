"""Least-squares repair: grouped layers refitted to the original model, without a gradient.

Grouping changes what a layer reads: a member's attention sees the group's input instead of the
output of the layer before, and its MLP lacks a few terms. Much of the difference is linear in what
it does see, so three linear regressions per group take it back:

1. `Norm1_j(x)` to the original's input of attention `j`, folded into the q, k and v projections;
2. `Norm2_j(u_j)` to the original's input of MLP `j`, folded into the gate and up projections;
3. the activations of all members to what the group's output still lacks, folded into the down
   projections.

Groups are repaired in order, each on the states that the repaired groups before it produce, so
that a later group also corrects what earlier ones left.

Shapes: `N` tokens, `S` positions, `d` hidden size, `f` features of a regression, `p` layers of a
group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from vllm_effplugin.plan import Unit
from vllm_effplugin.techniques.layer_parallel.config import LayerParallelConfig
from vllm_effplugin.techniques.layer_parallel.precision import Precision, autocast
from vllm_effplugin.techniques.layer_parallel.reference import ReferenceDecoder, group_states
from vllm_effplugin.techniques.layer_parallel.search import partition_units

RIDGE = 0.1
"""Regularisation, relative to the mean square of the features."""

BATCH = 8
"""Sequences that run through a layer at a time."""


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
        """`W`, `[f, o]`."""
        gram = self._gram.double()
        gram.diagonal().add_(ridge * gram.diagonal().mean())
        return torch.linalg.solve(gram, self._cross.double()).float()


class Repair:
    """Refits the grouped layers of one model.

    Args:
        original: a Hugging Face causal language model in fp32; it is not changed.
        grouped: a copy of it whose grouped layers are its own; they are changed in place.
        config: groups and schedule.
        tokens: `[M, S]` token ids to fit on.
        precision: of the layers' matrix products; the regressions are in fp32 and fp64.
        ridge: regularisation, relative to the mean square of the features.
    """

    def __init__(
        self,
        original: Any,
        grouped: Any,
        config: LayerParallelConfig,
        tokens: Tensor,
        *,
        precision: Precision = "fp32",
        ridge: float = RIDGE,
    ) -> None:
        self._original = ReferenceDecoder(original)
        self._grouped = ReferenceDecoder(grouped)
        self._config = config
        self._tokens = tokens
        self._ridge = ridge
        self._autocast = autocast(tokens.device, precision)
        num_layers = len(self._original.layers)
        self._units = partition_units(config.resolve_groups(num_layers), num_layers)

    @torch.no_grad()
    def run(self) -> None:
        """Repair all groups, first to last."""
        with self._autocast:
            self._run_units()

    def _run_units(self) -> None:
        last = max(i for i, unit in enumerate(self._units) if unit.is_group)
        batches = self._tokens.split(BATCH)
        embedded = [self._original.embed(batch) for batch in batches]
        self._contexts = [context for _, context in embedded]
        target = [hidden for hidden, _ in embedded]
        states = list(target)
        for unit in tqdm(self._units[: last + 1], desc="least-squares repair", unit="unit"):
            if unit.is_group:
                target, states = self._repair(unit, target, states)
                continue
            same = states[0] is target[0]  # before the first group
            target = self._run(self._original, unit, target)
            states = list(target) if same else self._run(self._grouped, unit, states)

    def _run(self, decoder: ReferenceDecoder, unit: Unit, states: Sequence[Tensor]) -> list[Tensor]:
        return [
            decoder.run((unit,), hidden, context)
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
        return target, self._fit_output(unit, carried, inputs, target)

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
        for x, goal in zip(inputs, wanted, strict=True):
            normed = norm(x)
            regression.add(normed.flatten(0, 1), (goal - normed).flatten(0, 1))
        correction = regression.solve(self._ridge)
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
        for base, members, goal in zip(carried, inputs, target, strict=True):
            activations = torch.cat(
                [_activations(layer, u) for layer, u in zip(layers, members, strict=True)], dim=-1
            )
            output = base + activations @ down.T + bias
            known.append((output, activations))
            weight = goal.norm(dim=-1, keepdim=True).reciprocal()
            regression.add(
                (weight * activations).flatten(0, 1), (weight * (goal - output)).flatten(0, 1)
            )
        correction = regression.solve(self._ridge)
        parts = correction.T.split([projection.in_features for projection in projections], dim=-1)
        for projection, part in zip(projections, parts, strict=True):
            projection.weight.add_(part)
        return [output + activations @ correction for output, activations in known]


def _activations(layer: nn.Module, u: Tensor) -> Tensor:
    """What the down projection of a layer's MLP reads, `[B, S, f]`."""
    mlp = layer.mlp
    normed = layer.post_attention_layernorm(u)
    return mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed)
