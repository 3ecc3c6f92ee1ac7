"""Rows of a batch: what the runner scheduled, and running deeper layers on a part of it.

The attention metadata of a step is built before the model runs. To run layers on other rows than
the step's, their metadata is built again, by the backend's own builders, from a changed
`CommonAttentionMetadata`. vLLM's fast prefill does the same; nothing here depends on a backend.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from vllm.forward_context import get_forward_context, override_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    subclass_attention_backend,
)

_STEP = "effplugin_step"
"""Attribute of the attention metadata that holds what it was built from."""


@dataclass(frozen=True)
class Rows:
    """The requests of one step in the order of the batch, one entry each, on the host.

    Attributes:
        slots: index of the request among those that the runner holds; stable while it runs.
        starts: first position that the step computes.
        lengths: number of positions that it computes.
        decodes: whether that is one position behind the prompt, from which a token is sampled.
        completes: whether the step computes the last position of the prompt, or one behind it.
    """

    slots: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    decodes: np.ndarray
    completes: np.ndarray


class RowSource(Protocol):
    """A runner, as far as the model may know it."""

    def slots(self) -> np.ndarray | None:
        """Slots of the step's requests; the same array while these stay the same.

        None in a run of no requests.
        """
        ...

    def rows(self) -> Rows:
        """The rows of the step that is being run."""
        ...


@dataclass(frozen=True, eq=False)
class Step:
    """What a builder saw: the batch's common metadata, and itself."""

    common: CommonAttentionMetadata
    builder: AttentionMetadataBuilder


class OtherBatch:
    """What layers run on instead of the step's batch.

    Layers that differ in their heads, as groups of layers do, have builders of their own.

    Args:
        common: what all of them build their metadata from.
    """

    def __init__(self, common: CommonAttentionMetadata) -> None:
        self._common = common
        self._built: dict[AttentionMetadataBuilder, Any] = {}

    def metadata(self, builder: AttentionMetadataBuilder) -> Any:
        """Attention metadata for the layers of a builder."""
        if builder not in self._built:
            self._built[builder] = builder.build(0, self._common, fast_build=True)
        return self._built[builder]


@cache
def _remembering(backend: type[AttentionBackend]) -> type[AttentionBackend]:
    """A subclass of `backend` whose metadata remembers what it was built from."""
    base: Any = backend.get_builder_cls()

    class Builder(base):
        def build(
            self,
            common_prefix_len: int,
            common_attn_metadata: CommonAttentionMetadata,
            fast_build: bool = False,
            **kwargs: Any,
        ) -> Any:
            metadata = super().build(common_prefix_len, common_attn_metadata, fast_build, **kwargs)
            setattr(metadata, _STEP, Step(common_attn_metadata, self))
            return metadata

    Builder.__name__ = Builder.__qualname__ = f"Remembering{base.__name__}"
    return subclass_attention_backend("Remembering", backend, Builder)


def cached_part(layer: Any) -> Any:
    """The part of a decoder layer that vLLM keeps a cache for: its attention, or its mixer."""
    return layer.self_attn.attn if hasattr(layer, "self_attn") else layer.mixer


def cached_name(part: Any) -> str:
    """What vLLM calls such a part."""
    return part.prefix if isinstance(part, MambaBase) else part.layer_name


def remember_batches(part: Any) -> None:
    """Make the metadata of a layer's cached part carry its `Step`.

    Before the runner asks for backends. All layers of a model need it.
    """
    if isinstance(part, MambaBase):
        backend = _remembering(part.get_attn_backend())
        part.get_attn_backend = lambda: backend
    else:
        part.attn_backend = _remembering(part.attn_backend)


def current_step(layer_name: str) -> Step | None:
    """The step in whose forward pass this is called; None in profiling and warm-up runs."""
    metadata = get_forward_context().attn_metadata
    if not isinstance(metadata, dict) or layer_name not in metadata:
        return None
    return getattr(metadata[layer_name], _STEP)


# Fields of the common metadata with one entry per request, next to those that `subset` computes.
_PER_REQUEST = ("seq_lens", "block_table_tensor", "is_prefilling", "seq_lens_cpu_upper_bound")
_COMPUTED = (
    "query_start_loc",
    "query_start_loc_cpu",
    "num_reqs",
    "num_actual_tokens",
    "max_query_len",
    "max_seq_len",
    "slot_mapping",
    "positions",
    "req_idx",
    "_num_computed_tokens_cache",
    "_token_to_req_indices_cache",
)
_UNTOUCHED = ("causal",)
_FOREIGN = tuple(
    field.name
    for field in fields(CommonAttentionMetadata)
    if field.name not in (*_PER_REQUEST, *_COMPUTED, *_UNTOUCHED)
)


def subset(
    step: Step, rows: np.ndarray, lengths: np.ndarray, slot_mapping: Tensor, positions: Tensor
) -> OtherBatch:
    """Some of a step's rows, each with its own number of tokens.

    Args:
        step: the step's metadata.
        rows: indices of the rows to keep, increasing.
        lengths: tokens of each; they end at the row's last position.
        slot_mapping: cache slot of each token, row by row.
        positions: position of each token.
    """
    common = step.common
    for name in _FOREIGN:
        if getattr(common, name) is not None:
            raise RuntimeError(f"the attention metadata's `{name}` cannot be cut to some rows")
    device = common.seq_lens.device
    offsets_cpu = torch.zeros(len(rows) + 1, dtype=common.query_start_loc_cpu.dtype)
    np.cumsum(lengths, out=offsets_cpu.numpy()[1:])
    indices_cpu = torch.from_numpy(rows)
    indices = indices_cpu.to(device, non_blocking=True)
    changed: dict[str, Any] = {}
    for name in _PER_REQUEST:
        value = getattr(common, name)
        if value is not None:
            changed[name] = value[indices_cpu if value.device.type == "cpu" else indices]
    changed.update(
        query_start_loc=offsets_cpu.to(device, non_blocking=True),
        query_start_loc_cpu=offsets_cpu,
        num_reqs=len(rows),
        num_actual_tokens=int(offsets_cpu[-1]),
        max_query_len=int(lengths.max()),
        slot_mapping=slot_mapping,
        positions=positions if common.positions is not None else None,
        req_idx=common.req_idx[rows] if common.req_idx is not None else None,
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )
    return OtherBatch(common.replace(**changed))


def one_token_each(
    step: Step, rows: np.ndarray, positions: np.ndarray, slot_mapping: Tensor
) -> OtherBatch:
    """One further token of some of a step's rows, behind the step.

    Args:
        step: the step that has run.
        rows: indices of the rows, increasing.
        positions: of each row's token; everything before it is in the cache. The block that it
            lies in is one that the row has.
        slot_mapping: cache slot of each token.
    """
    common = step.common
    lengths = torch.from_numpy(positions + 1).to(common.seq_lens.dtype)
    at = torch.from_numpy(positions).to(common.seq_lens.device)
    indices = torch.from_numpy(rows)
    seq_lens = common.seq_lens.clone()
    seq_lens[indices.to(seq_lens.device)] = lengths.to(seq_lens.device)
    changed: dict[str, Any] = {"seq_lens": seq_lens, "max_seq_len": int(lengths.max())}
    for name in ("seq_lens_cpu_upper_bound", "is_prefilling"):
        value = getattr(common, name)
        if value is not None:
            value = value.clone()
            value[indices] = lengths.to(value.dtype) if name != "is_prefilling" else False
            changed[name] = value
    later = Step(common.replace(**changed), step.builder)
    return subset(later, rows, np.ones(len(rows), dtype=np.int64), slot_mapping, at)


def with_own_blocks(step: Step, blocks: int) -> OtherBatch:
    """The step's batch, but every row has blocks of its own: those of a dummy run have none.

    Kernels of recurrent states do nothing for a row without one.

    Args:
        blocks: of the cache, in all.
    """
    table = step.common.block_table_tensor
    own = 1 + torch.arange(table.numel(), device=table.device) % max(1, blocks - 1)
    return OtherBatch(step.common.replace(block_table_tensor=own.view_as(table).to(table.dtype)))


def ranges(lengths: np.ndarray) -> np.ndarray:
    """0, 1, ... for each length, one after another."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)


@contextmanager
def running_on(batch: OtherBatch, slot_mapping: Tensor, **changes: Any) -> Iterator[None]:
    """Run layers on another batch than the step's.

    Args:
        slot_mapping: cache slot of each token.
        changes: other fields of the forward context.
    """
    context = get_forward_context()
    metadata = {
        name: batch.metadata(getattr(before, _STEP).builder)
        for name, before in context.attn_metadata.items()
    }
    with override_forward_context(
        replace(
            context,
            attn_metadata=metadata,
            slot_mapping=dict.fromkeys(metadata, slot_mapping),
            **changes,
        )
    ):
        yield
