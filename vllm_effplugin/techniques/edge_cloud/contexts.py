"""The cloud's context manager: what it holds of each client's sessions, and for how long.

Nothing here knows the engine. Hidden states lie in a buffer per session, in order; the engine
computes them when a token is asked for, each position once. A session whose engine part had to go
(`released`) is computed again from the buffer; one that is gone altogether is replayed by its
client.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from vllm_effplugin.engine.counters import Counters
from vllm_effplugin.techniques.edge_cloud.wire import SESSION_BYTES

Owner = bytes
"""Digest of the API key that a session was opened with."""


class Limits(BaseModel):
    """What clients may take of a cloud."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sessions: int = Field(4096, ge=1, description="Sessions held, those without cache included.")
    positions: int = Field(
        1 << 20, ge=1, description="Positions whose hidden states are held, over all sessions."
    )
    sequence: int | None = Field(
        None, ge=1, description="Positions of one session; never more than --max-model-len allows."
    )
    ahead: int = Field(
        1024, ge=0, description="Positions of a session held before those in front of them came."
    )
    message_bytes: int = Field(64 << 20, ge=1 << 20, description="Of one request's body.")
    idle_s: float = Field(
        60.0, gt=0, description="Seconds after which an unused session loses its cache."
    )
    forget_s: float = Field(600.0, gt=0, description="Seconds after which it is forgotten.")


class LimitError(Exception):
    """A client asks for more than there is: `code` is for its program, the text for its reader."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(eq=False)
class Context:
    """One session.

    Attributes:
        owner, session: who it belongs to, and the client's name of it.
        held: positions whose hidden states came, without a gap.
        computed: positions that the engine has in its cache.
        reached: most that it ever had.
        answered: position whose next token was computed last, and the token.
        used: when a client last spoke of it.
        busy: requests that are waiting for its tokens.
        closed: whether it is gone; who still waits for its tokens gets none.
    """

    owner: Owner
    session: bytes
    held: int = 0
    computed: int = 0
    reached: int = 0
    answered: tuple[int, int] | None = None
    used: float = 0.0
    busy: int = 0
    closed: bool = False
    _parts: list[np.ndarray] = field(default_factory=list)
    _ahead: dict[int, np.ndarray] = field(default_factory=dict)

    @property
    def kept(self) -> int:
        """Positions in memory, those ahead of a gap included."""
        return self.held + sum(map(len, self._ahead.values()))

    def add(self, position: int, states: np.ndarray, limits: Limits) -> int:
        """Take in an upload; what is there already is left as it is.

        Args:
            position: of the first of the `[n, d]` states.

        Returns:
            positions that are new.

        Raises:
            LimitError: where it does not fit.
        """
        end = position + len(states)
        before = self.kept
        if position > self.held:
            if end - self.held > limits.ahead:
                raise LimitError(
                    "gap", f"positions from {self.held} on are missing before {position}"
                )
            known = self._ahead.get(position)
            if known is None or len(known) < len(states):
                self._ahead[position] = states
        elif end > self.held:
            self._extend(states[self.held - position :])
        for start in sorted(self._ahead):
            if start > self.held:
                break
            waiting = self._ahead.pop(start)
            if start + len(waiting) > self.held:
                self._extend(waiting[self.held - start :])
        return self.kept - before

    def _extend(self, states: np.ndarray) -> None:
        self._parts.append(states)
        self.held += len(states)

    def pending(self, end: int) -> np.ndarray:
        """Hidden states of positions from `computed` up to `end`, `[n, d]`."""
        # From behind: what was computed long ago is not copied for each token.
        found: list[np.ndarray] = []
        first = self.held
        for part in reversed(self._parts):
            first -= len(part)
            if first < end:
                found.append(part[max(0, self.computed - first) : end - first])
            if first <= self.computed:
                break
        return found[0] if len(found) == 1 else np.concatenate(found[::-1])


class Contexts:
    """All sessions, the one used longest ago first.

    Args:
        limits: what clients may take.
        release: called with a session that has to give up its part of the engine, if it has one.
        totals: what it counts (totals.py).
        clock: for tests.
    """

    def __init__(
        self,
        limits: Limits,
        release: Callable[[Context], None],
        totals: Counters,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits, self.totals = limits, totals
        self._release, self._clock = release, clock
        self._all: OrderedDict[tuple[Owner, bytes], Context] = OrderedDict()
        self._positions = 0

    def __len__(self) -> int:
        return len(self._all)

    @property
    def positions(self) -> int:
        """Held in memory, over all sessions."""
        return self._positions

    @property
    def live(self) -> int:
        """Sessions that the engine has in its cache."""
        return sum(context.computed > 0 for context in self._all.values())

    def open(self, owner: Owner, session: bytes) -> Context:
        """A session, new or known: to open it twice changes nothing.

        Raises:
            LimitError: where there is no room for one more.
        """
        known = self.find(owner, session)
        if known is not None:
            return known
        if session == bytes(SESSION_BYTES):
            raise LimitError("session", "a session's name is random, not zeros")
        while len(self._all) >= self.limits.sessions:
            self._forget_one("sessions")
        context = Context(owner, session, used=self._clock())
        self._all[owner, session] = context
        self.totals.add("opened", 1)
        return context

    def find(self, owner: Owner, session: bytes) -> Context | None:
        """A client's session, which is used by that; None where it is unknown to this client."""
        context = self._all.get((owner, session))
        if context is not None:
            context.used = self._clock()
            self._all.move_to_end((owner, session))
        return context

    def append(self, context: Context, position: int, states: np.ndarray) -> None:
        """Take in an upload.

        Raises:
            LimitError: where there is no room for it.
        """
        self.check_length(position + len(states))
        while self._positions + len(states) > self.limits.positions:
            self._forget_one("positions", but=context)
        new = context.add(position, states, self.limits)
        self._positions += new
        self.totals.add("received", new)
        self.totals.add("repeated", len(states) - new)

    def check_length(self, positions: int) -> None:
        """Refuse a session of so many positions.

        Raises:
            LimitError: where that is too long.
        """
        most = self.limits.sequence
        if most is not None and positions > most:
            raise LimitError("too_long", f"a session has at most {most} positions")

    def take(self, context: Context, position: int) -> np.ndarray:
        """What the engine has to compute for the token behind a position; `[n, d]`, n > 0."""
        states = context.pending(position + 1)
        end = context.computed + len(states)
        again = max(0, min(context.reached, end) - context.computed)
        self.totals.add("recomputed", again)
        self.totals.add("computed", len(states) - again)
        context.computed = end
        context.reached = max(context.reached, end)
        return states

    def close(self, context: Context) -> None:
        """The client needs a session no more."""
        self.totals.add("closed", self._drop(context))

    def evict(self, context: Context) -> None:
        """Take a session's part of the engine away; its hidden states stay."""
        if context.computed:
            self.totals.add("evicted", 1)
            context.computed = 0
            self._release(context)

    def idle(self) -> Context | None:
        """The session with a part of the engine that nobody has used for longest."""
        return next(
            (context for context in self._all.values() if context.computed and not context.busy),
            None,
        )

    def tidy(self) -> None:
        """Evict what is idle, and forget what has been idle for long."""
        now = self._clock()
        for context in list(self._all.values()):
            unused = now - context.used
            if context.busy or unused < self.limits.idle_s:
                continue
            self.evict(context)
            if unused >= self.limits.forget_s:
                self.totals.add("forgotten", self._drop(context))

    def _forget_one(self, what: str, but: Context | None = None) -> None:
        for context in self._all.values():
            if not context.busy and context is not but:
                self.totals.add("forgotten", self._drop(context))
                return
        raise LimitError("full", f"the cloud's {what} are all in use: try again later")

    def _drop(self, context: Context) -> bool:
        """Whether it was there."""
        if self._all.pop((context.owner, context.session), None) is None:
            return False
        self._positions -= context.kept
        context.computed = 0
        context.closed = True
        self._release(context)
        return True
