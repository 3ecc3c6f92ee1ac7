"""Approximate cache entries of skipped layers: `propagate` and `copy`.

Shapes: `n` tokens, `d` hidden size, `l` skipped layers, `h` KV heads, `s` head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vllm_effplugin.errors import UnsupportedError
from vllm_effplugin.techniques.early_exit.config import EarlyExitConfig


class CacheFill(Protocol):
    """Writes what tokens owe the layers that they skip."""

    def prepare(self) -> None:
        """The model's weights are loaded, and not yet in the form that kernels want."""

    def add(
        self, exit: int, hidden: Tensor, tokens: Tensor, positions: Tensor, slots: Tensor
    ) -> None:
        """Tokens leave.

        Args:
            exit: index of the exit.
            hidden: `[n, d]` hidden states there.
            tokens: their indices in the batch that the last segment ran on.
            positions, slots: their positions and cache slots.
        """

    def write(self) -> None:
        """Write the entries of all tokens added since the last time."""


def open_fill(config: EarlyExitConfig, trunk: Any) -> CacheFill | None:
    """What the policy asks for; None for `recompute`, which writes nothing approximate.

    Raises:
        UnsupportedError: when the attention backend cannot write entries without attention.
    """
    if config.cache == "recompute":
        return None
    layers = list(trunk.layers)
    for layer in layers:
        if layer.self_attn.attn.attn_backend.forward_includes_kv_cache_update:
            raise UnsupportedError(
                f"cache policy {config.cache!r} needs an attention backend that writes the cache "
                f"apart from attention, which {layer.self_attn.attn.attn_backend.get_name()} does "
                "not: choose another --attention-backend, or `recompute`"
            )
    depths = [point.depth for point in config.exits]
    return (Propagate if config.cache == "propagate" else Copy)(layers, depths)


def _write(layer: Any, key: Tensor, value: Tensor, slots: Tensor) -> None:
    attention = layer.self_attn.attn
    attention.impl.do_kv_cache_update(attention, key, value, attention.kv_cache, slots)


class Propagate:
    """Keys and values from the exit's hidden state through each skipped layer (CALM).

    All layers behind the first exit share one matrix product: their norms' weights are folded
    into their projections, stacked deepest last.
    """

    def __init__(self, layers: Sequence[Any], depths: Sequence[int]) -> None:
        self._layers = layers[depths[0] :]
        self._first = [depth - depths[0] for depth in depths]
        self._added: list[tuple[int, Tensor, Tensor, Tensor]] = []

    @torch.no_grad()
    def prepare(self) -> None:
        weights, biases = [], []
        for layer in self._layers:
            attention = layer.self_attn
            weight = attention.qkv_proj.weight[attention.q_size :].float()
            weights.append(weight * layer.input_layernorm.weight.float())
            if attention.qkv_proj.bias is not None:
                biases.append(attention.qkv_proj.bias[attention.q_size :])
        dtype = self._layers[0].self_attn.qkv_proj.weight.dtype
        self._weight = torch.cat(weights).to(dtype)  # [l * 2 * h * s, d]
        self._bias = torch.cat(biases).to(dtype) if biases else None

    def add(
        self, exit: int, hidden: Tensor, tokens: Tensor, positions: Tensor, slots: Tensor
    ) -> None:
        self._added.append((exit, hidden, positions, slots))

    def write(self) -> None:
        for exit, hidden, positions, slots in self._added:
            self._write(self._first[exit], hidden, positions, slots)
        self._added.clear()

    def _write(self, first: int, hidden: Tensor, positions: Tensor, slots: Tensor) -> None:
        layers = self._layers[first:]
        attention = layers[0].self_attn
        size = 2 * attention.kv_size
        epsilon = layers[0].input_layernorm.variance_epsilon
        normed = hidden.float()
        normed = normed * torch.rsqrt(normed.square().mean(-1, keepdim=True) + epsilon)
        bias = None if self._bias is None else self._bias[first * size :]
        both = nn.functional.linear(normed.to(hidden.dtype), self._weight[first * size :], bias)
        both = both.view(len(hidden), len(layers), 2, -1, attention.head_dim)
        keys, values = both[:, :, 0], both[:, :, 1]  # [n, l, h, s]
        if hasattr(attention, "k_norm"):
            weight = torch.stack([layer.self_attn.k_norm.weight for layer in layers])
            scale = torch.rsqrt(
                keys.float().square().mean(-1, keepdim=True) + attention.k_norm.variance_epsilon
            )
            keys = (keys.float() * scale).to(hidden.dtype) * weight[:, None]
        repeated = positions.repeat_interleave(len(layers))
        flat = keys.reshape(len(repeated), -1)
        _, flat = attention.rotary_emb(repeated, flat.clone(), flat)
        keys = flat.view(len(hidden), len(layers), -1, attention.head_dim)
        for i, layer in enumerate(layers):
            _write(layer, keys[:, i].contiguous(), values[:, i].contiguous(), slots)


class Copy:
    """Keys and values of the last layer that ran (the rule that DYNAMAX publishes)."""

    def __init__(self, layers: Sequence[Any], depths: Sequence[int]) -> None:
        self._skipped = [layers[depth:] for depth in depths]
        self._seen = [_Recorder(layers[depth - 1].self_attn.attn) for depth in depths]
        self._added: list[tuple[int, Tensor, Tensor, Tensor]] = []

    def prepare(self) -> None:
        pass

    def add(
        self, exit: int, hidden: Tensor, tokens: Tensor, positions: Tensor, slots: Tensor
    ) -> None:
        seen = self._seen[exit]
        self._added.append((exit, seen.key[tokens], seen.value[tokens], slots))

    def write(self) -> None:
        for exit, key, value, slots in self._added:
            for layer in self._skipped[exit]:
                _write(layer, key, value, slots)
        self._added.clear()


class _Recorder:
    """Stands in for an attention layer's implementation and keeps what it wrote last."""

    def __init__(self, attention: Any) -> None:
        self._impl = attention.impl
        attention.impl = self
        self.key = self.value = torch.empty(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._impl, name)

    def do_kv_cache_update(
        self, layer: nn.Module, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        # Cloned: the compiled graph may use the memory again behind this call.
        self.key, self.value = key.clone(), value.clone()
        self._impl.do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
