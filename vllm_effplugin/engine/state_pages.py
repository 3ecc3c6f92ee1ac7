"""Recurrent states of exits' gates, in pages of the model's own cache.

The gates with states are one more layer in the cache group of the model's layers: it asks for the
same pages, and gets one for every block of a request. There each gate keeps its state behind the
last position of the block that it has seen; so full blocks can be shared, preempted requests lose
them with their other entries, and nothing has to be told which request a row belongs to. In a
state-space model, where a request has one page for all its positions, it is that page.

vLLM's own way, a Mamba group beside the attention group, would make blocks as large as states, and
keep none behind a shared prefix unless asked to.

Shapes: `T` tokens of the batch, `R` rows, `C` channels of the convolution, `K` positions that it
looks at, `H` heads of `P` channels, `N` coordinates of the state; `M` mixers in all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from vllm._custom_ops import (
    causal_conv1d_update_cpu_vec,
    mamba_chunk_scan_fwd_cpu,
    selective_state_update_cpu,
)
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.mamba.ops.cpu.causal_conv1d import causal_conv1d_fn_cpu

from vllm_effplugin.engine.batch import Step, current_step, ranges
from vllm_effplugin.errors import UnsupportedError
from vllm_effplugin.preparation.mixer_shape import MixerShape
from vllm_effplugin.preparation.state_space import split_mixed

NO_PAGE = 0
"""vLLM's null block: kernels leave out rows whose page it is."""


class Mixer(Protocol):
    """Parameters of a Mamba-2 mixer, without its projections; fp32."""

    shape: MixerShape
    conv_weight: Any
    conv_bias: Any
    log_a: Any
    D: Any
    dt_bias: Any


class Wave(NamedTuple):
    """Tokens that take states on within one block each, at most one row's worth of a block.

    Attributes:
        tokens: their indices in the batch; None for all, in order.
        pages: `[R]` pages of the rows' states.
        begins: `[R + 1]` where each row's tokens begin among these; None for one token each.
        fresh: pages of rows that start from a state of zeros.
        sources, targets: pages of rows that enter a block: the one before, and its own.
    """

    tokens: Tensor | None
    pages: Tensor
    begins: Tensor | None = None
    fresh: Tensor | None = None
    sources: Tensor | None = None
    targets: Tensor | None = None


@lru_cache(maxsize=1)
def waves(step: Step) -> Sequence[Wave]:
    """How the tokens of a batch take states on. All gates of a part of the stack share it."""
    common, size = step.common, step.builder.kv_cache_spec.block_size
    upper = common.seq_lens_cpu_upper_bound
    assert upper is not None  # vLLM's own state-space layers need it as well
    ends = upper.numpy()[: common.num_reqs]
    table = common.block_table_tensor.numpy()
    if common.max_query_len == 1:
        starts = ends - 1
        blocks, within = np.divmod(starts, size)
        rows = np.arange(len(ends))
        if within.all():  # decoding, for the most part
            return (Wave(None, torch.from_numpy(table[rows, blocks])),)
        return (_wave(table, rows, starts, size, None, None),)
    offsets = common.query_start_loc_cpu.numpy()
    lengths = np.diff(offsets)
    firsts = ends - lengths
    found = []
    first_blocks = firsts // size
    count = (ends - 1) // size - first_blocks + 1
    for nth in range(int(count.max())):
        active = np.flatnonzero(count > nth)
        begins = np.maximum(firsts[active], (first_blocks[active] + nth) * size)
        stops = np.minimum(ends[active], (first_blocks[active] + nth + 1) * size)
        single = stops - begins == 1
        for chosen in (single, ~single):
            if not chosen.any():
                continue
            rows, starts = active[chosen], begins[chosen]
            tokens = stops[chosen] - starts
            places = np.repeat(offsets[rows] + starts - firsts[rows], tokens) + ranges(tokens)
            several = None if tokens[0] == 1 else tokens
            found.append(_wave(table, rows, starts, size, places, several))
    return tuple(found)


def _wave(
    table: np.ndarray,
    rows: np.ndarray,
    starts: np.ndarray,
    size: int,
    tokens: np.ndarray | None,
    lengths: np.ndarray | None,
) -> Wave:
    """The wave of some rows, each from a position on and within one block."""
    blocks = starts // size
    pages = table[rows, blocks]
    enters = starts % size == 0
    fresh = sources = targets = begins = None
    if enters.any():
        new = starts == 0
        if new.any():
            fresh = torch.from_numpy(pages[new].astype(np.int64))
        enters &= ~new
        if enters.any():
            sources = torch.from_numpy(table[rows, blocks - 1][enters].astype(np.int64))
            targets = torch.from_numpy(pages[enters].astype(np.int64))
    if lengths is not None:
        begins = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        torch.cumsum(torch.from_numpy(lengths), 0, out=begins[1:])
    places = None if tokens is None else torch.from_numpy(tokens)
    return Wave(places, torch.from_numpy(pages), begins, fresh, sources, targets)


def pages_at(step: Step, rows: np.ndarray, positions: np.ndarray) -> Tensor:
    """Pages of the blocks that positions of some of a step's rows lie in."""
    size = step.builder.kv_cache_spec.block_size
    found = step.common.block_table_tensor.numpy()[rows, positions // size]
    return torch.from_numpy(found.astype(np.int64))


class StatePages(AttentionLayerBase):
    """The states of some mixers of one shape: a layer as far as vLLM's cache goes.

    Args:
        mixers: what advances them.
        like: a layer of the model, whose pages these are like.
        layer_name: unique; it has one number in it.
    """

    def __init__(
        self, mixers: Sequence[Mixer], like: Any, layer_name: str, vllm_config: VllmConfig
    ) -> None:
        self._mixers, self._like, self.layer_name = list(mixers), like, layer_name
        layers = vllm_config.compilation_config.static_forward_context
        if layer_name in layers:
            raise ValueError(f"there are two layers {layer_name}")
        layers[layer_name] = self
        self.num_heads = like.num_heads  # a runner builds metadata apart where it differs
        self._parts: dict[tuple[int, int], StatePart] = {}

    def part(self, first: int, count: int = 1) -> StatePart:
        """What some mixers next to each other have of the pages."""
        if (first, count) not in self._parts:
            mixers = self._mixers[first : first + count]
            self._parts[first, count] = StatePart(mixers, self.layer_name, first)
        return self._parts[first, count]

    # --- A layer of vLLM's -----------------------------------------------------------------------

    def get_attn_backend(self) -> Any:
        return self._like.get_attn_backend()

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> Any:
        return self._like.get_kv_cache_spec(vllm_config)

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Lay the states over the layer's pages.

        Raises:
            UnsupportedError: when a page is too small for them.
        """
        self.kv_cache = kv_cache
        # From the widest stride to the narrowest: whatever the layout, a view.
        order = sorted(range(1, kv_cache.dim()), key=lambda dim: -kv_cache.stride(dim))
        pages = kv_cache.permute(0, *order).flatten(1).view(torch.uint8)
        shape, count = self._mixers[0].shape, len(self._mixers)
        taps = self._mixers[0].conv_weight.shape[1] - 1
        heads = (shape.heads, shape.head_size, shape.state)
        sizes = [taps * count * shape.channels, count * math.prod(heads)]
        needed = 4 * sum(sizes)
        if pages.shape[1] < needed:
            raise UnsupportedError(
                f"the states of {count} `mamba` gates take {needed} bytes, and a block of the KV "
                f"cache has {pages.shape[1]} per layer: serve with a larger --block-size, or "
                "prepare with a smaller --gate-width or fewer exits"
            )
        conv, state = pages[:, :needed].view(torch.float32).split(sizes, 1)
        conv = conv.unflatten(1, (taps, count, shape.channels))
        state = state.unflatten(1, (count, *heads))
        for part in self._parts.values():
            part.bind(conv, state)

    def advance(self, first: int, count: int, mixed: Tensor, dt: Tensor) -> Tensor:
        """Take in the tokens of a batch, outside any graph; see `StatePart`."""
        return self._parts[first, count].advance(mixed, dt, current_step(self.layer_name))


class StatePart:
    """The states of `n` mixers of one shape, advanced together.

    Called with the tokens of a batch, `[T, n * C]` for the convolution and `[T, n * H]` time steps,
    it gives what the mixers say, `[T, n * H * P]`.

    Args:
        mixers: they.
        layer_name: of their pages.
        first: number of the first mixer there.
    """

    def __init__(self, mixers: Sequence[Mixer], layer_name: str, first: int) -> None:
        self._mixers, self._layer_name, self._first = list(mixers), layer_name, first
        self._count, self.shape = len(self._mixers), mixers[0].shape
        assert self.shape.groups == 1
        self.tensors: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))

    def bind(self, conv: Tensor, state: Tensor) -> None:
        """Find the states in the pages: `[pages, K - 1, M, C]` and `[pages, M, H, P, N]`."""
        own = slice(self._first, self._first + self._count)
        self.tensors = conv[:, :, own].flatten(2), state[:, own].flatten(1, 2)
        # The kernels want a channel's positions apart, as in vLLM's own layout.
        self._conv, self._state = self.tensors[0].transpose(1, 2), self.tensors[1]

    def __call__(self, mixed: Tensor, dt: Tensor) -> Tensor:
        inner = self._count * self.shape.inner
        name, first, count = self._layer_name, self._first, self._count
        return torch.ops.effplugin.gate_states(mixed, dt, name, first, count, inner)

    def advance(self, mixed: Tensor, dt: Tensor, step: Step | None) -> Tensor:
        """The same, outside any graph."""
        inner = self._count * self.shape.inner
        if step is None:
            return mixed.new_zeros(len(mixed), inner)
        output = None
        for wave in waves(step):
            for states in self.tensors:
                if wave.fresh is not None:
                    states.index_fill_(0, wave.fresh, 0.0)
                if wave.sources is not None and wave.targets is not None:
                    states.index_copy_(0, wave.targets, states[wave.sources])
            driven = (mixed, dt) if wave.tokens is None else (mixed[wave.tokens], dt[wave.tokens])
            take = self._take_one if wave.begins is None else self._take
            said = take(*driven, wave)
            if wave.tokens is None:
                return said
            if output is None:
                output = mixed.new_zeros(len(mixed), inner)
            output.index_copy_(0, wave.tokens, said)
        assert output is not None  # a batch has rows
        return output

    def _all(self, name: str) -> Tensor:
        """A parameter of all mixers, one behind the other."""
        return torch.cat([getattr(mixer, name).detach() for mixer in self._mixers])

    @cached_property
    def _kernel(self) -> tuple[Tensor, Tensor]:
        """Of the convolution."""
        return self._all("conv_weight"), self._all("conv_bias")

    @cached_property
    def _decay(self) -> Tensor:
        """`A`, `[n * H]`."""
        return -self._all("log_a").exp()

    @cached_property
    def _skip(self) -> Tensor:
        return self._all("D")

    @cached_property
    def _bias(self) -> Tensor:
        return self._all("dt_bias")

    @cached_property
    def _wide(self) -> tuple[Tensor, Tensor, Tensor]:
        """`A`, `D` and the bias of `dt` as the kernel for single tokens takes them."""
        size = self.shape.head_size
        return (
            self._decay[:, None, None].expand(-1, size, self.shape.state),
            self._skip[:, None].expand(-1, size),
            self._bias[:, None].expand(-1, size),
        )

    def _take_one(self, mixed: Tensor, dt: Tensor, wave: Wave) -> Tensor:
        """One token of each row. Runs for every decoded token: as few calls as can be."""
        shape, count = self.shape, self._count
        mixed = causal_conv1d_update_cpu_vec(
            mixed, self._conv, *self._kernel, "silu", wave.pages, None, NO_PAGE
        )
        rows, stride = mixed.shape[0], mixed.stride(0)
        heads = (rows, count * shape.heads, shape.head_size)
        begin = mixed.storage_offset()
        if count == 1:
            x = mixed.as_strided(heads, (stride, shape.head_size, 1), begin)
        else:  # the kernel knows one stride from head to head
            x = mixed.unflatten(1, (count, -1))[..., : shape.inner].reshape(heads)
        shared, apart = (rows, count, shape.state), (stride, shape.channels, 1)
        decay, skip, bias = self._wide
        output = torch.empty(heads)
        selective_state_update_cpu(
            self._state,
            x,
            dt.as_strided(heads, (dt.stride(0), 1, 0), dt.storage_offset()),
            decay,
            mixed.as_strided(shared, apart, begin + shape.inner),
            mixed.as_strided(shared, apart, begin + shape.inner + shape.state),
            skip,
            None,
            bias,
            True,
            wave.pages,
            wave.pages,
            NO_PAGE,
            output,
            None,
            None,
        )
        return output.view(rows, count * shape.inner)

    def _take(self, mixed: Tensor, dt: Tensor, wave: Wave) -> Tensor:
        """Several tokens of each row."""
        assert wave.begins is not None
        mixed = causal_conv1d_fn_cpu(
            mixed.T,
            *self._kernel,
            self._conv,
            wave.begins,
            cache_indices=wave.pages,
            has_initial_state=torch.ones(len(wave.pages), dtype=torch.bool),
            activation="silu",
        )
        of_mixers = mixed.T.unflatten(1, (self._count, -1))
        x, b, c = (part.flatten(1, 2).contiguous() for part in split_mixed(self.shape, of_mixers))
        output = torch.empty_like(x)
        dt = functional.softplus(dt + self._bias)
        states = self._state[wave.pages]
        mamba_chunk_scan_fwd_cpu(
            output, states, x, dt, self._decay, b, c, self._skip, None, wave.begins
        )
        self._state[wave.pages] = states
        return output.flatten(1)


def _gate_states(
    mixed: Tensor, dt: Tensor, layer_name: str, first: int, count: int, inner: int
) -> Tensor:
    pages = get_forward_context().no_compile_layers[layer_name]
    return pages.advance(first, count, mixed, dt)


_LIBRARY = torch.library.Library("effplugin", "FRAGMENT")
_LIBRARY.define(
    "gate_states(Tensor mixed, Tensor dt, str layer_name, int first, int count, int inner)"
    " -> Tensor"
)
_LIBRARY.impl("gate_states", _gate_states, "CPU")
torch.library.register_fake(
    "effplugin::gate_states",
    lambda mixed, dt, layer_name, first, count, inner: mixed.new_empty(mixed.shape[0], inner),
    lib=_LIBRARY,
)


def state_tensors(layer: Any) -> tuple[Tensor, ...]:
    """What a layer keeps of a request, one entry per page."""
    return layer.tensors if isinstance(layer, StatePart) else tuple(layer.kv_cache)
