"""Early exit in plain PyTorch, on a Hugging Face decoder: the contract that the engine is held to.

One sequence at a time, with a cache that is written as the policy says. Which token leaves where
is given from outside, so that an engine's decisions can be replayed, preemption included.

Shapes: `S` positions, `d` hidden size, `V` vocabulary, `h` KV heads, `s` head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.models.llama.modeling_llama import rotate_half

from vllm_effplugin.techniques.early_exit.config import EarlyExitConfig
from vllm_effplugin.techniques.early_exit.exits import Exit


class ReferenceSequence:
    """One sequence and its cache.

    Args:
        model: a `*ForCausalLM` of the Llama, Mistral, Qwen2 or Qwen3 family.
        config: exits and cache policy.
        exits: their trained parts, in order.
    """

    def __init__(
        self, model: PreTrainedModel, config: EarlyExitConfig, exits: Sequence[Exit]
    ) -> None:
        self._model, self._decoder = model, model.model
        self._config, self._exits = config, exits
        self._cache = DynamicCache(config=model.config)

    @torch.no_grad()
    def run(self, tokens: Sequence[int], start: int) -> Tensor:
        """Run all layers for `tokens` from position `start` on; logits `[S, V]`.

        Whatever the cache held from `start` on is forgotten.
        """
        self._forget(start)
        hidden = self._layers(self._embed(tokens), 0, len(self._decoder.layers), start)
        return self._logits(hidden)

    @torch.no_grad()
    def leave(self, token: int, position: int, exit: int) -> Tensor:
        """Run the layers before an exit for one token; logits `[V]` of the exit.

        The layers behind it get their cache entries by the policy, exact ones for `recompute`.
        """
        self._forget(position)
        depth = self._config.exits[exit].depth
        hidden = self._layers(self._embed([token]), 0, depth, position)
        if self._config.cache == "recompute":
            self._layers(hidden, depth, len(self._decoder.layers), position)
        else:
            for index in range(depth, len(self._decoder.layers)):
                self._fill(index, depth - 1, hidden, position)
        return self._logits(self._exits[exit].adapt(hidden))[0]

    @torch.no_grad()
    def confidence(self, token: int, position: int, exit: int) -> float:
        """What an exit's gate says about a token, as a probability. Leaves the cache as it was."""
        self._forget(position)
        depth = self._config.exits[exit].depth
        hidden = self._layers(self._embed([token]), 0, depth, position)
        self._forget(position)
        module = self._exits[exit]
        if module.gate is not None:
            return float(module.gate(hidden[0]).sigmoid())
        return float(self._logits(module.adapt(hidden)).softmax(-1).max())

    def _forget(self, start: int) -> None:
        """Drop the cache from position `start` on, layer by layer: some may have less."""
        if start == 0:
            self._cache = DynamicCache(config=self._model.config)
        for layer in self._cache.layers:
            if layer.keys is not None and layer.keys.numel():
                layer.keys = layer.keys[:, :, :start]
                layer.values = layer.values[:, :, :start]

    def _embed(self, tokens: Sequence[int]) -> Tensor:
        return self._decoder.embed_tokens(torch.tensor([list(tokens)]))

    def _logits(self, hidden: Tensor) -> Tensor:
        return self._model.lm_head(self._decoder.norm(hidden))[0]

    def _layers(self, hidden: Tensor, first: int, last: int, start: int) -> Tensor:
        """Layers `[first, last)` on `[1, S, d]` hidden states from position `start` on."""
        length = hidden.shape[1]
        positions = torch.arange(start, start + length)
        visible = torch.arange(start + length)[None] <= positions[:, None]
        mask = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)[None, None]
        rotary = self._decoder.rotary_emb(hidden, positions[None])
        for layer in self._decoder.layers[first:last]:
            delta, _ = layer.self_attn(
                hidden_states=layer.input_layernorm(hidden),
                position_embeddings=rotary,
                attention_mask=mask,
                past_key_values=self._cache,
            )
            hidden = hidden + delta
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return hidden

    def _fill(self, index: int, ran: int, hidden: Tensor, position: int) -> None:
        """Cache entry of a skipped layer for one token.

        Args:
            ran: the last layer that ran.
            hidden: `[1, 1, d]` behind it.
        """
        if self._config.cache == "copy":
            source = self._cache.layers[ran]
            self._cache.update(source.keys[:, :, position:], source.values[:, :, position:], index)
            return
        layer: Any = self._decoder.layers[index]
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
