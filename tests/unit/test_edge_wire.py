"""Frames between edge and cloud: what is read is what was sent, and nothing else is read."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_effplugin.techniques.edge_cloud.wire import (
    GROUP,
    HEADER_BYTES,
    Encoding,
    Frame,
    FrameReader,
    Kind,
    WireError,
    append_frame,
    decode_states,
    encode_states,
    json_frame,
    read_frames,
    token_frame,
)

SESSION = bytes(range(16))
SIZE = 96  # not a multiple of a group
MOST = 1 << 20


def states(positions: int = 3) -> np.ndarray:
    """Hidden states, of which one channel is far larger than the others."""
    found = np.random.default_rng(0).normal(size=(positions, SIZE)).astype(np.float32)
    found[:, 7] *= 2000
    return found


def message() -> bytes:
    """One frame of each kind."""
    frames = [
        json_frame(Kind.OPEN, SESSION, {"model": "m"}),
        *(append_frame(SESSION, 5, states(), encoding) for encoding in list(Encoding)[1:]),
        json_frame(Kind.ASK, SESSION, {"temperature": 0.5}, 7),
        json_frame(Kind.ASK, SESSION, {}, 7),
        Frame(Kind.CLOSE, SESSION),
        Frame(Kind.HELD, SESSION, 8),
        Frame(Kind.REPLAY, SESSION, 4),
        token_frame(SESSION, 7, 1234567, 0.25),
        json_frame(Kind.ERROR, SESSION, {"code": "full"}, 7),
    ]
    return b"".join(frame.pack() for frame in frames)


def test_what_was_sent_is_read() -> None:
    frames = read_frames(message(), SIZE, MOST)
    assert b"".join(frame.pack() for frame in frames) == message()
    opened, *appended, asked, plain, _, held, replay, token, error = frames
    assert opened.json() == {"model": "m"}
    assert [frame.encoding for frame in appended] == list(Encoding)[1:]
    assert all((frame.position, frame.count) == (5, 3) for frame in appended)
    assert (asked.json(), asked.position, plain.json()) == ({"temperature": 0.5}, 7, {})
    assert (held.position, replay.position) == (8, 4)
    assert token.token() == (1234567, 0.25)
    assert error.json() == {"code": "full"}


@pytest.mark.parametrize(
    ("encoding", "bytes_each", "error"),
    [(Encoding.FP32, 4, 0.0), (Encoding.FP16, 2, 2**-11), (Encoding.INT8, 1, 0.51 / 127)],
)
def test_states_survive(encoding: Encoding, bytes_each: float, error: float) -> None:
    """To a relative error; under `int8`, relative to the largest of a token's 64 channels."""
    sent = states(50)
    payload = encode_states(sent, encoding)
    assert len(payload) == encoding.size(50, SIZE)
    assert len(payload) == 50 * (SIZE * bytes_each + (4 if encoding is Encoding.INT8 else 0))
    found = decode_states(payload, encoding, 50, SIZE)
    scale = np.abs(sent)
    if encoding is Encoding.INT8:
        scale = np.repeat(
            np.stack([scale[:, :GROUP].max(1), scale[:, GROUP:].max(1)], 1), GROUP, 1
        )[:, :SIZE]
        # The large channel costs its own group only.
        assert np.abs(found - sent)[:, GROUP:].max() < 0.02
    assert np.all(np.abs(found - sent) <= error * scale)


@pytest.mark.parametrize("encoding", list(Encoding)[1:])
def test_extreme_states_stay_numbers(encoding: Encoding) -> None:
    sent = np.zeros((2, SIZE), np.float32)
    sent[1, 0], sent[1, 1] = 1e5, -1e-8
    found = decode_states(encode_states(sent, encoding), encoding, 2, SIZE)
    assert np.isfinite(found).all()
    assert not found[0].any()
    assert found[1, 0] == pytest.approx(1e5, rel=0.35)


def test_frames_may_come_in_any_pieces() -> None:
    whole = message()
    reader, found = FrameReader(SIZE, MOST), []
    for start in range(0, len(whole), 33):
        found += list(reader.feed(whole[start : start + 33]))
    reader.end()
    assert found == read_frames(whole, SIZE, MOST)


def resealed(frame: bytes) -> bytes:
    """With the checksum that fits, after something was changed."""
    head, payload = frame[: HEADER_BYTES - 4], frame[HEADER_BYTES:]
    return head + zlib.crc32(payload, zlib.crc32(head)).to_bytes(4, "little") + payload


def changed(place: int, value: int) -> bytes:
    frame = bytearray(append_frame(SESSION, 5, states(), Encoding.FP16).pack())
    frame[place] = value
    return resealed(bytes(frame))


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (changed(0, 0), "not a frame"),
        (changed(4, 2), "version 2.*not 1"),
        (changed(5, 77), "unknown kind of frame 77"),
        (changed(6, 9), "unknown encoding 9"),
        (changed(7, 1), "unknown encoding"),
        (changed(6, 0), "what an APPEND has"),
        (changed(5, Kind.CLOSE), "what an APPEND has"),
        (changed(28, 4), "4 positions of 96 channels are not 576 bytes"),
        (changed(27, 255), "no sequence has a position"),
        (changed(34, 255), "at most 1048576 are allowed"),
        (message()[:-1], "in the middle of a frame"),
        (append_frame(SESSION, 5, states(), Encoding.FP16).pack()[:-1] + b"\7", "checksum"),
        (resealed(Frame(Kind.TOKEN, SESSION, payload=b"123").pack()), "a token is not 3 bytes"),
    ],
)
def test_what_is_wrong_is_named(bad: bytes, named: str) -> None:
    with pytest.raises(WireError, match=named):
        read_frames(bad, SIZE, MOST)


@pytest.mark.parametrize("payload", [b"{", b"[1]", b"\xff", b"[" * 100000])
def test_json_is_checked(payload: bytes) -> None:
    [frame] = read_frames(Frame(Kind.ASK, SESSION, payload=payload).pack(), SIZE, MOST)
    with pytest.raises(WireError, match="is not"):
        frame.json()


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_messages_are_refused_or_unchanged(data: st.DataObject) -> None:
    """Whatever is cut out, put in or flipped: no other error, and no frame that was not sent."""
    whole = message()
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, min(len(whole), start + 80)))
    bad = whole[:start] + data.draw(st.binary(max_size=80)) + whole[end:]
    sent = read_frames(whole, SIZE, MOST)
    reader, found = FrameReader(SIZE, MOST), []
    try:
        for frame in reader.feed(bad):
            found.append(frame)
        reader.end()
    except WireError:
        pass
    assert all(frame in sent for frame in found)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
def test_noise_is_refused(noise: bytes) -> None:
    if noise:
        with pytest.raises(WireError):
            read_frames(noise, SIZE, MOST)
