"""One step of the stack with exits: what runs, on which tokens, and what becomes of their states.

`passage.py` decides; here are the tensors.

Shapes: `T` tokens of the batch, `d` hidden size. Arrays of the host have one entry per request of
the step ("row"), unless said otherwise; a row's tokens end at its last position.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vllm_effplugin.engine.batch import Rows, Step, ranges, subset
from vllm_effplugin.engine.graphs import Tokens
from vllm_effplugin.techniques.early_exit.exits import Tail, tail_of_segment, take_tail
from vllm_effplugin.techniques.early_exit.passage import STAYS, Batch, Departure, Passage, Wishes
from vllm_effplugin.techniques.early_exit.states import KeptStates

if TYPE_CHECKING:
    from vllm_effplugin.techniques.early_exit.loop import ExitLoop


class StepRun:
    """Runs one step.

    Args:
        loop: parts, state and settings.
        step: the step's attention metadata.
        rows: its requests.
        wishes: which of them may leave, and where.
        input_ids: `[T]`, None for a batch of embeddings.
        positions: `[T]`.
    """

    def __init__(
        self,
        loop: ExitLoop,
        step: Step,
        rows: Rows,
        wishes: Wishes,
        input_ids: Tensor | None,
        positions: Tensor,
    ) -> None:
        self._loop, self._step, self.rows = loop, step, rows
        self.wishes = wishes
        self._input_ids, self._positions = input_ids, positions
        self._tokens = step.common.num_actual_tokens
        self.in_parts = False
        self._watched = self._draw_watched() if loop.shadow else None
        self._at_the_end: list[Callable[[], None]] = []
        self._kept: KeptStates | None = None
        if self._watched is not None and loop.skipped is not None:
            watched = np.flatnonzero(self._watched)
            self._kept = loop.skipped.keep(step, watched, self._scheduled.lasts[watched])
        loop.counters.add("decoded", wishes.count)
        loop.counters.add("full_layer_tokens", self._tokens * loop.num_layers)

    @cached_property
    def passage(self) -> Passage:
        """Who goes how far. Made only for steps in which somebody may: most need none."""
        loop, rows = self._loop, self.rows
        return Passage(
            loop.ledger,
            loop.preference,
            not loop.approximates,
            rows.slots,
            rows.starts,
            rows.lengths,
            self._watched,
        )

    @property
    def _scheduled(self) -> Batch:
        return self.passage.scheduled

    @property
    def wants_segments(self) -> bool:
        """Whether to run segment by segment: somebody may leave, or has to take tokens along."""
        loop = self._loop
        waits = not loop.approximates and loop.ledger.backlog > 0
        if not (waits or loop.preference.segments(self._tokens)):
            return False
        return self.passage.waits or (self.passage.may_leave and self.wishes.count > 0)

    # --- The stack as one graph ------------------------------------------------------------------

    def as_one(self, inputs_embeds: Tensor | None) -> Tensor:
        """Run everything for every row. No token of theirs may be waiting."""
        loop = self._loop
        if loop.fills is not None:
            loop.fills.write(self.rows.slots)
        if not (self.wishes.count or loop.needs_exits):
            loop.counters.add("layer_tokens", self._tokens * loop.num_layers)
            return loop.plain(self._input_ids, self._positions, inputs_embeds)
        loop.counters.add("layer_tokens", self._tokens * loop.layers_to_end)
        output, *tensors = loop.whole(self._input_ids, self._positions, inputs_embeds)
        gates = np.zeros((0, 0))
        if any(loop.gated):
            logits, largest, *tensors = tensors
            if all(loop.gated) and self._nobody_fires(largest):
                self._end_fills()
                return output
            gates = logits.cpu().numpy()
        full = output.clone() if self._watched is not None else output
        confidences = iter(gates)
        for number, exit in enumerate(loop.exits):
            tail = take_tail(exit, tensors)
            self._fire(number, tail, next(confidences) if loop.gated[number] else None, output)
            batch, tokens = self.passage.batch, self._all_tokens()
            self._skip(number, batch, self._watched_at(number), tokens, tail, runs_on=True)
        self._compare(full, output)
        self._end_fills()
        return output

    def _nobody_fires(self, largest: Tensor) -> bool:
        """Whether no gate is as sure of any token as some row wishes: then none leaves.

        Without numpy, for which the host's caches are cold at this moment.

        Args:
            largest: `[E]` logits.
        """
        fires = any(map(operator.ge, largest.tolist(), self.wishes.lowest))
        return not self._loop.agreed(np.array([fires]))[0]

    def _all_tokens(self) -> Tokens:
        return Tokens(self._step.common.slot_mapping, self._positions)

    # --- In segments -----------------------------------------------------------------------------

    def in_segments(self, embedded: Tensor) -> Tensor:
        """Run segment by segment, each on the rows that are left."""
        loop, passage = self._loop, self.passage
        self.in_parts = True
        tokens = self._all_tokens()
        hidden, residual = embedded, None
        output = torch.empty_like(embedded)
        depth = 0
        for exit, segment in enumerate(loop.segments[:-1]):
            before = passage.batch
            with tokens.context():
                tensors = segment(tokens.positions, hidden, residual)
            tail = tail_of_segment(loop.exits[exit], tensors)
            hidden, residual = tail.hidden, tail.residual
            loop.counters.add("layer_tokens", before.tokens * (loop.layers_to_exit[exit] - depth))
            depth = loop.layers_to_exit[exit]
            confidence = None if tail.gate is None else tail.gate.cpu().numpy()
            self._fire(exit, tail, confidence, output)
            departure = passage.depart(exit)
            leaving = int(np.count_nonzero(departure.leaves))
            loop.counters.add("left", leaving)
            if leaving and loop.waiting.shape[1]:
                self._keep(before, departure, tokens, tail)
            self._skip(exit, before, departure.leaves, tokens, tail, runs_on=False)
            watched = self._watched_at(exit)[before.rows]
            self._skip(exit, before, watched, tokens, tail, runs_on=True)
            if departure.batch is None:
                break
            if loop.fills is not None:
                # A request that goes on may share a block which is full only now.
                loop.fills.keep_room(self.rows.slots)
                loop.fills.write(self.rows.slots[departure.batch.rows])
            if departure.batch is not before:
                tokens, hidden, residual = self._cut(before, departure, tokens, hidden, residual)
        else:
            with tokens.context():
                hidden = loop.segments[-1](tokens.positions, hidden, residual)
            loop.counters.add("layer_tokens", passage.batch.tokens * (loop.layers_to_end - depth))
            passage.finish()
            self._compare(hidden, output)
            output = self._collect(hidden, output)
        if loop.config.cache == "recompute":
            loop.counters.set("pending", loop.ledger.backlog)
        self._end_fills()
        return output

    def _keep(self, batch: Batch, departure: Departure, tokens: Tokens, tail: Tail) -> None:
        """Keep the states of the tokens that leave: what is behind the exit runs later."""
        leaves = departure.leaves
        lengths = batch.lengths[leaves]
        within = ranges(lengths)
        leaving = within + np.repeat((batch.ends - batch.lengths)[leaves], lengths)
        places = self._places(
            np.repeat(self.rows.slots[batch.rows[leaves]], lengths),
            np.repeat(batch.firsts[leaves], lengths) + within,
        )
        sources, targets = self._on_device(leaving), self._on_device(places)
        loop = self._loop
        assert tail.residual is not None  # a segment's
        loop.waiting[0].index_copy_(0, targets, tail.hidden[sources])
        loop.waiting[1].index_copy_(0, targets, tail.residual[sources])
        loop.waiting_slots.index_copy_(0, targets, tokens.slot_mapping[sources].long())

    def _skip(
        self,
        exit: int,
        batch: Batch,
        skipping: np.ndarray,
        tokens: Tokens,
        tail: Tail,
        *,
        runs_on: bool,
    ) -> None:
        """Leave approximate cache entries for rows whose tokens skip what is behind an exit.

        Where a row whose gate fired runs on, because leaving would not pay, its entries are exact.

        Args:
            skipping: rows of the batch.
            runs_on: whether they run all layers nevertheless, to be compared. That writes exact
                entries, which are overwritten when the step is over.
        """
        loop = self._loop
        if not loop.approximates or not skipping.any():
            return
        index = self._on_device(batch.ends[skipping] - 1)
        rows = batch.rows[skipping]
        positions, hidden = self._scheduled.lasts[rows], tail.at(index)
        duties: list[Callable[[], None]] = []
        if loop.fill is not None and loop.fills is not None:
            sources = loop.fill.sources(exit, hidden, index)
            slots, in_cache = self.rows.slots[rows], tokens.slot_mapping[index]
            duties.append(partial(loop.fills.add, slots, exit, sources, positions, in_cache))
        if loop.skipped is not None:
            if runs_on and self._kept is not None:
                back = partial(loop.skipped.put_back, exit, self._kept, self._step)
                duties.append(partial(back, rows, positions))
            duties.append(partial(loop.skipped.skip, exit, self._step, rows, positions, hidden))
        if runs_on:
            self._at_the_end += duties
            return
        for duty in duties:
            duty()

    def _end_fills(self) -> None:
        for duty in self._at_the_end:
            duty()
        if self._loop.fills is not None:
            self._loop.fills.keep_room(self.rows.slots)

    def _places(self, slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
        room = self._loop.config.max_pending
        return slots * room + positions % room

    def _cut(
        self,
        batch: Batch,
        departure: Departure,
        tokens: Tokens,
        hidden: Tensor,
        residual: Tensor,
    ) -> tuple[Tokens, Tensor, Tensor]:
        """The tokens of the rows that stay, with the waiting ones that they take along."""
        after = departure.batch
        assert after is not None
        stays = ~departure.leaves
        lengths = after.lengths
        joining = np.repeat(departure.joining[stays], lengths)
        within = ranges(lengths)
        joins = within < joining
        old_ends = np.repeat(batch.ends[stays], lengths)
        back = np.repeat(lengths, lengths) - 1 - within  # distance to the row's last token
        sources = self._on_device(np.where(joins, old_ends - 1, old_ends - 1 - back))
        positions = tokens.positions[sources] - self._on_device(np.where(joins, back, 0))
        slot_mapping = tokens.slot_mapping[sources]
        hidden, residual = hidden[sources], residual[sources]
        if joins.any():
            self._loop.counters.add("recomputed", int(joins.sum()))
            targets = self._on_device(np.flatnonzero(joins))
            slots = np.repeat(self.rows.slots[after.rows], lengths)
            absolute = np.repeat(after.lasts, lengths) - back
            places = self._on_device(self._places(slots, absolute)[joins])
            in_cache = self._loop.waiting_slots[places].to(slot_mapping.dtype)
            slot_mapping.index_copy_(0, targets, in_cache)
            hidden.index_copy_(0, targets, self._loop.waiting[0][places])
            residual.index_copy_(0, targets, self._loop.waiting[1][places])
        other = subset(self._step, after.rows, lengths, slot_mapping, positions)
        tokens = Tokens(slot_mapping, positions, other, self._loop.graph_inputs)
        return tokens, hidden, residual

    def _collect(self, hidden: Tensor, output: Tensor) -> Tensor:
        """Put what ran to the end where the runner looks for it; fired rows have their output."""
        batch = self.passage.batch
        fired = self.passage.fired[batch.rows] != STAYS
        if batch is self._scheduled and not fired.any():
            return hidden[: len(output)]
        rows, ends = batch.rows, batch.ends
        if fired.any():
            rows, ends = rows[~fired], ends[~fired]
        lengths = self.rows.lengths[rows]
        sources, targets = ends - 1, self._scheduled.ends[rows] - 1
        if len(rows) != lengths.sum():
            back = np.repeat(lengths, lengths) - 1 - ranges(lengths)
            sources = np.repeat(sources, lengths) - back
            targets = np.repeat(targets, lengths) - back
        return output.index_copy_(0, self._on_device(targets), hidden[self._on_device(sources)])

    # --- Shadow mode -----------------------------------------------------------------------------

    def _draw_watched(self) -> np.ndarray:
        """Which rows run all layers whatever their gates say."""
        lasts = self.rows.starts + self.rows.lengths - 1
        drawn = pseudo_random(-1, lasts, self.rows.slots) < self._loop.shadow
        return drawn & self.wishes.rows

    def _watched_at(self, exit: int) -> np.ndarray:
        """Rows that would leave at an exit, and run on only to be compared."""
        if self._watched is None:
            return np.zeros(len(self.rows.slots), dtype=bool)
        return self._watched & (self.passage.fired == exit)

    def _compare(self, full: Tensor, output: Tensor) -> None:
        """Count how often exits agree with the full model, over the rows watched.

        Args:
            full: `[T, d]` final hidden states of the batch's tokens.
            output: what the runner will see.
        """
        if self._watched is None:
            return
        loop, batch = self._loop, self.passage.batch
        shown = self._watched[batch.rows] & (self.passage.fired[batch.rows] != STAYS)
        if not shown.any():
            return
        ours = self._on_device(self._scheduled.ends[batch.rows[shown]] - 1)
        theirs = self._on_device(batch.ends[shown] - 1)
        logits = loop.compute_logits(torch.cat([output[ours], full[theirs]]))
        if logits is None:  # only the first rank has them, and only it counts
            return
        exit, oracle = logits.argmax(-1).chunk(2)
        loop.counters.add("shadowed", len(exit))
        loop.counters.add("shadow_agreed", int((exit == oracle).sum()))

    # --- Gates -----------------------------------------------------------------------------------

    def _fire(self, exit: int, tail: Tail, confidence: np.ndarray | None, output: Tensor) -> None:
        """Ask an exit's gate about the rows that may leave; write what those give that do.

        Args:
            confidence: `[T]`, where a trained gate gave it.
            output: where the runner looks for final hidden states.
        """
        loop, batch, fired = self._loop, self.passage.batch, self.passage.fired
        asked = self.wishes.still_asked(exit, fired, batch)
        if not len(asked):
            return
        rows, lasts = batch.rows[asked], batch.ends[asked] - 1
        scores = confidence[lasts] if confidence is not None else None
        if scores is None:
            scores = self._score(exit, rows, lasts, tail)
        fires = np.flatnonzero(loop.agreed(scores >= self.wishes.thresholds[rows, exit]))
        if not len(fires):
            return
        rows = rows[fires]
        fired[rows] = exit
        loop.counters.add("exits", len(rows), exit)
        index = targets = self._on_device(lasts[fires])
        if batch is not self._scheduled:
            targets = self._on_device(self._scheduled.ends[rows] - 1)
        output.index_copy_(0, targets, loop.finished(exit, tail, index))

    def _score(self, exit: int, rows: np.ndarray, lasts: np.ndarray, tail: Tail) -> np.ndarray:
        """What a gate without trained parts says about rows whose last tokens are `lasts`."""
        loop = self._loop
        if loop.exits[exit].point.gate == "softmax":
            own = loop.compute_logits(loop.finished(exit, tail, self._on_device(lasts)))
            if own is None:  # only the first rank has the logits, and only its decision counts
                return np.zeros(len(lasts))
            return own.float().softmax(-1).amax(-1).cpu().numpy()
        ids = np.zeros(len(rows), dtype=np.int64)
        if self._input_ids is not None:
            ids = self._input_ids.cpu().numpy()[self._scheduled.ends[rows] - 1]
        return pseudo_random(exit, self._scheduled.lasts[rows], ids)

    def _on_device(self, indices: np.ndarray) -> Tensor:
        return torch.from_numpy(indices).to(self._positions.device, non_blocking=True)


def pseudo_random(exit: int, positions: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Numbers in `[0, 1)` that a token's position and id decide: the `rate` gate."""
    mixed = positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= (ids.astype(np.uint64) + np.uint64(exit + 1)) * np.uint64(0xC2B2AE3D27D4EB4F)
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    return (mixed >> np.uint64(40)).astype(np.float64) / 2**24
