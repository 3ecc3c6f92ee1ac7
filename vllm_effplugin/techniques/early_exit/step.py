"""One step of the stack with exits: who fires, who leaves, what runs.

Shapes: `T` tokens of the batch, `d` hidden size. Arrays of the host have one entry per request of
the step ("row"), unless said otherwise; a row's tokens end at its last position.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vllm_effplugin.engine.batch import Rows, Step, running_on, subset

if TYPE_CHECKING:
    from vllm_effplugin.techniques.early_exit.loop import ExitLoop

STAYS = -1
"""Exit of a row whose gates have not fired."""


@dataclass
class Counters:
    """Running totals of one worker since its start.

    Attributes:
        decoded: decoded tokens that might have left.
        exits: tokens whose gate fired, per exit.
        left: tokens that left the batch.
        recomputed: waiting tokens taken along, once per exit that they pass.
        layer_tokens: layers run times tokens, prompts included.
        full_layer_tokens: what it would have been without exits.
    """

    exits: list[int] = field(default_factory=list)
    decoded: int = 0
    left: int = 0
    recomputed: int = 0
    layer_tokens: int = 0
    full_layer_tokens: int = 0


@dataclass
class _Batch:
    """The rows that still run.

    Attributes:
        rows: their indices among the step's rows, increasing.
        firsts: first position of each that runs; it lies before the step's own where waiting
            tokens were taken along.
        slot_mapping, positions: per token.
        metadata: attention metadata; None for the step's own.
    """

    rows: np.ndarray
    firsts: np.ndarray
    lasts: np.ndarray
    slot_mapping: Tensor
    positions: Tensor
    metadata: Any = None

    def __post_init__(self) -> None:
        self.lengths = self.lasts - self.firsts + 1
        self.ends = np.cumsum(self.lengths)

    @property
    def tokens(self) -> int:
        return int(self.ends[-1])

    def context(self) -> AbstractContextManager[None]:
        """Layers called in it run on these rows."""
        if self.metadata is None:
            return nullcontext()
        return running_on(self.metadata, self.slot_mapping)


class StepRun:
    """Runs one step.

    Args:
        loop: parts, state and settings.
        step: the step's attention metadata.
        rows: its requests.
        thresholds: `[rows, exits]`, infinite where a row may not leave.
        input_ids: `[T]`, None for a batch of embeddings.
        positions: `[T]`.
    """

    def __init__(
        self,
        loop: ExitLoop,
        step: Step,
        rows: Rows,
        thresholds: np.ndarray,
        input_ids: Tensor | None,
        positions: Tensor,
    ) -> None:
        self._loop, self._step, self.rows = loop, step, rows
        self._thresholds = thresholds
        self._input_ids, self._positions = input_ids, positions
        self._lasts = rows.starts + rows.lengths - 1
        self._ends = np.cumsum(rows.lengths)
        self.num_tokens = int(self._ends[-1])
        self.fired = np.full(len(rows.slots), STAYS)
        self._owes = loop.config.cache == "recompute"
        ledger = loop.ledger
        self.waiting = ledger.has_pending(rows.slots, rows.starts)
        self._must_finish = (
            ledger.must_finish(rows.slots, self._lasts)
            if self._owes
            else np.zeros(len(rows.slots), dtype=bool)
        )
        counters = loop.counters
        counters.decoded += int((thresholds < np.inf).any(1).sum())
        counters.full_layer_tokens += self.num_tokens * loop.num_layers

    @property
    def leavable(self) -> list[int]:
        """Per exit, the rows that fired there and need not run on."""
        fired = self.fired[~self._must_finish]
        return [int((fired == exit).sum()) for exit in range(len(self._loop.exits))]

    # --- The stack as one graph ------------------------------------------------------------------

    def as_one(self, inputs_embeds: Tensor | None) -> Tensor:
        """Run everything for every row. No token of theirs may be waiting."""
        loop = self._loop
        output, *tails = loop.whole(self._input_ids, self._positions, inputs_embeds)
        loop.counters.layer_tokens += self.num_tokens * loop.num_layers
        loop.ledger.passed(self.rows.slots, len(loop.exits), self._lasts)
        batch = self._scheduled()
        for exit, module in enumerate(loop.exits):
            size = 2 if module.gate is None else 3
            tail, tails = tails[:size], tails[size:]
            self._fire(exit, batch, tail, output)
        if loop.fill is not None:
            loop.fill.write()
        return output

    def _scheduled(self) -> _Batch:
        return _Batch(
            rows=np.arange(len(self.rows.slots)),
            firsts=self.rows.starts,
            lasts=self._lasts,
            slot_mapping=self._step.common.slot_mapping,
            positions=self._positions,
        )

    # --- In segments -----------------------------------------------------------------------------

    def in_segments(self, embedded: Tensor) -> Tensor:
        """Run segment by segment, each on the rows that are left."""
        loop = self._loop
        batch = self._scheduled()
        hidden, residual = embedded, None
        output = torch.empty_like(embedded)
        depth = 0
        for exit, segment in enumerate(loop.segments[:-1]):
            with batch.context():
                hidden, residual, *logits = segment(batch.positions, hidden, residual)
            loop.counters.layer_tokens += batch.tokens * (loop.exits[exit].point.depth - depth)
            depth = loop.exits[exit].point.depth
            self._fire(exit, batch, [hidden, residual, *logits], output)
            leaves = self._leaves(exit, batch)
            self._settle(exit, batch, leaves, hidden, residual)
            cut = self._cut(exit, batch, ~leaves, hidden, residual)
            if cut is None:
                break
            batch, hidden, residual = cut
        else:
            with batch.context():
                hidden = loop.segments[-1](batch.positions, hidden, residual)
            loop.counters.layer_tokens += batch.tokens * (loop.num_layers - depth)
            loop.ledger.passed(
                self.rows.slots[batch.rows], len(loop.exits), self._lasts[batch.rows]
            )
            output = self._collect(batch, hidden, output)
        if loop.fill is not None:
            loop.fill.write()
        return output

    def _leaves(self, exit: int, batch: _Batch) -> np.ndarray:
        """Rows of the batch that leave it behind an exit: all that may, or none."""
        may = (self.fired[batch.rows] != STAYS) & ~self._must_finish[batch.rows]
        leaving = int(may.sum())
        costs = self._loop.costs
        if leaving and costs is not None:
            joining = self._joining(exit, batch)
            tokens = batch.tokens + int(joining.sum())
            staying = int((batch.lengths + joining)[~may].sum())
            if costs.gain(exit, tokens, staying, leaving) <= 0:
                return np.zeros_like(may)
        return may

    def _joining(self, exit: int, batch: _Batch) -> np.ndarray:
        """Waiting tokens that each row of the batch takes along behind an exit."""
        if not self._owes:
            return np.zeros_like(batch.firsts)
        return batch.firsts - self._loop.ledger.owed[self.rows.slots[batch.rows], exit]

    def _settle(
        self, exit: int, batch: _Batch, leaves: np.ndarray, hidden: Tensor, residual: Tensor
    ) -> None:
        """Keep what the tokens that leave owe."""
        loop = self._loop
        slots, lasts = self.rows.slots[batch.rows[leaves]], batch.lasts[leaves]
        loop.counters.left += len(slots)
        if not self._owes:
            loop.ledger.passed(slots, len(loop.exits), lasts)
            return
        loop.ledger.passed(slots, exit, lasts)
        lengths = batch.lengths[leaves]
        if len(lengths):
            within = _ranges(lengths)
            tokens = within + np.repeat((batch.ends - batch.lengths)[leaves], lengths)
            places = self._places(
                np.repeat(slots, lengths), np.repeat(batch.firsts[leaves], lengths) + within
            )
            tokens, places = self._on_device(tokens), self._on_device(places)
            loop.waiting[0].index_copy_(0, places, hidden[tokens])
            loop.waiting[1].index_copy_(0, places, residual[tokens])

    def _places(self, slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
        room = self._loop.config.max_pending
        return slots * room + positions % room

    def _cut(
        self, exit: int, batch: _Batch, stays: np.ndarray, hidden: Tensor, residual: Tensor
    ) -> tuple[_Batch, Tensor, Tensor] | None:
        """The rows that stay, with the waiting tokens that they take along; None if none stays."""
        joining = self._joining(exit, batch)[stays]
        if stays.all() and not joining.any():
            return batch, hidden, residual
        if not stays.any():
            return None
        rows, kept = batch.rows[stays], batch.lengths[stays]
        lasts = batch.lasts[stays]
        lengths = kept + joining
        within = _ranges(lengths)
        joins = within < np.repeat(joining, lengths)
        old_ends = np.repeat(batch.ends[stays], lengths)
        back = np.repeat(lengths, lengths) - 1 - within  # distance to the row's last token
        # A joining token lies in the block of its row's last one: their slots are neighbours.
        sources = self._on_device(np.where(joins, old_ends - 1, old_ends - 1 - back))
        shift = self._on_device(np.where(joins, back, 0))
        positions = batch.positions[sources] - shift
        slot_mapping = batch.slot_mapping[sources] - shift
        new_hidden, new_residual = hidden[sources], residual[sources]
        if joining.any():
            self._loop.counters.recomputed += int(joining.sum())
            targets = self._on_device(np.flatnonzero(joins))
            slots = np.repeat(self.rows.slots[rows], lengths)
            absolute = np.repeat(lasts, lengths) - back
            places = self._on_device(self._places(slots, absolute)[joins])
            new_hidden.index_copy_(0, targets, self._loop.waiting[0][places])
            new_residual.index_copy_(0, targets, self._loop.waiting[1][places])
        cut = _Batch(
            rows=rows,
            firsts=lasts - lengths + 1,
            lasts=lasts,
            slot_mapping=slot_mapping,
            positions=positions,
            metadata=subset(self._step, rows, lengths, slot_mapping, positions),
        )
        return cut, new_hidden, new_residual

    def _collect(self, batch: _Batch, hidden: Tensor, output: Tensor) -> Tensor:
        """Put what ran to the end where the runner looks for it; fired rows have their output."""
        stays = self.fired[batch.rows] == STAYS
        rows = batch.rows[stays]
        lengths = self.rows.lengths[rows]
        back = np.repeat(lengths, lengths) - 1 - _ranges(lengths)
        sources = np.repeat(batch.ends[stays], lengths) - 1 - back
        targets = np.repeat(self._ends[rows], lengths) - 1 - back
        return output.index_copy_(0, self._on_device(targets), hidden[self._on_device(sources)])

    # --- Gates -----------------------------------------------------------------------------------

    def _fire(self, exit: int, batch: _Batch, tail: list[Tensor], output: Tensor) -> None:
        """Ask an exit's gate about the rows that may leave; write what those give that do.

        Args:
            tail: hidden state and residual `[T, d]`, and the gate's logits `[T]` if it is trained.
            output: where the runner looks for final hidden states.
        """
        loop = self._loop
        thresholds = self._thresholds[batch.rows, exit]
        asked = np.flatnonzero((thresholds < np.inf) & (self.fired[batch.rows] == STAYS))
        if not len(asked):
            return
        hidden, residual, *logits = tail
        tokens = batch.ends[asked] - 1
        confidence = self._confidence(exit, batch, tokens, hidden, residual, logits)
        fires = loop.agreed(confidence >= thresholds[asked])
        if not fires.any():
            return
        rows = batch.rows[asked[fires]]
        self.fired[rows] = exit
        loop.counters.exits[exit] += len(rows)
        index = self._on_device(tokens[fires])
        exits_from = hidden[index] + residual[index]
        targets = self._on_device(self._ends[rows] - 1)
        output.index_copy_(0, targets, loop.finish(exit, exits_from))
        if loop.fill is not None:
            loop.fill.add(
                exit, exits_from, index, batch.positions[index], batch.slot_mapping[index]
            )

    def _confidence(
        self,
        exit: int,
        batch: _Batch,
        tokens: np.ndarray,
        hidden: Tensor,
        residual: Tensor,
        logits: list[Tensor],
    ) -> np.ndarray:
        """What the gate says about some tokens of the batch."""
        loop = self._loop
        if logits:
            return logits[0][self._on_device(tokens)].cpu().numpy()
        if loop.exits[exit].point.gate == "softmax":
            index = self._on_device(tokens)
            own = loop.compute_logits(loop.finish(exit, hidden[index] + residual[index]))
            if own is None:  # only the first rank has the logits, and only its decision counts
                return np.zeros(len(tokens))
            return own.float().softmax(-1).amax(-1).cpu().numpy()
        rows = batch.rows[np.searchsorted(batch.ends, tokens, side="right")]
        ids = np.zeros(len(rows), dtype=np.int64)
        if self._input_ids is not None:
            ids = self._input_ids[self._on_device(self._ends[rows] - 1)].cpu().numpy()
        return pseudo_random(exit, self._lasts[rows], ids)

    def _on_device(self, indices: np.ndarray) -> Tensor:
        return torch.from_numpy(indices).to(self._positions.device, non_blocking=True)


def pseudo_random(exit: int, positions: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Numbers in `[0, 1)` that a token's position and id decide: the `rate` gate."""
    mixed = positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= (ids.astype(np.uint64) + np.uint64(exit + 1)) * np.uint64(0xC2B2AE3D27D4EB4F)
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    return (mixed >> np.uint64(40)).astype(np.float64) / 2**24


def _ranges(lengths: np.ndarray) -> np.ndarray:
    """0, 1, ... for each length, one after another."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)
