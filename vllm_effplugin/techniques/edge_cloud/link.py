"""The edge's side of the wire: uploads in the background, questions, and what becomes of them.

The engine's thread hands over hidden states and questions, and polls for answers; everything else
happens in a thread of its own. Every question has exactly one outcome: the cloud's token, or the
reason why there is none.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import re
import secrets
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_effplugin.engine.counters import Counters
from vllm_effplugin.errors import ConfigError
from vllm_effplugin.techniques.edge_cloud.config import Transport
from vllm_effplugin.techniques.edge_cloud.totals import LINK_TOTALS
from vllm_effplugin.techniques.edge_cloud.wire import (
    SESSION_BYTES,
    Encoding,
    Frame,
    FrameReader,
    Kind,
    WireError,
    append_frame,
    json_frame,
)

logger = logging.getLogger(__name__)

PATH = "/v1/edge_cloud"
SESSION_HEADER = "X-Session-ID"
"""The same for all that one edge says: what a router before several clouds has to go by."""

PROBE_S = 0.25
PROBE_TIMEOUT_S = 1.0
CONNECT_S = 2.0
KEPT_S = 3.0
"""Seconds that an unused connection is kept: less than the five after which vLLM's server closes
it, or a message might be sent into a connection that is just being closed."""

MESSAGE_BYTES = 2 << 20
"""Of one message, so that a long prompt does not hold up what others ask, and so that what lies in
this machine's buffers reaches the cloud within `CONNECT_S` over a link of 10 Mbit/s."""
APPEND_BYTES = 1 << 18
"""Of one frame's hidden states, if that is not one position."""
ROOM_BYTES = 1 << 16
"""Of a message, left for what is no hidden states."""
PIECE_BYTES = 1 << 16
"""That have to be taken within `CONNECT_S`."""
MOST_CLOSED = 1000
"""Sessions that one message closes."""

ANSWER_BYTES = 1 << 16


class LinkSettings(BaseModel):
    """Where the cloud is, and how to speak to it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str = Field(description="Of the cloud, without a path.")
    key: str = Field("", repr=False, description="API key of the cloud.")
    model: str = Field(min_length=1, description="Names the unsplit model's weights.")
    hidden_size: int = Field(ge=1)
    encoding: Transport = "fp16"
    deadline_s: float = Field(1.0, gt=0, description="For a token, from question to answer.")


class _CloudLimits(BaseModel):
    message_bytes: int = Field(ge=2 * APPEND_BYTES)


class _Cloud(BaseModel):
    """How a cloud describes itself, as far as an edge wants to know."""

    model: str
    hidden_size: int
    limits: _CloudLimits


def cloud_client(url: str, key: str, deadline_s: float) -> httpx.AsyncClient:
    """A client of the cloud at `url`.

    Args:
        key: API key of the cloud; empty without one.
        deadline_s: for an answer.

    Raises:
        ConfigError: where the URL, the key, or a proxy of the environment cannot be used.
    """
    headers = {SESSION_HEADER: secrets.token_hex(8)}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    limits = httpx.Limits(
        max_connections=128, max_keepalive_connections=32, keepalive_expiry=KEPT_S
    )
    # A connection may be silent for as long as an answer may take, and a little longer.
    timeout = httpx.Timeout(CONNECT_S, read=deadline_s + CONNECT_S)
    try:
        if not re.match(r"https?://", url):
            raise ValueError("it begins with neither http:// nor https://")
        if not httpx.URL(url).host:
            raise ValueError("it names no host")
        if key != key.strip() or not (key.isascii() and key.isprintable()):
            raise ValueError("its API key has blanks around it, or what no header can say")
        return httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=timeout)
    except (httpx.InvalidURL, ValueError, ImportError) as error:
        raise ConfigError(f"the cloud at {url!r} cannot be spoken to: {error}") from None


@dataclass(frozen=True)
class Outcome:
    """Of one question.

    Attributes:
        request, position: what was asked.
        token: the cloud's; None where the edge has to do with its own.
        reason: `cloud`, or why there is no token: `link`, `deadline`, or the cloud's own code, such
            as `full`.
        waited: seconds since the question.
        computed: of these, seconds that the cloud's engine took.
    """

    request: str
    position: int
    token: int | None
    reason: str
    waited: float = 0.0
    computed: float = 0.0


@dataclass(eq=False)
class _Talk:
    """What the cloud was told of one request.

    Attributes:
        session: the cloud's name of it.
        opened: whether the cloud was told so.
        chunks: all uploads, of which those from `next_chunk` on have to be sent.
        told: positions that were sent at least once.
        held: positions that the cloud said it holds.
        question: what is asked now.
        unsent: whether that has to be sent.
        asked_in: number of the message that it was sent in.
        unheard: number of a message whose frames of this session the cloud has said nothing of yet.
            Messages may overtake each other, so that until then nothing more of it is sent.
        refused: whether the cloud would not have what it was sent. It is tried again with the next
            question.
        over: why the cloud will never give a token of it.
    """

    session: bytes
    opened: bool = False
    chunks: list[Frame] = field(default_factory=list)
    next_chunk: int = 0
    told: int = 0
    held: int = 0
    question: Frame | None = None
    unsent: bool = False
    asked_in: int = 0
    unheard: int | None = None
    refused: bool = False
    over: str | None = None

    def asks(self, position: int) -> bool:
        """Whether this is what it waits for."""
        return self.question is not None and self.question.position == position

    def rewind(self, held: int) -> None:
        """The cloud holds so many positions: what is behind them goes up once more."""
        self.held = held
        ends = (chunk.position + chunk.count for chunk in self.chunks)
        self.next_chunk = sum(end <= held for end in ends)


def _asks_now(talk: _Talk) -> bool:
    """Whether something has to be sent that an answer depends on."""
    if talk.unheard is not None or talk.refused or talk.question is None:
        return False
    return talk.unsent or talk.next_chunk < len(talk.chunks)


@dataclass(eq=False)
class _Upload:
    """A message on its way that is longer than a piece.

    Attributes:
        size: its bytes.
        taken: when one of its pieces was taken last.
    """

    size: int
    taken: float = -math.inf


def _next_bytes(talk: _Talk) -> int:
    """Of what has to be sent of a request at least, if anything is."""
    return talk.chunks[talk.next_chunk].size if talk.next_chunk < len(talk.chunks) else 0


class Link:
    """The connection of one engine to its cloud.

    Args:
        settings: where the cloud is.
        totals: what it counts (totals.py).

    Raises:
        ConfigError: where there can be no connection at all.
    """

    def __init__(self, settings: LinkSettings, totals: Counters | None = None) -> None:
        self.settings = settings
        self._client = cloud_client(settings.url, settings.key, settings.deadline_s)
        self.totals = Counters(LINK_TOTALS) if totals is None else totals
        self.state = "down"
        """`up`, `down`, `broken`, or why the cloud turned this edge away. Changed by `_become`."""
        self._encoding = Encoding[settings.encoding.upper()]
        self._commands: deque[tuple[Any, ...]] = deque()
        self._answers: deque[Outcome] = deque()
        self._waiting: dict[str, tuple[int, float]] = {}
        self._added: dict[str, int] = {}
        self._talks: dict[str, _Talk] = {}
        self._by_session: dict[bytes, str] = {}
        self._closed: list[bytes] = []
        self._heard = 0.0
        self._uploads: dict[int, _Upload] = {}
        self._after: dict[int, list[bytes]] = {}
        """Sessions to close once a message is done, which might else open them again."""
        self._in_flight = 0
        self._messages = 0
        self._times_up = 0
        self._most_bytes = MESSAGE_BYTES
        self._loop = asyncio.new_event_loop()
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._run, name="effplugin-link", daemon=True)
        self._thread.start()

    # --- For the engine's thread -----------------------------------------------------------------

    @property
    def up(self) -> bool:
        """Whether a question makes sense now."""
        return self.state == "up"

    def add(self, request: str, position: int, states: np.ndarray) -> None:
        """Hand over `[n, d]` hidden states of a request's positions from `position` on.

        Those that were handed over before are left out: after a preemption they run again.
        """
        known = self._added.get(request, 0)
        if position > known:
            raise RuntimeError(f"hidden states of positions {known} to {position} are missing")
        new = states[known - position :]
        if len(new):
            self._added[request] = known + len(new)
            self._tell("add", request, known, new)

    def ask(self, request: str, position: int, sampling: Mapping[str, Any]) -> None:
        """Ask for the token behind a position. What lies before it has been handed over."""
        self._waiting[request] = position, time.monotonic()
        self.totals.add("questions", 1)
        self.totals.set("waiting", len(self._waiting))
        self._tell("ask", request, position, dict(sampling))

    def close(self, request: str) -> None:
        """A request has ended."""
        self._waiting.pop(request, None)
        self.totals.set("waiting", len(self._waiting))
        self._added.pop(request, None)
        self._tell("close", request)

    def _tell(self, *command: Any) -> None:
        if self.state != "broken":  # else nobody is there who would take it in
            self._commands.append(command)

    def flush(self) -> None:
        """Have what was handed over sent."""
        if self._commands:
            with contextlib.suppress(RuntimeError):  # the thread has ended
                self._loop.call_soon_threadsafe(self._wake.set)

    def poll(self) -> Iterator[Outcome]:
        """Questions that are over."""
        now = time.monotonic()
        while self._answers:
            found = self._answers.popleft()
            position, began = self._waiting.get(found.request, (-1, 0.0))
            if position == found.position:
                del self._waiting[found.request]
                yield self._over(replace(found, waited=now - began))
        for request, (position, began) in list(self._waiting.items()):
            if now - began > self.settings.deadline_s:
                del self._waiting[request]
                self._tell("late", request, position, began)
                self.flush()
                yield self._over(Outcome(request, position, None, "deadline", now - began))
        self.totals.set("waiting", len(self._waiting))

    def _over(self, outcome: Outcome) -> Outcome:
        self.totals.add("waited_us", round(1e6 * outcome.waited))
        self.totals.add("computed_us", round(1e6 * outcome.computed))
        return outcome

    def stop(self) -> None:
        """End the thread."""
        self._commands.append(("stop",))
        self.flush()
        self._thread.join(timeout=5)

    # --- The thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._talk_on())
        except Exception:
            logger.exception("the link to the cloud broke down; the edge goes on alone")
            self._become("broken")
            self._commands.clear()
        finally:
            self._loop.close()

    async def _talk_on(self) -> None:
        async with self._client as client:
            probing = asyncio.ensure_future(self._probe(client))
            try:
                while self._obey():
                    if self.up:
                        self._send(client)
                    await self._wake.wait()
                    self._wake.clear()
            finally:
                for task in (probing, *self._tasks):
                    task.cancel()

    def _obey(self) -> bool:
        """Take in what the engine's thread said; whether to go on."""
        while self._commands:
            match self._commands.popleft():
                case ("add", request, position, states):
                    self._append(self._talk(request), position, states)
                case ("ask", request, position, sampling):
                    talk = self._talk(request)
                    if talk.over is not None or not self.up:
                        reason = talk.over or "link"
                        self._answers.append(Outcome(request, position, None, reason))
                        continue
                    if talk.refused:
                        talk.refused = False
                        talk.rewind(talk.held)
                    talk.question = json_frame(Kind.ASK, talk.session, sampling, position)
                    talk.unsent = True
                case ("late", request, position, began):
                    known = self._talks.get(request)
                    if known is not None and known.asks(position):
                        known.question = None
                    # Silence, not slowness, unless an upload is still on its way.
                    since = time.monotonic() - CONNECT_S
                    uploading = any(upload.taken > since for upload in self._uploads.values())
                    if self._heard < began and self.up and not uploading:
                        self._go_down("deadline")
                case ("close", request):
                    known = self._talks.pop(request, None)
                    if known is not None:
                        del self._by_session[known.session]
                        self._leave(known)
                case ("stop",):
                    return False
        return True

    def _append(self, talk: _Talk, position: int, states: np.ndarray) -> None:
        if talk.over is not None:
            return
        step = max(1, APPEND_BYTES // self._encoding.size(1, self.settings.hidden_size))
        for first in range(0, len(states), step):
            part = states[first : first + step]
            talk.chunks.append(append_frame(talk.session, position + first, part, self._encoding))

    def _leave(self, talk: _Talk) -> None:
        """The cloud may forget a session, if it ever heard of it."""
        if not talk.told:
            return
        talk.told = 0
        if talk.unheard is None:
            self._closed.append(talk.session)
        else:
            self._after.setdefault(talk.unheard, []).append(talk.session)

    def _talk(self, request: str) -> _Talk:
        talk = self._talks.get(request)
        if talk is None:
            talk = self._talks[request] = _Talk(secrets.token_bytes(SESSION_BYTES))
            self._by_session[talk.session] = request
        return talk

    # --- Messages --------------------------------------------------------------------------------

    def _send(self, client: httpx.AsyncClient) -> None:
        """Send what is there to be sent. Uploads alone wait until nothing is under way."""
        while self._in_flight == 0 or any(map(_asks_now, self._talks.values())):
            frames = self._collect()
            if not frames:
                return
            self._in_flight += 1
            task = asyncio.ensure_future(self._exchange(client, frames, self._messages))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _collect(self) -> list[Frame]:
        frames: list[Frame] = []
        size = ROOM_BYTES
        number = self._messages + 1
        # Of long uploads one message's worth at a time: more would only queue up before the link.
        on_the_way = sum(upload.size for upload in self._uploads.values())
        room = max(self._most_bytes - on_the_way, ROOM_BYTES + PIECE_BYTES)
        talks = sorted(self._talks.values(), key=_asks_now, reverse=True)
        for talk in talks:
            if talk.unheard is not None or talk.refused:
                continue
            if not _asks_now(talk) and talk.next_chunk == len(talk.chunks):
                continue
            if size + _next_bytes(talk) > room:
                continue  # later
            talk.unheard = number
            if not talk.opened:
                talk.opened = True
                content = {"model": self.settings.model}
                frames.append(json_frame(Kind.OPEN, talk.session, content))
            for chunk in talk.chunks[talk.next_chunk :]:
                if size + chunk.size > room:
                    break
                frames.append(chunk)
                size += chunk.size
                talk.next_chunk += 1
                end = chunk.position + chunk.count
                new = max(0, end - max(talk.told, chunk.position))
                self.totals.add("uploaded", new)
                self.totals.add("repeated", chunk.count - new)
                talk.told = max(talk.told, end)
            everything = talk.next_chunk == len(talk.chunks)
            if talk.question is not None and talk.unsent and everything:
                frames.append(talk.question)
                size += talk.question.size
                talk.unsent, talk.asked_in = False, number
        frames += [Frame(Kind.CLOSE, session) for session in self._closed[:MOST_CLOSED]]
        del self._closed[:MOST_CLOSED]
        self._messages += bool(frames)
        if size > ROOM_BYTES + PIECE_BYTES:
            self._uploads[number] = _Upload(size)
        return frames

    async def _exchange(self, client: httpx.AsyncClient, frames: list[Frame], number: int) -> None:
        began, times_up = time.monotonic(), self._times_up
        message = b"".join(frame.pack() for frame in frames)
        headers = {"Content-Length": str(len(message))}
        self.totals.add("exchanges", 1)
        self.totals.add("bytes_up", len(message))
        reader = FrameReader(self.settings.hidden_size, ANSWER_BYTES)
        try:
            async with client.stream(
                "POST", f"{PATH}/exchange", content=self._pieces(message, number), headers=headers
            ) as response:
                self._uploads.pop(number, None)
                if response.status_code != 200:
                    await response.aread()
                    raise httpx.HTTPStatusError(
                        f"{response.status_code}: {response.text[:200]}",
                        request=response.request,
                        response=response,
                    )
                async for piece in response.aiter_raw():
                    self.totals.add("bytes_down", len(piece))
                    for frame in reader.feed(piece):
                        self._hear(frame, number)
                reader.end()
            # What it did not answer will not be answered.
            self._unanswered(frames, number)
        except (httpx.HTTPError, WireError) as error:
            self.totals.add("failures", 1)
            self._closed += [frame.session for frame in frames if frame.kind is Kind.CLOSE]
            slow = isinstance(error, httpx.TimeoutException) and self._heard > began
            if slow or times_up < self._times_up:  # or of a time before the link was lost
                self._unanswered(frames, number, lost=True)
            else:
                self._go_down(f"{type(error).__name__}: {error}")
        finally:
            self._uploads.pop(number, None)
            self._closed += self._after.pop(number, ())
            self._in_flight -= 1
            self._wake.set()

    async def _pieces(self, message: bytes, number: int) -> AsyncIterator[bytes]:
        """A body in pieces, so that a timeout is about one of them, and progress can be seen."""
        for first in range(0, len(message), PIECE_BYTES):
            yield message[first : first + PIECE_BYTES]
            if number in self._uploads:
                self._uploads[number].taken = time.monotonic()

    def _unanswered(self, frames: list[Frame], number: int, *, lost: bool = False) -> None:
        """No more replies come to a message.

        Args:
            lost: whether that says nothing of what arrived.
        """
        for session in {frame.session for frame in frames}:
            request = self._by_session.get(session)
            if request is None:
                continue
            talk = self._talks[request]
            if talk.unheard == number:
                talk.unheard = None
                if lost:
                    talk.rewind(talk.held)
            if talk.question is not None and talk.asked_in == number and not talk.unsent:
                self._end(request, talk, "link")

    def _hear(self, frame: Frame, number: int) -> None:
        self._heard = time.monotonic()
        request = self._by_session.get(frame.session)
        if request is None:
            return
        talk = self._talks[request]
        # Whether it is about the last that was sent; a late refusal may be about an older question.
        last = talk.unheard == number or (talk.asked_in == number and not talk.unsent)
        if talk.unheard == number:
            talk.unheard = None
            self._wake.set()
        if frame.kind is Kind.HELD:
            if frame.position < talk.held:  # it forgot the session, and was told of it anew
                talk.rewind(frame.position)
                self._wake.set()
            talk.held = frame.position
        elif frame.kind is Kind.REPLAY:
            talk.opened = talk.opened and frame.position > 0
            talk.rewind(frame.position)
            talk.unsent = talk.question is not None
        elif frame.kind is Kind.TOKEN and talk.asks(frame.position):
            talk.question = None
            token, seconds = frame.token()
            self._answers.append(Outcome(request, frame.position, token, "cloud", 0.0, seconds))
        elif frame.kind is Kind.ERROR:
            said = frame.json()
            code = str(said.get("code", "error"))
            if code == "model":
                self._turned_away(str(said.get("message")))
            elif code == "too_long":  # and gets no shorter
                talk.over = code
                talk.chunks.clear()
                talk.next_chunk = 0
                self._leave(talk)
            elif not last:
                return
            if code == "gap":  # what it holds it says next
                talk.rewind(talk.held)
            else:
                talk.refused = True
            self._end(request, talk, code)

    def _end(self, request: str, talk: _Talk, reason: str) -> None:
        """What a request waits for will not come."""
        if talk.question is not None:
            self._answers.append(Outcome(request, talk.question.position, None, reason))
            talk.question = None

    # --- Up and down -----------------------------------------------------------------------------

    def _become(self, state: str) -> None:
        self._times_up += state == "up"
        self.state = state
        self.totals.set("up", self.up)

    def _go_down(self, why: str) -> None:
        if self.up:
            logger.warning("the cloud is out of reach (%s): the edge goes on alone", why)
            self._become("down")
        for request, talk in self._talks.items():
            # What it held may be lost, or not: its first reply will say.
            talk.opened, talk.unheard, talk.refused = False, None, talk.over is not None
            talk.rewind(talk.held)
            self._end(request, talk, "link")

    def _turned_away(self, why: str) -> None:
        if self.state != why:
            logger.error("the cloud turned this edge away: %s", why)
        self._become(why)

    async def _probe(self, client: httpx.AsyncClient) -> None:
        """Find out when the cloud is there, and whether it is the right one."""
        while True:
            if not self.up:
                with contextlib.suppress(httpx.HTTPError):
                    response = await client.get(PATH, timeout=PROBE_TIMEOUT_S)
                    if response.status_code == 200:
                        self._meet(response.content)
                    elif response.status_code in (401, 403, 404):
                        self._turned_away(f"HTTP {response.status_code}: {response.text[:200]}")
            await asyncio.sleep(PROBE_S)

    def _meet(self, said: bytes) -> None:
        try:
            cloud = _Cloud.model_validate_json(said)
        except ValidationError as error:
            wrong = error.errors()[0]
            place = ".".join(map(str, wrong["loc"])) or "it"
            self._turned_away(f"what is there does not describe a cloud: {place}: {wrong['msg']}")
            return
        ours = self.settings.model, self.settings.hidden_size
        if ours != (cloud.model, cloud.hidden_size):
            self._turned_away(f"it is the cloud of {cloud.model!r}, this is an edge of {ours[0]!r}")
            return
        self._most_bytes = min(MESSAGE_BYTES, cloud.limits.message_bytes)
        logger.info("the cloud is there")
        self._become("up")
        self._wake.set()
