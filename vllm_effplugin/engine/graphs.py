"""Inputs of compiled parts that are called from Python between others, for CUDA graphs.

vLLM captures the graphs of a compiled part's pieces for some numbers of tokens, and a replay reads
the memory that the capture read. The runner sees to that for what it calls itself. What runs behind
a boundary reads from here: persistent tensors, filled up to a number of tokens that was captured.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import (
    BatchDescriptor,
    get_forward_context,
    is_forward_context_available,
)

from vllm_effplugin.engine.batch import OtherBatch, running_on

NO_SLOT = -1
"""Cache slot of a token that is none: what kernels do not write."""


class GraphInputs:
    """Persistent `positions`, `hidden` and `residual`.

    Without captured graphs it hands everything back as it is. Which there will be may change until
    the engine is ready: vLLM turns them off where it finds that they are not supported. It also
    runs whole steps before it captures any, and a graph that is asked for then would be captured
    in the middle of a step; so none is asked for whose capture was not seen.

    Args:
        hidden_size, dtype: of the hidden states.

    Attributes:
        captured: numbers of tokens whose capture was seen.
    """

    def __init__(self, vllm_config: VllmConfig, hidden_size: int, dtype: torch.dtype) -> None:
        self._vllm_config = vllm_config
        self._hidden_size, self._dtype = hidden_size, dtype
        self._sizes: list[int] = []
        self.captured: set[int] = set()
        self._mode: CUDAGraphMode | None = None
        self._positions = self._hidden = self._residual = torch.empty(0)

    @property
    def sizes(self) -> list[int]:
        """Numbers of tokens for which there are to be graphs, ascending."""
        compilation = self._vllm_config.compilation_config
        if self._mode != compilation.cudagraph_mode:
            self._mode = compilation.cudagraph_mode
            captured = self._mode.has_mode(CUDAGraphMode.PIECEWISE)
            self._sizes = sorted(compilation.cudagraph_capture_sizes or ()) if captured else []
        return self._sizes

    def padded(self, tokens: int) -> int | None:
        """The number of tokens to run instead; None if no graph has as many."""
        place = bisect_left(self.sizes, tokens)
        return self.sizes[place] if place < len(self.sizes) else None

    def place(
        self, positions: Tensor, hidden: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The same values where graphs read them.

        Args:
            positions: `[T]`.
            hidden, residual: `[T, d]` or longer; what is behind `T` is left out.
        """
        count = len(positions)
        size = self.padded(count)
        if size is None:
            rest = None if residual is None else residual[:count]
            return positions, hidden[:count], rest
        if _replayed():
            self.captured.add(size)
        if not len(self._hidden):
            device, most = hidden.device, self.sizes[-1]
            self._positions = torch.zeros(most, dtype=positions.dtype, device=device)
            shape = (most, self._hidden_size)
            self._hidden = torch.zeros(shape, dtype=self._dtype, device=device)
            self._residual = torch.zeros_like(self._hidden)
        self._positions[:count] = positions
        self._hidden[:count] = hidden[:count]
        if residual is None:
            return self._positions[:size], self._hidden[:size], None
        self._residual[:count] = residual[:count]
        return self._positions[:size], self._hidden[:size], self._residual[:size]

    def placed(self, part: Callable[..., Any]) -> Callable[..., Any]:
        """The same compiled part, reading its inputs where CUDA graphs expect them."""

        def call(positions: Tensor, hidden: Tensor, residual: Tensor | None) -> Any:
            return part(*self.place(positions, hidden, residual))

        return call

    def context(self, slot_mapping: Tensor) -> dict[str, Any]:
        """What the forward context says of a batch other than the step's.

        vLLM compiles for as many tokens as a step may have. Those that waited come on top of them;
        such a batch runs uncompiled.

        Args:
            slot_mapping: cache slot of each token.
        """
        count = len(slot_mapping)
        endpoints = self._vllm_config.compilation_config.compile_ranges_endpoints
        if endpoints and count > endpoints[-1]:
            return {
                "slot_mapping": slot_mapping,
                "skip_compiled": True,
                "cudagraph_runtime_mode": CUDAGraphMode.NONE,
            }
        size = self.padded(count)
        if not self.sizes:
            return {"slot_mapping": slot_mapping}
        if size is None:
            return {"slot_mapping": slot_mapping, "cudagraph_runtime_mode": CUDAGraphMode.NONE}
        captured = size in self.captured
        return {
            "slot_mapping": torch.nn.functional.pad(slot_mapping, (0, size - count), value=NO_SLOT),
            "cudagraph_runtime_mode": CUDAGraphMode.PIECEWISE if captured else CUDAGraphMode.NONE,
            "batch_descriptor": BatchDescriptor(num_tokens=size),
        }


def _replayed() -> bool:
    """Whether compiled parts replay their graphs in what runs now, or have them captured."""
    if not is_forward_context_available():
        return False
    return get_forward_context().cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE


@dataclass
class Tokens:
    """The tokens of a batch, on the device.

    Attributes:
        slot_mapping, positions: per token.
        batch: that they are; None for the step's own.
        graphs: knows which CUDA graphs there are.
    """

    slot_mapping: Tensor
    positions: Tensor
    batch: OtherBatch | None = None
    graphs: GraphInputs | None = None

    def context(self) -> AbstractContextManager[None]:
        """Layers called in it run on these tokens."""
        if self.batch is None or self.graphs is None:
            return nullcontext()
        return running_on(self.batch, **self.graphs.context(self.slot_mapping))
