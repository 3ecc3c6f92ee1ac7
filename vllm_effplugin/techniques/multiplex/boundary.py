"""The boundary of a classifier's stack at which sequences merge.

Shapes: `R` sequences of the step ("rows"), `N` sequences of a composite, `G` composites, `d`
hidden size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from vllm_effplugin.techniques.multiplex.config import MultiplexConfig
from vllm_effplugin.techniques.multiplex.grouping import Batch, form_groups
from vllm_effplugin.techniques.multiplex.layers import Multiplexer
from vllm_effplugin.techniques.multiplex.request import engine_request

if TYPE_CHECKING:
    from vllm_effplugin.engine.batch import Rows
    from vllm_effplugin.engine.counters import Counters
    from vllm_effplugin.engine.sequences import Passage


class MergeBoundary:
    """Merges the sequences that reach it, and takes apart what comes out at the end.

    Args:
        config: sizes of groups, and who merges with whom.
        slots: requests that the runner may hold.

    Attributes:
        sizes: those that are formed; all by default.
    """

    multiplexers: nn.ModuleDict

    def __init__(self, config: MultiplexConfig, slots: int) -> None:
        self.config = config
        self.sizes = config.sizes
        self._tenant: list[str | None] = [None] * slots

    def admit(self, slot: int, extra: Mapping[str, Any] | None) -> None:
        """A request takes a slot.

        Args:
            extra: arguments of its own.
        """
        self._tenant[slot] = engine_request(extra).tenant(self.config)

    def may_merge(self, rows: Rows) -> bool:
        """Whether a step has sequences enough for a group."""
        tenants = Counter(tenant for tenant in self._tenants(rows) if tenant is not None)
        return max(tenants.values(), default=0) >= self.sizes[0]

    def groups(self, rows: Rows, alive: np.ndarray) -> list[tuple[int, ...]]:
        """Which of the rows that are left run as one: tuples of indices into `alive`."""
        tenants = self._tenants(rows)
        return form_groups(
            rows.lengths[alive].tolist(), [tenants[row] for row in alive], self.sizes
        )

    def _tenants(self, rows: Rows) -> list[str | None]:
        """`[R]`; None for prompts that are not in the step whole."""
        whole = (rows.starts == 0) & rows.completes
        return [
            self._tenant[slot] if merges else None
            for slot, merges in zip(rows.slots.tolist(), whole.tolist(), strict=True)
        ]

    def merge(self, passage: Passage, batch: Batch, counters: Counters) -> None:
        """Go on with composites, and with the sequences that run alone."""
        hidden, residual = passage.hidden, passage.residual
        states = hidden if residual is None else hidden + residual
        sources = passage.on_device(batch.sources)
        new_hidden = hidden.new_zeros(len(batch.sources), hidden.shape[1])
        new_residual = None if residual is None else torch.zeros_like(new_hidden)
        targets = passage.on_device(batch.single_targets)
        new_hidden[targets] = hidden[sources[targets]]
        if residual is not None and new_residual is not None:
            new_residual[targets] = residual[sources[targets]]
        for size, part in batch.merged.items():
            members = passage.on_device(part.members)
            present = members >= 0
            found = states[members.clamp_min(0)].masked_fill_(~present[..., None], 0)
            merged = self.multiplexer(size).merge(found, present)
            new_hidden[passage.on_device(part.targets)] = merged
            counters.add("member_tokens", int((part.members >= 0).sum()))
            counters.add("slot_tokens", part.members.size)
        rows = passage.alive[batch.rows]
        passage.become(rows, batch.lengths, sources, new_hidden, new_residual)

    def answers(self, size: int, outputs: Tensor) -> Tensor:
        """What the full model's head reads of each member, `[G, N, d]`.

        Args:
            size: `N`.
            outputs: `[G, N, d]` of the last layer, where each member is read.
        """
        return self.multiplexer(size).answers(outputs)

    def multiplexer(self, size: int) -> Multiplexer:
        """Of so many sequences."""
        found = self.multiplexers[str(size)]
        assert isinstance(found, Multiplexer)
        return found
