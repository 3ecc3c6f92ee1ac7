"""Which waiting requests start: in order, merged well, and never left behind."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_effplugin.techniques.multiplex.config import MultiplexConfig
from vllm_effplugin.techniques.multiplex.grouping import form_groups
from vllm_effplugin.techniques.multiplex.queue import Admission, Room, Waiting

LAYERS = 12


def admission(*sizes: int, wait: float = 2.0) -> Admission:
    return Admission(MultiplexConfig(depth=4, sizes=sizes, max_wait_ms=wait), LAYERS)


def queue(*lengths: int, tenant: str | None = "x", waited: float = 0.0) -> list[Waiting]:
    return [Waiting(length, tenant, waited) for length in lengths]


def test_a_full_queue_fills_whole_groups() -> None:
    room = Room(tokens=150, seats=99, idle=False)
    assert admission(4).starting(queue(*[10] * 40), room, 0.0, 0.0) == (12, 15)
    assert admission(2).starting(queue(*[10] * 40), room, 0.0, 0.0) == (14, 15)
    assert admission(3).starting(queue(*[10] * 40), room, 0.0, 0.0) == (15, 15)


def test_seats_are_counted() -> None:
    room = Room(tokens=1000, seats=5, idle=False)
    assert admission(2).starting(queue(*[10] * 40), room, 0.0, 0.0) == (4, 5)


def test_what_does_not_fit_starts_nevertheless_where_it_is_first() -> None:
    room = Room(tokens=50, seats=99, idle=True)
    assert admission(2).starting(queue(200, 10), room, 0.0, 0.0) == (1, 1)


def test_nobody_is_passed_over_twice() -> None:
    waiting = queue(*[10] * 40)
    waiting[2] = Waiting(10, "x", 0.0, passed_over=True)
    room = Room(tokens=30, seats=99, idle=False)
    assert admission(2).starting(waiting, room, 0.0, 0.0) == (3, 3)


@pytest.mark.parametrize(
    ("changes", "starts"),
    [
        ({}, 0),
        ({"gap": 0.003}, 1),  # nobody is expected in time
        ({"waited": 0.0016}, 1),  # the bound is near
        ({"layer_token": 1e-7}, 1),  # merging saves less than it takes to wait
        ({"idle": False}, 1),
        ({"tenant": None}, 1),
        ({"wait": 0.0}, 1),
    ],
)
def test_when_a_lonely_request_is_held_back(changes: dict, starts: int) -> None:
    given = {
        "gap": 0.0005,
        "waited": 0.0,
        "layer_token": 1e-4,
        "idle": True,
        "tenant": "x",
        "wait": 2.0,
    } | changes
    room = Room(tokens=1000, seats=99, idle=given["idle"])
    waiting = queue(10, tenant=given["tenant"], waited=given["waited"])
    found = admission(2, wait=given["wait"]).starting(
        waiting, room, given["gap"], given["layer_token"]
    )
    assert found == (starts, 1)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_played_queue_starves_nobody(seed: int) -> None:
    """Whoever would have started in vLLM's own order starts a step later at most."""
    rng = random.Random(seed)
    sizes = rng.choice([(2,), (4,), (2, 3), (8,)])
    ours = admission(*sizes, wait=rng.choice([0.0, 2.0]))
    tokens, seats = rng.randrange(10, 200), rng.randrange(1, 20)
    waiting: list[tuple[int, Waiting]] = []
    due: dict[int, int] = {}  # request -> step in which vLLM would have started it
    started: dict[int, int] = {}
    arrived = step = 0
    while step < 60 or waiting:
        for _ in range(rng.randrange(0, 12) if step < 60 else 0):
            tenant = rng.choice(["a", "a", "b", None])
            waiting.append((arrived, Waiting(rng.randrange(1, 60), tenant, 0.0)))
            arrived += 1
        if waiting:
            gap = rng.choice([0.0001, 1.0])
            room = Room(tokens, seats, idle=True)
            count, fits = ours.starting([each for _, each in waiting], room, gap, 1e-4)
            assert count <= fits
            assert count or gap == 0.0001
            for name, _ in waiting[:fits]:
                due.setdefault(name, step)
            for name, request in waiting[:count]:
                started[name] = step
                held = step - due[name]
                assert held == 0 or request.passed_over or request.waited > 0
                if request.passed_over:
                    assert held <= 1 + round(request.waited * 1000)
            waiting = [
                (
                    name,
                    Waiting(
                        r.length,
                        r.tenant,
                        r.waited + 0.001 * (not count),
                        bool(count) and place < fits,
                    ),
                )
                for place, (name, r) in enumerate(waiting)
            ][count:]
        step += 1
        assert step < 10_000
    assert sorted(started) == list(range(arrived))


def test_priced_by_what_merging_saves() -> None:
    """A step of one group beats a fuller one in which others run alone."""
    waiting = [*queue(50, 50), *queue(5, tenant=None), *queue(50, tenant="y"), *queue(9)]
    room = Room(tokens=160, seats=99, idle=False)
    assert form_groups([50, 50], ["x", "x"], (2,)) == [(0, 1)]
    starts, fits = admission(2).starting(waiting, room, 0.0, 0.0)
    assert (starts, fits) == (3, 4)
