"""What tokens that leave do to recurrent states behind their exit: `freeze` and `state-only`.

Keys and values of skipped layers are owed (`cache_fill.py`). A state is not: without the token it
is what it was. So under `freeze` nothing happens, but that states of gates go along into the next
block; under `state-only` the states of the model's layers take in the exit's hidden state, in place
of what the layer before would have given.

Shapes: `n` tokens, `d` hidden size, `l` skipped layers, `C` channels of a layer's convolution, `H`
heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vllm_effplugin.engine.batch import Step, running_on, subset
from vllm_effplugin.engine.state_pages import pages_at, state_tensors
from vllm_effplugin.techniques.early_exit.config import EarlyExitConfig


@dataclass(frozen=True)
class KeptStates:
    """States of some rows before a step.

    Attributes:
        rows: indices of the step's rows, increasing.
        states: per layer, its tensors at these rows.
    """

    rows: np.ndarray
    states: dict[Any, list[Tensor]]


class SkippedStates:
    """The states behind each exit, under a policy that is not exact.

    Args:
        config: exits and policy.
        trunk: has the layers and the exits.
        state_space: whether the model's own layers have states.
    """

    def __init__(self, config: EarlyExitConfig, trunk: Any, *, state_space: bool) -> None:
        depths = [exit.point.depth for exit in trunk.exits]
        layers = list(trunk.layers) if state_space else []
        gates = [exit.gate.states if exit.point.gate == "mamba" else None for exit in trunk.exits]
        self._layers = [[layer.mixer for layer in layers[depth:]] for depth in depths]
        self._gates = [
            [gate for gate in gates[index + 1 :] if gate is not None] for index in range(len(gates))
        ]
        self._update = None
        if config.cache == "state-only":
            self._update = StateUpdate(layers[depths[0] :], [d - depths[0] for d in depths])

    def prepare(self) -> None:
        """The model's weights are loaded."""
        if self._update is not None:
            self._update.prepare()

    def skip(
        self, exit: int, step: Step, rows: np.ndarray, positions: np.ndarray, hidden: Tensor
    ) -> None:
        """One token of each of a step's rows leaves at an exit.

        Args:
            hidden: `[n, d]` behind the layer before the exit.
        """
        size = step.builder.kv_cache_spec.block_size
        enters = positions % size == 0
        if self._gates[exit] and enters.any():
            sources = pages_at(step, rows[enters], positions[enters] - 1)
            targets = pages_at(step, rows[enters], positions[enters])
            for gate in self._gates[exit]:
                for states in state_tensors(gate):
                    states.index_copy_(0, targets, states[sources])
        if self._update is not None:
            self._update(exit, step, rows, positions, hidden)

    def keep(self, step: Step, rows: np.ndarray, positions: np.ndarray) -> KeptStates:
        """What the states are before some rows' tokens, which run all layers to be compared."""
        layers = [*self._layers[0], *self._gates[0]]
        pages = pages_at(step, rows, positions - 1)
        return KeptStates(
            rows, {layer: [states[pages] for states in state_tensors(layer)] for layer in layers}
        )

    def put_back(
        self, exit: int, kept: KeptStates, step: Step, rows: np.ndarray, positions: np.ndarray
    ) -> None:
        """Forget what tokens did to the states behind an exit.

        Args:
            rows: some of those that were kept.
        """
        pages = pages_at(step, rows, positions)
        places = torch.from_numpy(np.searchsorted(kept.rows, rows))
        for layer in (*self._layers[exit], *self._gates[exit]):
            for states, before in zip(state_tensors(layer), kept.states[layer], strict=True):
                states.index_copy_(0, pages, before[places])


class StateUpdate:
    """Convolution and state update of skipped layers, without gate and output projection.

    All layers read the same hidden state, so they share one matrix product: their norms' weights
    are folded into their projections.

    Args:
        layers: those behind the first exit.
        firsts: for each exit, how many of them lie before it.
    """

    def __init__(self, layers: Sequence[Any], firsts: Sequence[int]) -> None:
        self._layers, self._firsts = list(layers), list(firsts)
        mixer = layers[0].mixer
        self._inner = mixer.tped_intermediate_size

    @torch.no_grad()
    def prepare(self) -> None:
        """Stack the projections, once they are loaded."""
        weights, biases = [], []
        for layer in self._layers:
            projection = layer.mixer.in_proj
            weights.append(projection.weight[self._inner :].float() * layer.norm.weight.float())
            if projection.bias is not None:
                biases.append(projection.bias[self._inner :])
        dtype = self._layers[0].mixer.in_proj.weight.dtype
        self._weight = torch.cat(weights).to(dtype)  # [l * (C + H), d]
        self._bias = torch.cat(biases) if biases else None

    def __call__(
        self, exit: int, step: Step, rows: np.ndarray, positions: np.ndarray, hidden: Tensor
    ) -> None:
        layers = self._layers[self._firsts[exit] :]
        width = len(self._weight) // len(self._layers)
        begin = self._firsts[exit] * width
        normed = hidden.float()
        epsilon = layers[0].norm.variance_epsilon
        normed = normed * torch.rsqrt(normed.square().mean(-1, keepdim=True) + epsilon)
        bias = None if self._bias is None else self._bias[begin:]
        driven = nn.functional.linear(normed.to(hidden.dtype), self._weight[begin:], bias)
        # The mixer skips what would be its gate.
        projected = driven.new_empty(len(hidden), len(layers), self._inner + width)
        projected[:, :, self._inner :] = driven.view(len(hidden), len(layers), width)
        unused = driven.new_empty(len(hidden), self._inner)
        slots = torch.zeros(len(rows), dtype=torch.int64, device=hidden.device)
        ones = np.ones(len(rows), dtype=np.int64)
        at = torch.from_numpy(positions).to(hidden.device)
        with running_on(subset(step, rows, ones, slots, at), slots):
            for place, layer in enumerate(layers):
                layer.mixer.conv_ssm_forward(projected[:, place], unused)


def open_states(config: EarlyExitConfig, trunk: Any, *, state_space: bool) -> SkippedStates | None:
    """What keeps states right where tokens skip layers; None where nothing has to."""
    if config.cache == "recompute" or not (state_space or config.has_states):
        return None
    return SkippedStates(config, trunk, state_space=state_space)
