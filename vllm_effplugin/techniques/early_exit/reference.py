"""Early exit in plain PyTorch, on a Hugging Face decoder: the contract that the engine is held to.

One sequence at a time, with a cache that is written as the policy says. Which token leaves where
is given from outside, so that an engine's decisions can be replayed, preemption included.

Shapes: `S` positions, `d` hidden size, `V` vocabulary, `h` KV heads, `s` head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.models.llama.modeling_llama import rotate_half

from vllm_effplugin.config import EfficiencyConfig
from vllm_effplugin.plan import build_plan
from vllm_effplugin.techniques.early_exit.config import EarlyExitConfig
from vllm_effplugin.techniques.early_exit.exits import Exit
from vllm_effplugin.techniques.early_exit.gates import MambaGate
from vllm_effplugin.techniques.early_exit.state_reference import MixerTrace
from vllm_effplugin.techniques.layer_parallel.config import LayerParallelConfig
from vllm_effplugin.techniques.layer_parallel.reference import group_states


class ReferenceSequence:
    """One sequence and its cache.

    Args:
        model: a `*ForCausalLM` of the Llama, Mistral, Qwen2 or Qwen3 family.
        config: exits and cache policy.
        exits: their trained parts, in order; blocks are decoder layers of the model's class.
        parallel: groups of layers that run at the same time; exits lie between them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: EarlyExitConfig,
        exits: Sequence[Exit],
        parallel: LayerParallelConfig | None = None,
    ) -> None:
        self._model, self._decoder = model, model.model
        self._config, self._exits = config, exits
        self._depth = len(self._decoder.layers)
        self._cache = DynamicCache()
        self._gates = {
            number: MixerTrace(exit.gate)
            for number, exit in enumerate(exits)
            if isinstance(exit.gate, MambaGate)
        }
        self._scores: dict[int, Tensor] = {}  # of these gates for what ran last, by exit
        self._parallel = parallel
        # Layers in the order in which they run, one or a group at a time, and how many times have
        # come at each exit.
        self._layers: list[tuple[Any, ...]] = []
        self._ends: list[int] = []
        for unit in build_plan(EfficiencyConfig(layer_parallel=parallel), self._depth).units:
            self._layers.append(tuple(self._decoder.layers[layer] for layer in unit.layers))
            for number, exit in enumerate(exits):
                if exit.point.depth == unit.layers[-1] + 1:
                    if exit.block is not None:
                        exit.block.self_attn.layer_idx = self._depth + number
                        self._layers.append((exit.block,))
                    self._ends.append(len(self._layers))

    @torch.no_grad()
    def run(self, tokens: Sequence[int], start: int) -> Tensor:
        """Run all layers for `tokens` from position `start` on; logits `[S, V]`.

        Whatever the cache held from `start` on is forgotten.
        """
        self._forget(start)
        hidden, _ = self._run(self._embed(tokens), 0, len(self._layers), start)
        return self._logits(hidden)

    @torch.no_grad()
    def leave(self, token: int, position: int, exit: int) -> Tensor:
        """Run the layers before an exit for one token; logits `[V]` of the exit.

        The layers behind it get their cache entries by the policy, exact ones for `recompute`.
        """
        self._forget(position)
        end = self._ends[exit]
        hidden, adapted = self._run(self._embed([token]), 0, end, position)
        if self._config.cache == "recompute":
            self._run(hidden, end, len(self._layers), position)
        else:
            self._skip(exit, hidden, position)
            for number, trace in self._gates.items():
                if number > exit:
                    trace.skip(position)
        return self._logits(self._adapted(exit, hidden, adapted))[0]

    @torch.no_grad()
    def confidence(self, token: int, position: int, exit: int) -> float:
        """What an exit's gate says about a token, as a probability. Leaves the cache as it was."""
        self._forget(position)
        hidden, adapted = self._run(self._embed([token]), 0, self._ends[exit], position)
        self._forget(position)
        module = self._exits[exit]
        if exit in self._scores:
            return float(self._scores[exit].sigmoid())
        if module.gate is not None:
            return float(module.gate(hidden[0]).sigmoid())
        logits = self._logits(self._adapted(exit, hidden, adapted))
        return float(logits.softmax(-1).max())

    def _skip(self, exit: int, hidden: Tensor, position: int) -> None:
        """Approximate entries of the layers behind an exit, for one token."""
        ran = self._config.exits[exit].depth - 1
        for [layer] in self._layers[self._ends[exit] :]:
            self._fill(layer, ran, hidden, position)

    def _pass_gates(self, depth: int, hidden: Tensor, start: int) -> None:
        """Gates with states that read `[1, S, d]` hidden states behind so many layers take them."""
        for number, trace in self._gates.items():
            if self._config.exits[number].depth == depth:
                gate: Any = self._exits[number].gate
                gate.states = partial(trace.take, start)
                self._scores[number] = gate(hidden[0])

    def _adapted(self, exit: int, hidden: Tensor, adapted: Tensor) -> Tensor:
        module = self._exits[exit]
        return module.adapt(hidden) if module.block is None else adapted

    def _forget(self, start: int) -> None:
        """Drop the cache from position `start` on, layer by layer: some may have less."""
        if start == 0:
            self._cache = DynamicCache()
        for layer in self._cache.layers:
            if layer.keys is not None and layer.keys.numel():
                layer.keys = layer.keys[:, :, :start]
                layer.values = layer.values[:, :, :start]

    def _embed(self, tokens: Sequence[int]) -> Tensor:
        return self._decoder.embed_tokens(torch.tensor([list(tokens)]))

    def _logits(self, hidden: Tensor) -> Tensor:
        return self._model.lm_head(self._decoder.norm(hidden))[0]

    def _run(self, hidden: Tensor, first: int, last: int, start: int) -> tuple[Tensor, Tensor]:
        """Run some of `_layers` on `[1, S, d]` hidden states from position `start` on.

        Returns:
            the hidden states behind the last layer of the model itself, and behind the last layer;
            they differ where that is an exit's own.
        """
        length = hidden.shape[1]
        positions = torch.arange(start, start + length)
        visible = torch.arange(start + length)[None] <= positions[:, None]
        mask = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)[None, None]
        rotary = self._decoder.rotary_emb(hidden, positions[None])
        behind = hidden
        for layers in self._layers[first:last]:
            deltas = [
                layer.self_attn(
                    hidden_states=layer.input_layernorm(hidden),
                    position_embeddings=rotary,
                    attention_mask=mask,
                    past_key_values=self._cache,
                )[0]
                for layer in layers
            ]
            behind, inputs = hidden + deltas[0], [hidden + deltas[0]]
            if len(layers) > 1:
                assert self._parallel is not None
                behind, inputs = group_states(hidden, deltas, self._parallel)
            for layer, u in zip(layers, inputs, strict=True):
                behind = behind + layer.mlp(layer.post_attention_layernorm(u))
            index = layers[-1].self_attn.layer_idx
            if index < self._depth:
                hidden = behind
                self._pass_gates(index + 1, hidden, start)
        return hidden, behind

    def _fill(self, layer: Any, ran: int, hidden: Tensor, position: int) -> None:
        """Cache entry of a skipped layer for one token.

        Args:
            ran: index of the model's last layer that ran.
            hidden: `[1, 1, d]` behind it.
        """
        index = layer.self_attn.layer_idx
        if self._config.cache == "copy":
            source = self._cache.layers[ran]
            self._cache.update(source.keys[:, :, position:], source.values[:, :, position:], index)
            return
        attention = layer.self_attn
        normed = layer.input_layernorm(hidden)
        shape = (1, 1, -1, attention.head_dim)
        key, value = attention.k_proj(normed).view(shape), attention.v_proj(normed).view(shape)
        if hasattr(attention, "k_norm"):
            key = attention.k_norm(key)
        key, value = key.transpose(1, 2), value.transpose(1, 2)
        cos, sin = self._decoder.rotary_emb(hidden, torch.tensor([[position]]))
        key = key * cos[:, None] + rotate_half(key) * sin[:, None]
        self._cache.update(key, value, index)
