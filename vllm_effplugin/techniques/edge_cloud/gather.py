"""When a step waits, so that more tokens share it.

A decode step costs nearly the same for a few tokens as for many: the weights have to be read.
Questions scatter the requests of a batch; left alone, edge and cloud would run many small steps.
"""

from __future__ import annotations

SHARE = 1 / 3
"""Of an edge's requests, those that make a step worth it. The others are under way meanwhile, so
that edge and cloud work at the same time."""

PATIENCE = 5
"""Gaps that a cloud's step waits at most."""


class EdgeGather:
    """An edge's requests that could go on, while others wait for the cloud.

    Args:
        longest_s: that a step waits; 0 for never.
    """

    def __init__(self, longest_s: float) -> None:
        self._longest = longest_s
        self._since: float | None = None

    def holds(self, ready: int, parked: int, now: float) -> bool:
        """Whether the next step waits.

        Args:
            ready: requests that could go on.
            parked: those that wait for the cloud.
            now: in seconds.
        """
        if not ready or ready >= SHARE * (ready + parked):
            self._since = None
            return False
        if self._since is None:
            self._since = now
        if now - self._since < self._longest:
            return True
        self._since = None
        return False


class CloudGather:
    """A cloud's questions, which come one by one even where they were asked together.

    Args:
        gap_s: after the last one, until a step begins; 0 for at once.
    """

    def __init__(self, gap_s: float) -> None:
        self._gap = gap_s
        self._first: float | None = None
        self._last = 0.0

    def arrived(self, now: float) -> None:
        """A question came."""
        self._last = now
        if self._first is None:
            self._first = now

    def holds(self, now: float) -> bool:
        """Whether the next step waits."""
        if self._first is None:
            return False
        if now - self._last < self._gap and now - self._first < PATIENCE * self._gap:
            return True
        self._first = None
        return False
