"""What edge and cloud say to each other: frames, and hidden states as bytes.

A message is a run of frames. A frame is a header of 40 bytes, little-endian, and its payload:

    0   magic `EFEC`          24  position, u32
    4   version, u8           28  count of positions in the payload, u32
    5   kind, u8              32  length of the payload in bytes, u32
    6   encoding, u8          36  CRC-32 of the header before it and of the payload, u32
    7   zero                  40  payload
    8   session, 16 bytes

Positions are the sequence numbers: what a frame says is about certain positions of one session, so
that a frame which comes twice, late or out of order changes nothing. Nothing is ever unpickled; all
lengths are checked before a byte of a payload is looked at.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

MAGIC = b"EFEC"
VERSION = 1
SESSION_BYTES = 16
_BEFORE_CHECKSUM = struct.Struct("<4sBBBB16sIII")
_CHECKSUM = struct.Struct("<I")
_TOKEN = struct.Struct("<If")
HEADER_BYTES = _BEFORE_CHECKSUM.size + _CHECKSUM.size

GROUP = 64
"""Channels that share a scale under `int8`: a few channels of a hidden state are a thousand times
as large as the others, and would leave those no bits."""

_FP16_MAX = float(np.finfo(np.float16).max)
_LEAST_SCALE = float(np.finfo(np.float16).smallest_subnormal)


class WireError(ValueError):
    """Bytes that are not a message."""


class Kind(IntEnum):
    """What a frame is for; replies from 128."""

    OPEN = 1
    APPEND = 2
    ASK = 3
    CLOSE = 4
    HELD = 128
    TOKEN = 129
    REPLAY = 130
    ERROR = 131


class Encoding(IntEnum):
    """Of hidden states `[n, d]`."""

    NONE = 0
    FP32 = 1
    FP16 = 2
    INT8 = 3

    def size(self, positions: int, hidden_size: int) -> int:
        """Bytes of so many positions."""
        numbers = positions * hidden_size
        if self is Encoding.INT8:
            return numbers + 2 * positions * -(-hidden_size // GROUP)
        return {Encoding.NONE: 0, Encoding.FP32: 4 * numbers, Encoding.FP16: 2 * numbers}[self]


_KINDS, _ENCODINGS = frozenset(map(int, Kind)), frozenset(map(int, Encoding))


@dataclass(frozen=True)
class Frame:
    """One frame.

    Attributes:
        kind: what it is for.
        session: the client's name of it, 16 random bytes.
        position: OPEN 0. APPEND: first position of the payload. ASK, TOKEN: position whose next
            token is meant. HELD, REPLAY: positions that the cloud holds; it wants those behind.
        count: positions in the payload of an APPEND.
        encoding: of an APPEND's payload.
        payload: APPEND: hidden states. OPEN, ASK, ERROR: a JSON object. TOKEN: the token's id, and
            the seconds that the cloud's engine took.
    """

    kind: Kind
    session: bytes
    position: int = 0
    count: int = 0
    encoding: Encoding = Encoding.NONE
    payload: bytes = b""

    @property
    def size(self) -> int:
        """Bytes of it."""
        return HEADER_BYTES + len(self.payload)

    def pack(self) -> bytes:
        """As bytes."""
        head = _BEFORE_CHECKSUM.pack(
            MAGIC, VERSION, self.kind, self.encoding, 0,
            self.session, self.position, self.count, len(self.payload),
        )  # fmt: skip
        return head + _CHECKSUM.pack(zlib.crc32(self.payload, zlib.crc32(head))) + self.payload

    def json(self) -> dict[str, Any]:
        """The payload of an OPEN, ASK or ERROR; empty where there is none.

        Raises:
            WireError: when it is not a JSON object.
        """
        if not self.payload:
            return {}
        try:
            found = json.loads(self.payload)
        except (ValueError, RecursionError):
            raise WireError(f"the payload of {self.kind.name} is not JSON") from None
        if not isinstance(found, dict):
            raise WireError(f"the payload of {self.kind.name} is not a JSON object")
        return found

    def token(self) -> tuple[int, float]:
        """The payload of a TOKEN: its id, and the seconds that the cloud's engine took."""
        token, seconds = _TOKEN.unpack(self.payload)
        return int(token), float(seconds)

    def states(self, hidden_size: int) -> np.ndarray:
        """The payload of an APPEND, `[count, d]` in fp32."""
        return decode_states(self.payload, self.encoding, self.count, hidden_size)


def json_frame(kind: Kind, session: bytes, content: Mapping[str, Any], position: int = 0) -> Frame:
    """A frame whose payload is a JSON object."""
    payload = json.dumps(content, separators=(",", ":")).encode() if content else b""
    return Frame(kind, session, position, payload=payload)


def append_frame(session: bytes, position: int, states: np.ndarray, encoding: Encoding) -> Frame:
    """An upload of `[n, d]` hidden states, of positions from `position` on."""
    payload = encode_states(states, encoding)
    return Frame(Kind.APPEND, session, position, len(states), encoding, payload)


def token_frame(session: bytes, position: int, token: int, seconds: float) -> Frame:
    """An answer."""
    return Frame(Kind.TOKEN, session, position, payload=_TOKEN.pack(token, seconds))


class FrameReader:
    """Frames out of bytes that come in pieces.

    Args:
        hidden_size: of the model.
        most: longest payload in bytes.
    """

    def __init__(self, hidden_size: int, most: int) -> None:
        self._hidden_size, self._most = hidden_size, most
        self._bytes = bytearray()

    def feed(self, piece: bytes) -> Iterator[Frame]:
        """The frames that are complete now.

        Raises:
            WireError: naming what is wrong with one; nothing can be read after that.
        """
        self._bytes += piece
        while len(self._bytes) >= HEADER_BYTES:
            head = bytes(self._bytes[: _BEFORE_CHECKSUM.size])
            magic, version, kind, encoding, zero, session, position, count, length = (
                _BEFORE_CHECKSUM.unpack(head)
            )
            self._check(magic, version, kind, encoding, zero, position, count, length)
            if len(self._bytes) < HEADER_BYTES + length:
                return
            payload = bytes(self._bytes[HEADER_BYTES : HEADER_BYTES + length])
            (checksum,) = _CHECKSUM.unpack(self._bytes[_BEFORE_CHECKSUM.size : HEADER_BYTES])
            if checksum != zlib.crc32(payload, zlib.crc32(head)):
                raise WireError("a frame's checksum is wrong")
            del self._bytes[: HEADER_BYTES + length]
            yield Frame(Kind(kind), session, position, count, Encoding(encoding), payload)

    def end(self) -> None:
        """No bytes follow.

        Raises:
            WireError: in the middle of a frame.
        """
        if self._bytes:
            raise WireError(f"the message ends in the middle of a frame, {len(self._bytes)} bytes")

    def _check(
        self,
        magic: bytes,
        version: int,
        kind: int,
        encoding: int,
        zero: int,
        position: int,
        count: int,
        length: int,
    ) -> None:
        if magic != MAGIC:
            raise WireError("not a frame of edge and cloud")
        if version != VERSION:
            raise WireError(f"version {version} of the wire format, not {VERSION}")
        if kind not in _KINDS:
            raise WireError(f"unknown kind of frame {kind}")
        if encoding not in _ENCODINGS or zero:
            raise WireError(f"unknown encoding {encoding}")
        if length > self._most:
            raise WireError(f"a payload of {length} bytes; at most {self._most} are allowed")
        if (kind == Kind.APPEND) != (encoding != Encoding.NONE) or (kind == Kind.APPEND) != (
            count > 0
        ):
            raise WireError("hidden states are what an APPEND has, and no other frame")
        if kind == Kind.APPEND and length != Encoding(encoding).size(count, self._hidden_size):
            raise WireError(
                f"{count} positions of {self._hidden_size} channels are not {length} bytes"
            )
        if position + count > 2**31:
            raise WireError(f"no sequence has a position {position}")
        if kind == Kind.TOKEN and length != _TOKEN.size:
            raise WireError(f"a token is not {length} bytes")


def read_frames(message: bytes, hidden_size: int, most: int) -> list[Frame]:
    """All frames of a whole message.

    Raises:
        WireError: naming what is wrong with it.
    """
    reader = FrameReader(hidden_size, most)
    frames = list(reader.feed(message))
    reader.end()
    return frames


def encode_states(states: np.ndarray, encoding: Encoding) -> bytes:
    """`[n, d]` hidden states in fp32 as bytes.

    `fp16` takes what is beyond its range to the range's end. `int8` has a scale in fp16 for each
    token and each 64 channels.
    """
    if encoding is Encoding.FP32:
        return np.ascontiguousarray(states, dtype="<f4").tobytes()
    if encoding is Encoding.FP16:
        return np.clip(states, -_FP16_MAX, _FP16_MAX).astype("<f2").tobytes()
    assert encoding is Encoding.INT8
    grouped = _grouped(states)
    scales = np.clip(np.abs(grouped).max(-1) / 127, _LEAST_SCALE, _FP16_MAX).astype("<f2")
    steps = np.rint(grouped / scales[..., None].astype(np.float32)).clip(-127, 127)
    flat = steps.astype(np.int8).reshape(len(states), -1)[:, : states.shape[1]]
    return scales.tobytes() + flat.tobytes()


def decode_states(
    payload: bytes, encoding: Encoding, positions: int, hidden_size: int
) -> np.ndarray:
    """`[n, d]` hidden states in fp32. The payload's length was checked."""
    if encoding is Encoding.FP32:
        return np.frombuffer(payload, dtype="<f4").reshape(positions, hidden_size)
    if encoding is Encoding.FP16:
        halves = np.frombuffer(payload, dtype="<f2").reshape(positions, hidden_size)
        return halves.astype(np.float32)
    groups = -(-hidden_size // GROUP)
    scales = np.frombuffer(payload, dtype="<f2", count=positions * groups)
    steps = np.frombuffer(payload, dtype=np.int8, offset=2 * positions * groups)
    wide = scales.reshape(positions, groups).astype(np.float32).repeat(GROUP, 1)
    return steps.reshape(positions, hidden_size).astype(np.float32) * wide[:, :hidden_size]


def _grouped(states: np.ndarray) -> np.ndarray:
    """`[n, g, 64]`, with zeros behind the last channel."""
    positions, hidden_size = states.shape
    padding = -hidden_size % GROUP
    padded = np.pad(states.astype(np.float32), ((0, 0), (0, padding)))
    return padded.reshape(positions, -1, GROUP)
