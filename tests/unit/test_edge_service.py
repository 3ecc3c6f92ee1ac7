"""The cloud's answers, over an engine that is none: it says which positions it was given."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

import numpy as np
import pytest

from vllm_effplugin.techniques.edge_cloud import service as module
from vllm_effplugin.techniques.edge_cloud.config import CloudConfig
from vllm_effplugin.techniques.edge_cloud.service import CloudService, Sampling
from vllm_effplugin.techniques.edge_cloud.wire import (
    Encoding,
    Frame,
    Kind,
    append_frame,
    json_frame,
)

ALICE, BOB = b"a" * 32, b"b" * 32
ONE, TWO, THREE = (bytes([n]) * 16 for n in (1, 2, 3))
SIZE = 8


class FakeStream:
    """Checks that positions come in order, each once; a token is 1000 * first + last position."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.seen, self.begun, self.closed = engine, 0, False, False

    async def next(self, states: np.ndarray, sampling: Sampling) -> int:
        if not self.begun:
            self.begun = True
            self.engine.open_streams += 1
            assert self.engine.open_streams <= self.engine.most_streams
        await asyncio.sleep(0)
        if self.engine.breaks:
            raise RuntimeError("out of order")
        assert not self.closed
        assert states[:, 0].tolist() == list(range(self.seen, self.seen + len(states)))
        first, self.seen = self.seen, self.seen + len(states)
        self.engine.ran += len(states)
        self.engine.temperatures.append(sampling.temperature)
        return 1000 * first + self.seen - 1

    async def close(self) -> None:
        await asyncio.sleep(0)
        self.closed = True
        self.engine.open_streams -= self.begun


class FakeEngine:
    hidden_size, most_streams, most_blocks, block_size = SIZE, 2, 8, 4
    most_positions = 1 << 20

    def __init__(self) -> None:
        self.ran, self.open_streams, self.breaks = 0, 0, False
        self.temperatures: list[float] = []
        self.names: list[tuple[str, str]] = []

    def open(self, name: str, salt: str) -> FakeStream:
        self.names.append((name, salt))
        return FakeStream(self)


def make(**limits: Any) -> CloudService:
    config = CloudConfig.model_validate(
        {"role": "cloud", "model": "m", "partition": 3, "limits": limits}
    )
    return CloudService(config, FakeEngine())


def opened(session: bytes = ONE, model: str = "m") -> Frame:
    return json_frame(Kind.OPEN, session, {"model": model})


def states(first: int, end: int, session: bytes = ONE) -> Frame:
    rows = np.arange(first, end, dtype=np.float32)[:, None].repeat(SIZE, 1)
    return append_frame(session, first, rows, Encoding.FP32)


def ask(position: int, session: bytes = ONE, **sampling: Any) -> Frame:
    return json_frame(Kind.ASK, session, sampling, position)


async def say(service: CloudService, *frames: Frame, owner: bytes = ALICE) -> list[Frame]:
    return [frame async for frame in service.exchange(owner, frames)]


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def test_a_token_needs_one_message_and_each_position_once() -> None:
    async def talk() -> None:
        service = make()
        held, token = await say(service, opened(), states(0, 5), ask(4, temperature=0.5))
        assert (held.kind, held.position) == (Kind.HELD, 5)
        assert (token.kind, token.position, token.token()[0]) == (Kind.TOKEN, 4, 4)
        # Positions that came without a question are computed with the next one.
        await say(service, states(5, 6))
        await say(service, states(6, 7), states(5, 7))
        [_, token] = await say(service, states(7, 8), ask(7))
        assert token.token()[0] == 5007
        assert service.engine.ran == 8
        assert service.engine.temperatures == [0.5, 0.0]
        assert (service.contexts.totals["computed"], service.contexts.totals["repeated"]) == (8, 2)

    run(talk())


def test_a_question_that_comes_twice_has_one_answer() -> None:
    async def talk() -> None:
        service = make()
        message = [opened(), states(0, 3), ask(2)]
        first, second = await asyncio.gather(say(service, *message), say(service, *message))
        assert first[1].token()[0] == second[1].token()[0] == 2
        [_, again] = await say(service, ask(2))
        assert again.token()[0] == 2
        assert service.engine.ran == 3

    run(talk())


def test_a_question_waits_for_what_it_is_about(monkeypatch: pytest.MonkeyPatch) -> None:
    async def talk() -> None:
        service = make()
        late = asyncio.ensure_future(say(service, opened(), ask(3)))
        await asyncio.sleep(0.01)
        await say(service, states(2, 4))
        await asyncio.sleep(0.01)
        assert not late.done()
        await say(service, states(0, 2))
        assert (await late)[1].token()[0] == 3
        monkeypatch.setattr(module, "MISSING_S", 0.01)
        [_, replay] = await say(service, ask(9))
        assert (replay.kind, replay.position) == (Kind.REPLAY, 4)

    run(talk())


def test_who_is_unknown_is_asked_to_replay() -> None:
    async def talk() -> None:
        service = make()
        await say(service, opened(), states(0, 5))
        for owner, session in ((BOB, ONE), (ALICE, TWO)):
            [replay] = await say(service, states(5, 6, session), owner=owner)
            assert (replay.kind, replay.session, replay.position) == (Kind.REPLAY, session, 0)
        assert await say(service, Frame(Kind.CLOSE, ONE), owner=BOB) == []
        assert (await say(service, ask(4)))[1].token()[0] == 4
        assert await say(service, Frame(Kind.CLOSE, ONE)) == []
        assert (await say(service, ask(4)))[0].kind is Kind.REPLAY
        assert service.engine.names[0][1] == ALICE.hex()

    run(talk())


def test_bad_frames_harm_no_other() -> None:
    async def talk() -> None:
        service = make(sequence=20)
        replies = await say(
            service,
            opened(),
            opened(TWO, "other"),
            states(0, 5),
            states(18, 25),
            ask(4, top_p=7.0),
            Frame(Kind.TOKEN, ONE),
            ask(4),
        )
        told = {reply.json()["code"]: reply for reply in replies if reply.kind is Kind.ERROR}
        assert sorted(told) == ["frame", "model", "too_long"]
        assert "'m', not of 'other'" in told["model"].json()["message"]
        assert [r.token()[0] for r in replies if r.kind is Kind.TOKEN] == [4]
        assert any("top_p" in r.json().get("message", "") for r in replies if r.kind is Kind.ERROR)

    run(talk())


def test_a_session_is_no_longer_than_the_engine_takes() -> None:
    async def talk() -> None:
        for service in (make(), make(sequence=50)):
            service.engine.most_positions = 5
            service = CloudService(service.config, service.engine)
            assert service.describe()["limits"]["sequence"] == 5
            began = time.monotonic()
            replies = await say(service, opened(), states(0, 5), states(5, 6), ask(5))
            assert [reply.kind for reply in replies] == [Kind.ERROR, Kind.HELD]
            assert replies[0].json()["code"] == "too_long"
            [told] = [r for r in await say(service, ask(5)) if r.kind is Kind.ERROR]
            assert told.json()["code"] == "too_long"
            [_, token] = await say(service, ask(4))
            assert token.token()[0] == 4
            assert time.monotonic() - began < module.MISSING_S / 2

    run(talk())


def test_who_waits_for_a_session_that_ends_is_told_at_once() -> None:
    async def talk() -> None:
        service = make()
        began = time.monotonic()
        waiting = asyncio.ensure_future(say(service, opened(), states(0, 3), ask(7)))
        await asyncio.sleep(0.05)
        await say(service, Frame(Kind.CLOSE, ONE))
        assert [reply.kind for reply in await waiting] == [Kind.HELD, Kind.REPLAY]
        assert time.monotonic() - began < module.MISSING_S / 2
        assert not service._parts

    run(talk())


def test_idle_sessions_make_room_and_are_computed_again() -> None:
    async def talk() -> None:
        service = make()
        for session in (ONE, TWO, THREE):  # the engine has room for two
            await say(service, opened(session), states(0, 5, session), ask(4, session))
        assert service.engine.open_streams == 2
        assert service.contexts.totals["evicted"] == 1
        [_, token] = await say(service, states(5, 6), ask(5))
        assert token.token()[0] == 5  # from position 0 on
        totals = service.contexts.totals
        assert (totals["computed"], totals["recomputed"], totals["evicted"]) == (16, 5, 2)
        # Six blocks of four for the one: only one block is left.
        [_, token] = await say(service, states(6, 23), ask(22))
        assert token.token()[0] == 6022
        [_, full] = await say(service, states(23, 40), ask(39))
        assert full.json()["code"] == "full"
        # What could not be had is no harm.
        [_, token] = await say(service, ask(24))
        assert token.token()[0] == 23024

    run(talk())


def test_an_engine_that_fails_is_tried_afresh() -> None:
    async def talk() -> None:
        service = make()
        service.engine.breaks = True
        [_, failed] = await say(service, opened(), states(0, 3), ask(2))
        assert failed.json() == {"code": "engine", "message": "RuntimeError: out of order"}
        service.engine.breaks = False
        [_, token] = await say(service, ask(2))
        assert token.token()[0] == 2
        assert service.engine.open_streams == 1

    run(talk())


def test_abandoned_sessions_are_gone_after_a_while() -> None:
    async def talk() -> None:
        service = make(idle_s=0.001, forget_s=0.002)
        for number in range(200):
            session = number.to_bytes(2, "little") + ONE[2:]
            await say(service, opened(session), states(0, 5, session), ask(4, session))
        await asyncio.sleep(0.01)
        service.contexts.tidy()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert (len(service.contexts), service.contexts.positions) == (0, 0)
        assert service.engine.open_streams == 0
        assert not service._parts

    run(talk())


def test_what_ends_while_it_is_asked_leaves_nothing() -> None:
    """In one message, between two questions, and while room is made."""

    async def talk() -> None:
        service = make()
        for _ in range(5):
            said = await say(
                service, opened(), states(0, 3), ask(2), json_frame(Kind.CLOSE, ONE, {})
            )
            assert said[-1].kind is Kind.REPLAY
            assert (service._streams, service._parts) == (0, {})
        for ticks in range(12):
            asked = asyncio.ensure_future(say(service, opened(), states(0, 3), ask(2), ask(1)))
            other = asyncio.ensure_future(
                say(service, opened(TWO), states(0, 9, TWO), ask(8, TWO), ask(3, TWO))
            )
            for _ in range(ticks):
                await asyncio.sleep(0)
            closing = [json_frame(Kind.CLOSE, session, {}) for session in (ONE, TWO)]
            await say(service, *closing)
            await asyncio.gather(asked, other)
            await say(service, *closing)
            for _ in range(4):
                await asyncio.sleep(0)
            assert (service._streams, service._parts) == (0, {}), ticks
            assert service.engine.open_streams == 0

    run(talk())
