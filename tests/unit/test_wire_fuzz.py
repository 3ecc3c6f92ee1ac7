"""Any bytes as messages between edge and cloud: frames, or a `WireError`, and little memory."""

from __future__ import annotations

import asyncio
import itertools
import zlib
from contextlib import AbstractContextManager, suppress
from typing import Any
from unittest import mock

import numpy as np
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_edge_link import cloud, shrink
from vllm_effplugin.techniques.edge_cloud import service
from vllm_effplugin.techniques.edge_cloud.config import CloudConfig
from vllm_effplugin.techniques.edge_cloud.contexts import Limits
from vllm_effplugin.techniques.edge_cloud.service import CloudService, Sampling
from vllm_effplugin.techniques.edge_cloud.wire import (
    HEADER_BYTES,
    SESSION_BYTES,
    Encoding,
    Frame,
    FrameReader,
    Kind,
    WireError,
    append_frame,
    json_frame,
    read_frames,
    token_frame,
)

SIZE = 8
MOST = 4096

sessions = st.binary(min_size=SESSION_BYTES, max_size=SESSION_BYTES)
positions = st.integers(0, 2**31 - 8)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8
)
objects = st.dictionaries(st.text(max_size=12), json_values, max_size=4)
floats = st.floats(width=32)
"""Those that are no numbers, too."""


@st.composite
def appends(draw: st.DrawFn) -> Frame:
    """Uploads of any hidden states."""
    count = draw(st.integers(1, 4))
    values = draw(st.lists(floats, min_size=count * SIZE, max_size=count * SIZE))
    states = np.array(values, np.float32).reshape(count, SIZE)
    encoding = draw(st.sampled_from(list(Encoding)[1:]))
    with np.errstate(all="ignore"):
        return append_frame(draw(sessions), draw(positions), states, encoding)


frames = st.one_of(
    appends(),
    st.builds(
        json_frame, st.sampled_from((Kind.OPEN, Kind.ASK, Kind.ERROR)), sessions, objects, positions
    ),
    st.builds(Frame, st.sampled_from((Kind.CLOSE, Kind.HELD, Kind.REPLAY)), sessions, positions),
    st.builds(
        token_frame, sessions, positions, st.integers(0, 2**32 - 1), st.floats(0, 9, width=32)
    ),
)
"""Every kind of frame, as this package makes them."""


def cut(whole: bytes, places: list[int]) -> list[bytes]:
    """In pieces, some of them empty."""
    ends = [0, *sorted(place % (len(whole) + 1) for place in places), len(whole)]
    return [whole[a:b] for a, b in itertools.pairwise(ends)]


def resealed(frame: bytes) -> bytes:
    """With the checksum that fits, so that it is not what refuses the frame."""
    head, payload = frame[: HEADER_BYTES - 4], frame[HEADER_BYTES:]
    return head + zlib.crc32(payload, zlib.crc32(head)).to_bytes(4, "little") + payload


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(frames, max_size=5), st.lists(st.integers(0, 2**16), max_size=6))
def test_any_frames_in_any_pieces_come_through(sent: list[Frame], places: list[int]) -> None:
    reader, found = FrameReader(SIZE, MOST), []
    for piece in cut(b"".join(frame.pack() for frame in sent), places):
        found += list(reader.feed(piece))
    reader.end()
    assert found == sent


@settings(max_examples=500, deadline=None, derandomize=True)
@given(frames, st.integers(0, HEADER_BYTES - 5), st.binary(min_size=1, max_size=6))
def test_a_header_with_any_fields_is_read_as_it_is_or_refused(
    frame: Frame, place: int, put: bytes
) -> None:
    """With a checksum that fits: the other checks have to hold by themselves."""
    packed = frame.pack()
    head = bytearray(packed[: HEADER_BYTES - 4])
    head[place : place + len(put)] = put[: len(head) - place]
    bad = resealed(bytes(head) + packed[HEADER_BYTES - 4 :])
    try:
        [found] = read_frames(bad, SIZE, MOST)
    except WireError:
        return
    assert found.pack() == bad
    if found.kind is Kind.APPEND:
        with np.errstate(all="ignore"):
            assert found.states(SIZE).shape == (found.count, SIZE)
    elif found.kind is Kind.TOKEN:
        found.token()
    else:
        with suppress(WireError):
            assert isinstance(found.json(), dict)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(frames, st.integers(0, 2**32 - 1), st.lists(st.integers(0, 2**16), max_size=6))
def test_no_more_is_kept_than_one_frame_may_have(
    frame: Frame, length: int, places: list[int]
) -> None:
    """Whatever length a header names, a reader waits for no more than `most` bytes."""
    packed = bytearray(frame.pack())
    packed[32:36] = length.to_bytes(4, "little")
    noise = resealed(bytes(packed)) + bytes(MOST)
    reader = FrameReader(SIZE, MOST)
    pieces = cut(noise, places)
    longest = max(map(len, pieces))
    try:
        for piece in pieces:
            list(reader.feed(piece))
            assert len(reader._bytes) <= HEADER_BYTES + MOST + longest
        reader.end()
    except WireError:
        pass


def at_once() -> AbstractContextManager[Any]:
    """Nobody waits for positions that do not come."""
    return mock.patch.object(service, "MISSING_S", 0.0)


APP = cloud()
shrink(APP, message_bytes=1000)
CLIENT = TestClient(APP)


class Engine:
    """Says 7 to whatever it is asked."""

    hidden_size, most_streams, most_blocks, block_size = SIZE, 4, 64, 16
    most_positions = 1 << 20

    def open(self, name: str, salt: str) -> Engine:
        return self

    async def next(self, states: np.ndarray, sampling: Sampling) -> int:
        assert states.ndim == 2
        return 7

    async def close(self) -> None:
        pass


SESSIONS = [bytes(15) + bytes([i]) for i in range(3)]
few = st.sampled_from(SESSIONS)
near = st.integers(0, 12)
sampled = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "seed", "x"), scalars)
)
told = st.one_of(
    st.builds(lambda session: json_frame(Kind.OPEN, session, {"model": "m"}), few),
    st.builds(json_frame, st.just(Kind.OPEN), few, objects),
    st.builds(json_frame, st.just(Kind.ASK), few, sampled, near),
    st.builds(
        lambda session, at, n: append_frame(
            session, at, np.ones((n, SIZE), np.float32), Encoding.FP16
        ),
        few,
        near | positions,
        st.integers(1, 6),
    ),
    st.builds(Frame, st.sampled_from((Kind.CLOSE, Kind.HELD, Kind.REPLAY)), few, near),
    st.builds(lambda session, payload: Frame(Kind.ASK, session, payload=payload), few, st.binary()),
)
"""What an edge may say of three sessions, sense or not."""


@settings(max_examples=150, deadline=None, derandomize=True)
@given(messages=st.lists(st.lists(told, max_size=8), max_size=6))
def test_a_cloud_bears_any_order_of_frames(messages: list[list[Frame]]) -> None:
    """Each ASK gets one reply or a refusal with a known code, and closed sessions leave nothing."""
    with at_once():
        asyncio.run(_told(messages))


async def _told(messages: list[list[Frame]]) -> None:
    limits = Limits(sessions=3, positions=20, sequence=16, ahead=8)
    config = CloudConfig(role="cloud", model="m", partition=1, limits=limits)
    cloud_service = CloudService(config, Engine())
    for message in messages:
        replies: list[Any] = [reply async for reply in cloud_service.exchange(b"k", message)]
        for reply in read_frames(b"".join(each.pack() for each in replies), SIZE, 1 << 20):
            assert reply.kind in (Kind.HELD, Kind.TOKEN, Kind.REPLAY, Kind.ERROR)
            if reply.kind is Kind.ERROR:
                assert reply.json()["code"] != "engine", reply.json()
        asked = sum(frame.kind is Kind.ASK for frame in message)
        assert sum(reply.kind is Kind.TOKEN for reply in replies) <= asked
        assert cloud_service.contexts.positions <= limits.positions
        assert len(cloud_service.contexts) <= limits.sessions
    farewell = [Frame(Kind.CLOSE, session) for session in SESSIONS]
    assert [reply async for reply in cloud_service.exchange(b"k", farewell)] == []
    await asyncio.gather(*cloud_service._closing)
    assert (
        len(cloud_service.contexts)
        == cloud_service.contexts.positions
        == cloud_service._streams
        == 0
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(told, max_size=5), st.binary(max_size=30), st.integers(0, 2**16))
def test_a_route_bears_any_body(sent: list[Frame], put: bytes, place: int) -> None:
    """Frames in answer, or HTTP 400 or 413 with a sentence; the client raises what else happens."""
    whole = b"".join(frame.pack() for frame in sent)
    at = place % (len(whole) + 1)
    body = whole[:at] + put + whole[at + len(put) :]
    with at_once():
        answer = CLIENT.post("/v1/edge_cloud/exchange", content=body)
    if answer.status_code == 200:
        read_frames(answer.content, SIZE, 1 << 20)
    else:
        assert answer.status_code in (400, 413)
        assert answer.json()["detail"]
