"""Recurrent states of an exit's gate, in pages of the model's own cache.

A gate with a state is one more layer in the cache group of the model's layers: it asks for the same
pages, and gets one for every block of a request. There it keeps its state behind the block's last
position so far; so full blocks can be shared, preempted requests lose it with their other entries,
and nothing has to be told which request a row belongs to. In a state-space model, where a request
has one page for all its positions, it is that page.

vLLM's own way, a Mamba group beside the attention group, would make blocks as large as states, and
keep none behind a shared prefix unless asked to.

Shapes: `T` tokens of the batch, `R` rows, `C` channels of the convolution, `K` positions that it
looks at, `H` heads of `P` channels, `N` coordinates of the state.
"""

from __future__ import annotations

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
    """The states of one gate: a layer as far as vLLM's cache goes.

    Args:
        mixer: what advances them.
        like: a layer of the model, whose pages these are like.
        layer_name: unique; it has one number in it.
    """

    def __init__(self, mixer: Mixer, like: Any, layer_name: str, vllm_config: VllmConfig) -> None:
        self._mixer, self._like, self.layer_name = mixer, like, layer_name
        layers = vllm_config.compilation_config.static_forward_context
        if layer_name in layers:
            raise ValueError(f"there are two layers {layer_name}")
        layers[layer_name] = self
        self.num_heads = like.num_heads  # a runner builds metadata apart where it differs
        shape = mixer.shape
        self._taps = mixer.conv_weight.shape[1] - 1
        self._sizes = [
            self._taps * shape.channels,
            shape.heads * shape.head_size * shape.state,
        ]
        self.pages = torch.empty(0)
        self._conv = self._state = torch.empty(0)

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
        needed = 4 * sum(self._sizes)
        if pages.shape[1] < needed:
            raise UnsupportedError(
                f"the state of a `mamba` gate takes {needed} bytes, and a block of the KV cache "
                f"has {pages.shape[1]} per layer: serve with a larger --block-size, or prepare "
                "with a smaller --gate-width"
            )
        shape = self._mixer.shape
        self.pages = pages[:, :needed].view(torch.float32)
        conv, state = self.pages.split(self._sizes, 1)
        # The kernels want a channel's positions apart, as in vLLM's own layout.
        self._conv = conv.unflatten(1, (self._taps, shape.channels)).transpose(1, 2)
        self._state = state.unflatten(1, (shape.heads, shape.head_size, shape.state))

    # --- States ----------------------------------------------------------------------------------

    def __call__(self, driven: Tensor) -> Tensor:
        """Take in the tokens of a batch: `[T, C + H]` -> what the mixer says, `[T, H * P]`."""
        return torch.ops.effplugin.gate_states(driven, self.layer_name, self._mixer.shape.inner)

    def advance(self, driven: Tensor) -> Tensor:
        """The same, outside any graph."""
        step = current_step(self.layer_name)
        if step is None:
            return driven.new_zeros(len(driven), self._mixer.shape.inner)
        output = None
        for wave in waves(step):
            if wave.fresh is not None:
                self.pages.index_fill_(0, wave.fresh, 0.0)
            if wave.sources is not None and wave.targets is not None:
                self.pages.index_copy_(0, wave.targets, self.pages[wave.sources])
            part = driven if wave.tokens is None else driven[wave.tokens]
            said = self._take_one(part, wave) if wave.begins is None else self._take(part, wave)
            if wave.tokens is None:
                return said
            if output is None:
                output = driven.new_zeros(len(driven), self._mixer.shape.inner)
            output.index_copy_(0, wave.tokens, said)
        assert output is not None  # a batch has rows
        return output

    @cached_property
    def _decay(self) -> Tensor:
        """`A`, `[H]`."""
        return -self._mixer.log_a.detach().exp()

    @cached_property
    def _wide(self) -> tuple[Tensor, Tensor, Tensor]:
        """`A`, `D` and the bias of `dt` as the kernel for single tokens takes them."""
        shape = self._mixer.shape
        return (
            self._decay[:, None, None].expand(-1, shape.head_size, shape.state),
            self._mixer.D.detach()[:, None].expand(-1, shape.head_size),
            self._mixer.dt_bias.detach()[:, None].expand(-1, shape.head_size),
        )

    def _take_one(self, driven: Tensor, wave: Wave) -> Tensor:
        """One token of each row. Runs for every decoded token: as few calls as can be."""
        mixer, shape = self._mixer, self._mixer.shape
        inner, channels = shape.inner, shape.channels
        mixed = causal_conv1d_update_cpu_vec(
            driven[:, :channels],
            self._conv,
            mixer.conv_weight,
            mixer.conv_bias,
            "silu",
            wave.pages,
            None,
            NO_PAGE,
        )
        rows, stride = len(mixed), mixed.stride(0)
        heads = (rows, shape.heads, shape.head_size)
        shared, apart = (rows, shape.groups, shape.state), (stride, shape.state, 1)
        begin = inner + mixed.storage_offset()
        decay, skip, bias = self._wide
        output = torch.empty(heads)
        selective_state_update_cpu(
            self._state,
            mixed.as_strided(heads, (stride, shape.head_size, 1), mixed.storage_offset()),
            driven.as_strided(heads, (driven.stride(0), 1, 0), driven.storage_offset() + channels),
            decay,
            mixed.as_strided(shared, apart, begin),
            mixed.as_strided(shared, apart, begin + shape.groups * shape.state),
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
        return output.view(rows, inner)

    def _take(self, driven: Tensor, wave: Wave) -> Tensor:
        """Several tokens of each row."""
        mixer, shape = self._mixer, self._mixer.shape
        mixed = causal_conv1d_fn_cpu(
            driven[:, : shape.channels].T,
            mixer.conv_weight,
            mixer.conv_bias,
            self._conv,
            wave.begins,
            cache_indices=wave.pages,
            has_initial_state=torch.ones(len(wave.pages), dtype=torch.bool),
            activation="silu",
        )
        x, b, c = split_mixed(shape, mixed.T.contiguous())
        output = torch.empty_like(x, memory_format=torch.contiguous_format)
        dt = functional.softplus(driven[:, shape.channels :] + mixer.dt_bias)
        states = self._state[wave.pages]
        mamba_chunk_scan_fwd_cpu(
            output, states, x, dt, self._decay, b, c, mixer.D, None, wave.begins
        )
        self._state[wave.pages] = states
        return output.flatten(1)


def _gate_states(driven: Tensor, layer_name: str, inner: int) -> Tensor:
    return get_forward_context().no_compile_layers[layer_name].advance(driven)


_LIBRARY = torch.library.Library("effplugin", "FRAGMENT")
_LIBRARY.define("gate_states(Tensor driven, str layer_name, int inner) -> Tensor")
_LIBRARY.impl("gate_states", _gate_states, "CPU")
torch.library.register_fake(
    "effplugin::gate_states",
    lambda driven, layer_name, inner: driven.new_empty(driven.shape[0], inner),
    lib=_LIBRARY,
)


def state_tensors(layer: Any) -> tuple[Tensor, ...]:
    """What a layer keeps of a request, one entry per page."""
    return (layer.pages,) if isinstance(layer, StatePages) else tuple(layer.kv_cache)
