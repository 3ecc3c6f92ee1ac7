"""What the cloud holds of its clients: each position once, each client its own, within limits."""

from __future__ import annotations

import random

import numpy as np
import pytest

from vllm_effplugin.engine.counters import Counters
from vllm_effplugin.techniques.edge_cloud.contexts import Context, Contexts, LimitError, Limits
from vllm_effplugin.techniques.edge_cloud.totals import CLOUD_TOTALS

ALICE, BOB = b"a" * 32, b"b" * 32
ONE, TWO, THREE = (bytes([n]) * 16 for n in (1, 2, 3))


def rows(start: int, end: int) -> np.ndarray:
    """Hidden states that tell their position."""
    return np.arange(start, end, dtype=np.float32)[:, None].repeat(4, 1)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def make(clock: Clock | None = None, **limits: float) -> tuple[Contexts, list[Context]]:
    """Contexts, and those whose part of the engine was released."""
    released: list[Context] = []
    given = Limits.model_validate(limits)
    return Contexts(given, released.append, Counters(CLOUD_TOTALS), clock or Clock()), released


def test_uploads_may_repeat_overlap_and_overtake() -> None:
    contexts, _ = make()
    context = contexts.open(ALICE, ONE)
    pieces = [(start, min(40, start + length)) for start in range(40) for length in (1, 3, 7)]
    random.Random(0).shuffle(pieces)
    for start, end in pieces:
        contexts.append(context, start, rows(start, end))
    assert context.held == 40 == contexts.positions
    assert contexts.take(context, 24)[:, 0].tolist() == list(range(25))
    assert contexts.take(context, 39)[:, 0].tolist() == list(range(25, 40))
    totals = contexts.totals
    assert (totals["received"], totals["computed"], totals["recomputed"]) == (40, 40, 0)
    assert totals["repeated"] == sum(end - start for start, end in pieces) - 40


def test_a_gap_has_a_limit() -> None:
    contexts, _ = make(ahead=10, sequence=50)
    context = contexts.open(ALICE, ONE)
    contexts.append(context, 5, rows(5, 10))
    assert context.held == 0
    with pytest.raises(LimitError, match="from 0 on are missing before 8") as error:
        contexts.append(context, 8, rows(8, 13))
    assert error.value.code == "gap"
    with pytest.raises(LimitError, match="at most 50 positions"):
        contexts.append(context, 0, rows(0, 51))
    contexts.append(context, 0, rows(0, 5))
    assert context.held == 10


def test_one_client_cannot_see_what_another_sent() -> None:
    contexts, _ = make()
    contexts.append(contexts.open(ALICE, ONE), 0, rows(0, 3))
    assert contexts.find(BOB, ONE) is None
    other = contexts.open(BOB, ONE)
    assert other.held == 0
    contexts.append(other, 0, rows(100, 101))
    known = contexts.open(ALICE, ONE)
    assert contexts.take(known, 2)[:, 0].tolist() == [0, 1, 2]
    with pytest.raises(LimitError, match="random"):
        contexts.open(BOB, bytes(16))


def test_what_is_idle_is_evicted_rebuilt_and_forgotten() -> None:
    clock = Clock()
    contexts, released = make(clock, idle_s=10, forget_s=100)
    context, busy = contexts.open(ALICE, ONE), contexts.open(ALICE, TWO)
    for each in (context, busy):
        contexts.append(each, 0, rows(0, 4))
        contexts.take(each, 3)
    busy.busy = 1
    assert contexts.live == 2
    clock.now = 11
    contexts.tidy()
    assert released == [context]
    assert (contexts.live, context.computed, context.held) == (1, 0, 4)
    contexts.append(context, 4, rows(4, 6))
    assert contexts.take(context, 5)[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert (contexts.totals["computed"], contexts.totals["recomputed"]) == (10, 4)
    clock.now = 200
    contexts.tidy()
    assert contexts.find(ALICE, ONE) is None
    assert contexts.find(ALICE, TWO) is busy
    assert contexts.positions == 4
    assert (contexts.totals["evicted"], contexts.totals["forgotten"]) == (2, 1)


def test_room_is_made_where_nobody_waits() -> None:
    contexts, released = make(sessions=2, positions=10)
    first, second = contexts.open(ALICE, ONE), contexts.open(ALICE, TWO)
    contexts.append(first, 0, rows(0, 6))
    contexts.take(first, 5)
    contexts.append(second, 0, rows(0, 3))
    contexts.find(ALICE, ONE)  # used last, so that the other goes
    third = contexts.open(ALICE, THREE)
    assert contexts.find(ALICE, TWO) is None
    first.busy = 1
    with pytest.raises(LimitError, match="positions are all in use") as error:
        contexts.append(third, 0, rows(0, 5))
    assert error.value.code == "full"
    first.busy = 0
    contexts.append(third, 0, rows(0, 5))
    assert contexts.find(ALICE, ONE) is None
    assert released == [second, first]
    assert contexts.positions == 5
    contexts.close(third)
    assert (len(contexts), contexts.positions, contexts.totals["closed"]) == (0, 0, 1)
    contexts.close(third)  # once more
    assert (contexts.positions, contexts.totals["closed"]) == (0, 1)
