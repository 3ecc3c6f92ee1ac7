"""What layers cost, and whether it pays to run them on fewer tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

EVERY = 4
"""Steps of which one is looked at: looking at each would cost more than it tells."""

SMOOTHING = 0.15
"""Weight of the last step looked at in the running means: one step in which all rows leave by
chance must not make the next ones run in segments."""

MARGIN = 0.03
"""Share of a step that leaving has to save before the stack runs in segments."""

FIRST = 2
"""Steps looked at that have to run as one graph before any runs in segments: the faster of them
tells what a step as one graph takes at first."""

FORGETTING = 0.001
"""Share of what segments turned out slower than expected that is forgotten with every step looked
at which ran as one graph, so that they get another chance after some thousand steps."""

MOST_DRIFT = 1.5
"""Times a usual step as one graph that a step can take. What is beyond is not believed: such steps
compile something, or wait for another process."""


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
        return 1 - spent / self.as_one(tokens)

    def as_one(self, tokens: int) -> float:
        """Seconds of the stack as one graph.

        Where segments were measured to be faster even if nobody leaves, that is noise.
        """
        return min(self.whole.at(tokens), sum(segment.at(tokens) for segment in self.segments))


@dataclass
class _Memory:
    """What steps of about one size were like.

    Attributes:
        saved: share of the expected time of a step as one graph that leaving is expected to save.
        seen: steps as one graph.
        whole, segments: real over expected time of steps that ran either way.
    """

    saved: float = 0.0
    seen: int = 0
    whole: float = 1.0
    segments: float = 1.0

    def time_whole(self, drift: float) -> None:
        """A step as one graph took `drift` times the time expected of it."""
        before = self.whole
        if self.seen <= FIRST:
            self.whole = self.segments = drift if self.seen == 1 else min(before, drift)
            return
        self.whole += SMOOTHING * (drift - before)
        # What slows all steps down slows segments down alike; they tend to no drift of their own.
        own = self.segments / before
        self.segments = self.whole * (own + FORGETTING * (1.0 - own))

    def time_segments(self, drift: float) -> None:
        """The same of a step in segments."""
        self.segments += SMOOTHING * (drift - self.segments)

    @property
    def slower(self) -> float:
        """How much slower than expected segments are, next to the stack as one graph."""
        return max(1.0, self.segments / self.whole)


class Preference:
    """Whether the stack should run in segments, from what leaving saved in the last steps.

    Remembered apart for steps of different sizes (powers of two), because what pays for one request
    does not for many, and their number changes faster than a mean follows. What is expected of a
    step comes from costs measured at start-up, and is corrected by the time that steps really take:
    caches are colder in them, and a batch of another size at every step is slower than the same
    again and again.

    Args:
        costs: of the machine; None prefers segments always.
    """

    def __init__(self, costs: Costs | None) -> None:
        self.costs = costs
        self._memory: defaultdict[int, _Memory] = defaultdict(_Memory)
        self._steps = 0

    def segments(self, tokens: int) -> bool:
        """Whether segments are expected to save a clear share of a step of some tokens."""
        if self.costs is None:
            return True
        memory = self._memory[tokens.bit_length()]
        saved = 1.0 - (1.0 - memory.saved) * memory.slower
        return memory.seen >= FIRST and saved > MARGIN

    def looks(self) -> bool:
        """Count a step; whether it should be learnt from."""
        self._steps += 1
        return self.costs is not None and self._steps % EVERY == 0

    def learn(
        self,
        tokens: int,
        may_leave: Sequence[int],
        in_segments: bool | None,
        seconds: float | None = None,
    ) -> None:
        """A step of some tokens is over.

        Args:
            may_leave: per exit, how many rows left or might have.
            in_segments: how it ran; None where it ran in segments and nothing was allowed to leave.
            seconds: how long it took; None where nothing really ran.
        """
        if self.costs is None:
            return
        memory = self._memory[tokens.bit_length()]
        saved = self.costs.saved(tokens, may_leave)
        memory.saved += SMOOTHING * (saved - memory.saved)
        if in_segments is False:
            memory.seen += 1
        if seconds is None or in_segments is None:
            return
        expected = self.costs.as_one(tokens)
        if memory.seen > FIRST:
            seconds = min(seconds, MOST_DRIFT * memory.whole * expected)
        if in_segments:
            memory.time_segments(seconds / (expected * (1.0 - saved)))
        else:
            memory.time_whole(seconds / expected)
