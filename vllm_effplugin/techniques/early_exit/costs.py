"""What layers cost, and whether it pays to run them on fewer tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SMOOTHING = 0.04
"""Weight of the last step in the running mean of what leaving saves: one step in which all rows
leave by chance must not make the next ones run in segments."""

MARGIN = 0.03
"""Share of a step that leaving has to save before the stack runs in segments."""


class Column:
    """Seconds that one part of the stack takes, at any number of tokens.

    Linear between and beyond the measured sizes; no tokens take no time.

    Args:
        sizes: numbers of tokens, increasing, at least two.
        seconds: the time at each.
    """

    def __init__(self, sizes: Sequence[int], seconds: Sequence[float]) -> None:
        self.sizes, self.seconds = tuple(sizes), tuple(seconds)
        self.slope = max(0.0, (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2]))
        known = np.interp(np.arange(sizes[-1] + 1), sizes, seconds)
        known[0] = 0.0
        self._known: list[float] = known.tolist()

    def at(self, tokens: int) -> float:
        """The time for a number of tokens."""
        if tokens < len(self._known):
            return self._known[tokens]
        return self._known[-1] + (tokens - len(self._known) + 1) * self.slope

    def __add__(self, other: Column) -> Column:
        return Column(self.sizes, [a + b for a, b in zip(self.seconds, other.seconds, strict=True)])


class Costs:
    """Times of the whole stack and of its segments, and what follows from them.

    Args:
        whole: the stack as one graph.
        segments: the segments, one more than there are exits.
        overhead: seconds to cut a batch to some of its rows.
        fill: what the cache entries of rows cost that leave, per exit; None where the skipped
            layers run later instead (`recompute`). Then a row that leaves costs what one more
            token costs in a large batch.
        max_pending: tokens of a request whose entries may wait, to be written together.
    """

    def __init__(
        self,
        whole: Column,
        segments: Sequence[Column],
        overhead: float,
        fill: Sequence[Column] | None,
        max_pending: int,
    ) -> None:
        self.whole, self.segments = whole, tuple(segments)
        self._max_pending = max_pending
        self.overhead, self.fill = overhead, fill
        behind = segments[-1]
        self.behind = [behind]
        for segment in segments[-2:0:-1]:
            behind = segment + behind
            self.behind.insert(0, behind)

    def gain(self, exit: int, tokens: int, staying: int, leaving: int) -> float:
        """Seconds saved by cutting a batch behind an exit.

        Args:
            exit: index of the exit.
            tokens: tokens of the batch if nothing leaves.
            staying: tokens of the batch that is cut.
            leaving: rows that leave.
        """
        column = self.behind[exit]
        saved = column.at(tokens) - column.at(staying)
        return saved - self.owed(exit, staying, leaving) - (self.overhead if staying else 0.0)

    def owed(self, exit: int, staying: int, leaving: int) -> float:
        """Seconds that rows cost because they left, whenever these are spent.

        Where some stay, their next steps read what others of their tokens owe, so entries are
        written about as often as they are made; where none does, as seldom as may be.
        """
        if self.fill is None:
            return leaving * self.behind[exit].slope
        if staying:
            return self.fill[exit].at(leaving)
        return self.fill[exit].at(leaving * self._max_pending) / self._max_pending

    def saved(self, tokens: int, may_leave: Sequence[int]) -> float:
        """Share of a step's time that exits save, negative where segments cost more than that.

        Args:
            tokens: tokens of the step.
            may_leave: for each exit, rows whose gate fired there and that need not stay.
        """
        spent = self.segments[0].at(tokens)
        remaining, ready = tokens, 0
        for exit, fired in enumerate(may_leave):
            ready += fired
            if ready and self.gain(exit, remaining, remaining - ready, ready) > 0:
                remaining -= ready
                spent += self.owed(exit, remaining, ready) + (self.overhead if remaining else 0.0)
                ready = 0
            spent += self.segments[exit + 1].at(remaining)
        # Where segments were measured to be faster even if nobody leaves, that is noise.
        segments = sum(segment.at(tokens) for segment in self.segments)
        return 1 - spent / min(self.whole.at(tokens), segments)


class Preference:
    """Whether the stack should run in segments, from what leaving saved in the last steps.

    Remembered apart for steps of different sizes (powers of two), because what pays for one request
    does not for many, and their number changes faster than a mean follows.

    Args:
        costs: of the machine; None prefers segments always.
    """

    def __init__(self, costs: Costs | None) -> None:
        self._costs = costs
        self._saved: dict[int, float] = {}

    def segments(self, tokens: int) -> bool:
        """Whether segments are expected to save a clear share of a step of some tokens."""
        return self._costs is None or self._saved.get(tokens.bit_length(), 0.0) > MARGIN

    def learn(self, tokens: int, may_leave: Sequence[int]) -> None:
        """A step of some tokens is over, of which these rows left or might have, per exit."""
        if self._costs is not None:
            size = tokens.bit_length()
            before = self._saved.get(size, 0.0)
            saved = self._costs.saved(tokens, may_leave)
            self._saved[size] = before + SMOOTHING * (saved - before)
