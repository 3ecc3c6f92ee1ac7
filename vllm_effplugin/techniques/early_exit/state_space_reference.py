"""Early exit of a state-space model in plain PyTorch: the contract that the engine is held to.

Shapes: `S` positions, `d` hidden size, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vllm_effplugin.preparation.state_space import gated_norm, shape_of
from vllm_effplugin.techniques.early_exit.config import EarlyExitConfig
from vllm_effplugin.techniques.early_exit.exits import Exit
from vllm_effplugin.techniques.early_exit.reference import ReferenceSequence
from vllm_effplugin.techniques.early_exit.state_reference import MixerTrace


class StateSpaceSequence(ReferenceSequence):
    """One sequence of a `Mamba2ForCausalLM`, and its states.

    Args:
        model: Hugging Face's.
        config: exits and policy.
        exits: their trained parts, in order.
    """

    def __init__(
        self, model: PreTrainedModel, config: EarlyExitConfig, exits: Sequence[Exit]
    ) -> None:
        trunk: Any = model.backbone
        names = SimpleNamespace(
            layers=trunk.layers, norm=trunk.norm_f, embed_tokens=trunk.embeddings
        )
        super().__init__(SimpleNamespace(model=names, lm_head=model.lm_head), config, exits)
        self._traces = [_trace(layer.mixer) for layer in trunk.layers]

    def _forget(self, start: int) -> None:
        """Traces forget by themselves."""

    def _skip(self, exit: int, hidden: Tensor, position: int) -> None:
        depth = self._config.exits[exit].depth
        for (layer,), trace in zip(self._layers[depth:], self._traces[depth:], strict=True):
            if self._config.cache == "freeze":
                trace.skip(position)
            else:
                trace.take(position, *_driven(layer, hidden[0])[1:])

    def _run(self, hidden: Tensor, first: int, last: int, start: int) -> tuple[Tensor, Tensor]:
        for index in range(first, last):
            [layer] = self._layers[index]
            mixer = layer.mixer
            gate, mixed, dt = _driven(layer, hidden[0])
            y = self._traces[index].take(start, mixed, dt)
            weight, epsilon = mixer.norm.weight, mixer.norm.variance_epsilon
            y = gated_norm(y, gate, weight, epsilon, shape_of(mixer).groups)
            hidden = hidden + mixer.out_proj(y)
            self._pass_gates(index + 1, hidden, start)
        return hidden, hidden


def _driven(layer: Any, hidden: Tensor) -> tuple[Tensor, ...]:
    """A layer's gate, and what drives its state in two parts, from `[S, d]` hidden states."""
    shape = shape_of(layer.mixer)
    projected: Tensor = layer.mixer.in_proj(layer.norm(hidden))
    return projected.split([shape.inner, shape.channels, shape.heads], -1)


@torch.no_grad()
def _trace(mixer: Any) -> MixerTrace:
    parts = SimpleNamespace(
        conv_weight=mixer.conv1d.weight.squeeze(1),
        conv_bias=mixer.conv1d.bias,
        log_a=mixer.A_log,
        D=mixer.D,
        dt_bias=mixer.dt_bias,
    )
    return MixerTrace(parts, shape_of(mixer))
