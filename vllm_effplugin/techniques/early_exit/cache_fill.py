"""Approximate cache entries of skipped layers: `propagate` and `copy`.

Shapes: `n` tokens, `d` hidden size, `l` skipped layers, `h` KV heads, `s` head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, zip_longest
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from vllm_effplugin.errors import UnsupportedError
from vllm_effplugin.techniques.early_exit.config import EarlyExitConfig


class CacheFill(Protocol):
    """Writes what tokens owe the layers that they skip."""

    widths: tuple[int, ...]
    """Sizes of the rows of the tensors that a token's entries are made from."""

    def prepare(self) -> None:
        """The model's weights are loaded, and not yet in the form that kernels want."""

    def sources(self, exit: int, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        """What the entries of tokens that leave are made from, now or later.

        Args:
            exit: index of the exit.
            hidden: `[n, d]` hidden states there.
            tokens: their indices in the batch that the last segment ran on.

        Returns:
            a tensor `[n, width]` for each of `widths`.
        """

    def write(self, exit: int, sources: Sequence[Tensor], positions: Tensor, slots: Tensor) -> None:
        """Write the entries of tokens that left at an exit.

        Args:
            sources: of these tokens.
            positions, slots: their positions and cache slots, `[n]`.
        """


class PendingFills:
    """Entries that nothing reads yet, by request.

    A skipped layer's entry is read when a later token of its request runs that layer, and may be
    shared once its block is full. Until then it waits, so that many are written together: one
    token's entries cost nearly what sixteen tokens' cost, since the weights are read either way.

    Args:
        fill: makes and writes entries.
        slots: most requests at a time.
        room: most tokens of a request that wait.
        block_size: positions of a block of the KV cache.
    """

    def __init__(
        self,
        fill: CacheFill,
        slots: int,
        room: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._fill, self._room, self._block_size = fill, room, block_size
        self._count = np.zeros(slots, dtype=np.int64)
        self._exits = np.zeros((slots, room), dtype=np.int64)
        self._positions = np.zeros((slots, room), dtype=np.int64)
        self._cache_slots = torch.zeros(slots * room, dtype=torch.int64, device=device)
        self._sources = [
            torch.empty(slots * room, width, dtype=dtype, device=device) for width in fill.widths
        ]
        self._full = False

    def open(self, slot: int) -> None:
        """A new request: nothing waits."""
        self._count[slot] = 0

    def add(
        self,
        slots: np.ndarray,
        exit: int,
        sources: Sequence[Tensor],
        positions: np.ndarray,
        cache_slots: Tensor,
    ) -> None:
        """One token of each of some requests left at an exit.

        Args:
            sources: from which the tokens' entries are made.
            positions, cache_slots: of the tokens.
        """
        count = self._count[slots]
        self._exits[slots, count] = exit
        self._positions[slots, count] = positions
        places = torch.from_numpy(slots * self._room + count).to(cache_slots.device)
        self._cache_slots.index_copy_(0, places, cache_slots.long())
        for kept, source in zip(self._sources, sources, strict=True):
            kept.index_copy_(0, places, source)
        self._count[slots] = count = count + 1
        due = (count == self._room) | ((positions + 1) % self._block_size == 0)
        self._full = self._full or bool(due.any())

    def write(self, slots: np.ndarray) -> None:
        """Write what waits of some requests: a layer behind an exit is about to read it."""
        counts = self._count[slots]
        if not counts.any():
            return
        owing = np.repeat(slots, counts)
        nth = np.arange(len(owing)) - np.repeat(np.cumsum(counts) - counts, counts)
        exits = self._exits[owing, nth]
        places = owing * self._room + nth
        for exit in np.unique(exits).tolist():
            chosen = exits == exit
            at = torch.from_numpy(places[chosen]).to(self._cache_slots.device)
            positions = torch.from_numpy(self._positions[owing, nth][chosen]).to(at.device)
            self._fill.write(
                exit, [kept[at] for kept in self._sources], positions, self._cache_slots[at]
            )
        self._count[slots] = 0

    def keep_room(self, slots: np.ndarray) -> None:
        """Leave no room and no block full of what waits.

        Args:
            slots: the step's requests. All of them are written where one has to be: it costs
                little more.
        """
        if self._full:
            self.write(slots)
            self._full = False


def open_fill(config: EarlyExitConfig, trunk: Any) -> CacheFill | None:
    """What the policy asks for; None for those that write no keys and values.

    Args:
        trunk: has the layers and the exits, whose blocks are layers too.

    Raises:
        UnsupportedError: when the attention backend cannot write entries without attention.
    """
    if config.cache not in ("propagate", "copy"):
        return None
    layers: list[Any] = []
    ends: list[int] = []  # layers up to each exit, its own included
    starts = [0, *(exit.point.depth for exit in trunk.exits), len(trunk.layers)]
    for (first, last), exit in zip_longest(pairwise(starts), trunk.exits):
        layers += trunk.layers[first:last]
        if exit is not None:
            layers += [] if exit.block is None else [exit.block]
            ends.append(len(layers))
    for layer in layers:
        if layer.self_attn.attn.attn_backend.forward_includes_kv_cache_update:
            raise UnsupportedError(
                f"cache policy {config.cache!r} needs an attention backend that writes the cache "
                f"apart from attention, which {layer.self_attn.attn.attn_backend.get_name()} does "
                "not: choose another --attention-backend, or `recompute`"
            )
    if config.cache == "propagate":
        return Propagate(layers, ends)
    return Copy(layers, ends, [trunk.layers[exit.point.depth - 1] for exit in trunk.exits])


def _write(layer: Any, key: Tensor, value: Tensor, slots: Tensor) -> None:
    attention = layer.self_attn.attn
    attention.impl.do_kv_cache_update(attention, key, value, attention.kv_cache, slots)


class Propagate:
    """Keys and values from the exit's hidden state through each skipped layer (CALM).

    Args:
        layers: all, in the order in which they run.
        ends: how many of them have run at each exit.

    All layers behind the first exit share one matrix product: their norms' weights are folded
    into their projections, stacked deepest last.
    """

    def __init__(self, layers: Sequence[Any], ends: Sequence[int]) -> None:
        self._layers = layers[ends[0] :]
        self._first = [end - ends[0] for end in ends]
        self.widths: tuple[int, ...] = (layers[0].self_attn.hidden_size,)

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

    def sources(self, exit: int, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        return (hidden,)

    def write(self, exit: int, sources: Sequence[Tensor], positions: Tensor, slots: Tensor) -> None:
        [hidden] = sources
        first = self._first[exit]
        layers = self._layers[first:]
        attention = layers[0].self_attn
        size = 2 * attention.kv_size
        epsilon = layers[0].input_layernorm.variance_epsilon
        normed = hidden.float()
        normed = normed * torch.rsqrt(normed.square().mean(-1, keepdim=True) + epsilon)
        bias = None if self._bias is None else self._bias[first * size :]
        both = nn.functional.linear(normed.to(hidden.dtype), self._weight[first * size :], bias)
        both = both.view(len(hidden), len(layers), 2, -1, attention.head_dim)
        keys, values = both.permute(2, 1, 0, 3, 4).contiguous()  # [l, n, h, s] each
        if hasattr(attention, "k_norm"):
            weight = torch.stack([layer.self_attn.k_norm.weight for layer in layers])
            scale = torch.rsqrt(
                keys.float().square().mean(-1, keepdim=True) + attention.k_norm.variance_epsilon
            )
            keys = (keys.float() * scale).to(hidden.dtype) * weight[:, None, None]
        flat, _ = attention.rotary_emb(
            positions.repeat(len(layers)), keys.view(len(layers) * len(hidden), -1), None
        )
        keys = flat.view(values.shape)
        for layer, key, value in zip(layers, keys, values, strict=True):
            _write(layer, key, value, slots)


class Copy:
    """Keys and values of the last layer that ran (the rule that DYNAMAX publishes).

    Args:
        layers: all, in the order in which they run.
        ends: how many of them have run at each exit.
        lasts: the last of the model's own layers before each exit.
    """

    def __init__(self, layers: Sequence[Any], ends: Sequence[int], lasts: Sequence[Any]) -> None:
        self._skipped = [layers[end:] for end in ends]
        self._seen = [_Recorder(layer.self_attn.attn) for layer in lasts]
        attention = layers[0].self_attn
        self._shape = (-1, attention.num_kv_heads, attention.head_dim)
        self.widths: tuple[int, ...] = (attention.kv_size, attention.kv_size)

    def prepare(self) -> None:
        pass

    def sources(self, exit: int, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        seen = self._seen[exit]
        return seen.key[tokens].flatten(1), seen.value[tokens].flatten(1)

    def write(self, exit: int, sources: Sequence[Tensor], positions: Tensor, slots: Tensor) -> None:
        key, value = (source.view(self._shape) for source in sources)
        for layer in self._skipped[exit]:
            _write(layer, key, value, slots)


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
