"""One step's way through the exits, on the host: who fires, who leaves, what joins.

Nothing here touches a tensor, so that a preparation can play a step through (`forecast.py`) by
the very rules that the engine follows (`step.py`).

A row is one request of the step; its tokens end at its last position. Arrays have one entry per
row of the step, or of the rows that still run (`batch`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from vllm_effplugin.techniques.early_exit.costs import Preference
from vllm_effplugin.techniques.early_exit.ledger import Ledger

Ints = np.ndarray
Mask = np.ndarray

STAYS = -1
"""Exit of a row whose gates have not fired."""


@dataclass(frozen=True)
class Batch:
    """The rows that still run.

    Attributes:
        rows: their indices among the step's rows, increasing.
        firsts: first position of each that runs; it lies before the step's own where waiting
            tokens were taken along.
        lengths: tokens of each.
        lasts: last position of each.
        ends: index behind each row's last token.
    """

    rows: Ints
    firsts: Ints
    lengths: Ints

    lasts: Ints = field(init=False)
    ends: Ints = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "lasts", self.firsts + self.lengths - 1)
        object.__setattr__(self, "ends", np.cumsum(self.lengths))

    @property
    def tokens(self) -> int:
        """Tokens that run."""
        return int(self.ends[-1])


class Wishes:
    """Where the rows of a step may leave.

    Args:
        thresholds: `[rows, exits]`, infinite where a row may not.

    Attributes:
        rows: whether each may anywhere.
        count: how many may.
        lowest: least threshold of any row, for each exit.
    """

    def __init__(self, thresholds: np.ndarray) -> None:
        self.thresholds = thresholds
        self._may_leave = thresholds < np.inf
        self._asked = [np.flatnonzero(column) for column in self._may_leave.T]
        self.lowest = thresholds.min(0, initial=np.inf).tolist()
        self.rows: Mask = np.any(self._may_leave, axis=1)
        self.count = int(np.count_nonzero(self.rows))

    def of(self, decodes: Mask) -> Wishes:
        """The same, but for rows that do not decode in a step."""
        if decodes.all():
            return self
        return Wishes(np.where(decodes[:, None], self.thresholds, np.inf))

    def still_asked(self, exit: int, fired: Ints, batch: Batch) -> Ints:
        """Indices in a batch of rows that may leave at an exit, and have not at one before.

        Args:
            fired: of all rows.
        """
        if len(batch.rows) < len(fired):
            may_leave = self._may_leave[batch.rows, exit] & (fired[batch.rows] == STAYS)
            return np.flatnonzero(may_leave)
        asked = self._asked[exit]
        return asked[fired[asked] == STAYS] if exit else asked


@dataclass(frozen=True)
class Departure:
    """What happens to a batch behind an exit.

    Attributes:
        leaves: rows of the batch that leave.
        joining: waiting tokens that each row of the batch that stays takes along.
        batch: what runs on: None if nothing does, the same object if nothing changes.
    """

    leaves: Mask
    joining: Ints
    batch: Batch | None


class Passage:
    """One step.

    Args:
        ledger: what the requests owe.
        preference: knows what leaving costs. Where it has no costs, rows leave wherever they may.
        owes: whether skipped layers run later (`recompute`).
        slots, starts, lengths: of the step's rows.
        watched: rows that run all layers in any case, to be compared with what their exit said.

    Attributes:
        scheduled: all rows, as the step began.
        batch: those that still run.
        tokens: of the step.
        fired: exit at which each row's gate fired, or `STAYS`.
        waits: whether tokens of its requests wait.
        may_leave: whether leaving is expected to pay.
    """

    def __init__(
        self,
        ledger: Ledger,
        preference: Preference,
        owes: bool,
        slots: Ints,
        starts: Ints,
        lengths: Ints,
        watched: Mask | None = None,
    ) -> None:
        self._ledger, self._costs, self._owes = ledger, preference.costs, owes
        self.slots = slots
        self.batch = self.scheduled = Batch(np.arange(len(slots)), starts, lengths)
        self.tokens = self.batch.tokens
        self.fired = np.full(len(slots), STAYS)
        self._watched = watched
        self.waits = owes and ledger.backlog > 0 and bool(ledger.has_pending(slots).any())
        # Where leaving does not pay, waiting tokens catch up at once, so that the next step can run
        # as one graph.
        self.may_leave = preference.segments(self.tokens)

    @cached_property
    def must_finish(self) -> Mask:
        """Rows that have to run all layers, whatever their gates say."""
        must = np.zeros(len(self.slots), dtype=bool)
        if self._owes:
            must = self._ledger.must_finish(self.slots, self.scheduled.lasts)
        return must if self._watched is None else must | self._watched

    def leavable(self, exits: int) -> list[int]:
        """Per exit, the rows that fired there and need not run on."""
        fired = self.fired[~self.must_finish]
        return np.bincount(fired - STAYS, minlength=exits + 1)[1:].tolist()

    def depart(self, exit: int) -> Departure:
        """Let rows leave behind an exit, if that pays, and waiting tokens join those that stay."""
        batch = self.batch
        slots = self.slots[batch.rows]
        joining = np.zeros_like(batch.firsts)
        if self.waits:
            joining = self._ledger.joining(slots, exit, batch.firsts)
        leaves = np.zeros(len(batch.rows), dtype=bool)
        if self.may_leave:
            leaves = (self.fired[batch.rows] != STAYS) & ~self.must_finish[batch.rows]
            if leaves.any() and not self._pays(exit, leaves, joining):
                leaves = np.zeros_like(leaves)
        if self._owes:
            self._ledger.leave(slots[leaves], exit, batch.firsts[leaves], batch.lasts[leaves])
        if leaves.all():
            return Departure(leaves, joining, None)
        if leaves.any() or joining.any():
            stays = ~leaves
            self.batch = Batch(
                batch.rows[stays], (batch.firsts - joining)[stays], (batch.lengths + joining)[stays]
            )
        return Departure(leaves, joining, self.batch)

    def _pays(self, exit: int, leaves: Mask, joining: Ints) -> bool:
        if self._costs is None:
            return True
        lengths = self.batch.lengths + joining
        total, staying = int(lengths.sum()), int(lengths[~leaves].sum())
        return self._costs.gain(exit, total, staying, int(leaves.sum())) > 0

    def finish(self) -> None:
        """The rows of the batch ran all layers."""
        if self.waits:
            self._ledger.settle(self.slots[self.batch.rows])
