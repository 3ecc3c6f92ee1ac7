"""The edge's side of the wire: uploads in the background, questions, and what becomes of them.

The engine's thread hands over hidden states and questions, and polls for answers; everything else
happens in a thread of its own. Every question has exactly one outcome: the cloud's token, or the
reason why there is none.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from vllm_effplugin.engine.counters import Counters
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

MESSAGE_BYTES = 8 << 20
"""Of one message, so that a long prompt does not hold up what others ask."""

ANSWER_BYTES = 1 << 16


class LinkSettings(BaseModel):
    """Where the cloud is, and how to speak to it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str = Field(pattern=r"^https?://", description="Of the cloud, without a path.")
    key: str = Field("", repr=False, description="API key of the cloud.")
    model: str = Field(min_length=1, description="Names the unsplit model's weights.")
    hidden_size: int = Field(ge=1)
    encoding: Transport = "fp16"
    deadline_s: float = Field(1.0, gt=0, description="For a token, from question to answer.")


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
    if talk.unheard is not None or talk.question is None:
        return False
    return talk.unsent or talk.next_chunk < len(talk.chunks)


class Link:
    """The connection of one engine to its cloud.

    Args:
        settings: where the cloud is.
        totals: what it counts (totals.py).
    """

    def __init__(self, settings: LinkSettings, totals: Counters | None = None) -> None:
        self.settings = settings
        self.totals = Counters(LINK_TOTALS) if totals is None else totals
        self.state = "down"
        """`up`, `down`, or why the cloud turned this edge away. Changed by `_become` alone."""
        self._encoding = Encoding[settings.encoding.upper()]
        self._commands: deque[tuple[Any, ...]] = deque()
        self._answers: deque[Outcome] = deque()
        self._waiting: dict[str, tuple[int, float]] = {}
        self._added: dict[str, int] = {}
        self._talks: dict[str, _Talk] = {}
        self._by_session: dict[bytes, str] = {}
        self._closed: list[bytes] = []
        self._heard = 0.0
        self._in_flight = 0
        self._messages = 0
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
            self._commands.append(("add", request, known, new))

    def ask(self, request: str, position: int, sampling: Mapping[str, Any]) -> None:
        """Ask for the token behind a position. What lies before it has been handed over."""
        self._waiting[request] = position, time.monotonic()
        self.totals.add("questions", 1)
        self.totals.set("waiting", len(self._waiting))
        self._commands.append(("ask", request, position, dict(sampling)))

    def close(self, request: str) -> None:
        """A request has ended."""
        self._waiting.pop(request, None)
        self.totals.set("waiting", len(self._waiting))
        self._added.pop(request, None)
        self._commands.append(("close", request))

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
                self._commands.append(("late", request, position, began))
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
        finally:
            self._loop.close()

    async def _talk_on(self) -> None:
        headers = {SESSION_HEADER: secrets.token_hex(8)}
        if self.settings.key:
            headers["Authorization"] = f"Bearer {self.settings.key}"
        limits = httpx.Limits(
            max_connections=128, max_keepalive_connections=32, keepalive_expiry=KEPT_S
        )
        # A connection may be silent for as long as an answer may take, and a little longer.
        timeout = httpx.Timeout(CONNECT_S, read=self.settings.deadline_s + CONNECT_S)
        async with httpx.AsyncClient(
            base_url=self.settings.url, headers=headers, limits=limits, timeout=timeout
        ) as client:
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
                    talk = self._talk(request)
                    talk.chunks.append(append_frame(talk.session, position, states, self._encoding))
                case ("ask", request, position, sampling):
                    if not self.up:
                        self._answers.append(Outcome(request, position, None, "link"))
                        continue
                    talk = self._talk(request)
                    talk.question = json_frame(Kind.ASK, talk.session, sampling, position)
                    talk.unsent = True
                case ("late", request, position, began):
                    known = self._talks.get(request)
                    if known is not None and known.asks(position):
                        known.question = None
                    if self._heard < began and self.up:
                        self._go_down("deadline")  # silence, not slowness
                case ("close", request):
                    known = self._talks.pop(request, None)
                    if known is not None:
                        del self._by_session[known.session]
                        if known.opened and self.up:
                            self._closed.append(known.session)
                case ("stop",):
                    return False
        return True

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
        size = 0
        number = self._messages + 1
        talks = sorted(self._talks.values(), key=_asks_now, reverse=True)
        for talk in talks:
            if talk.unheard is not None:
                continue
            if not _asks_now(talk) and talk.next_chunk == len(talk.chunks):
                continue
            if size > MESSAGE_BYTES:
                break
            talk.unheard = number
            if not talk.opened:
                talk.opened = True
                content = {"model": self.settings.model}
                frames.append(json_frame(Kind.OPEN, talk.session, content))
            for chunk in talk.chunks[talk.next_chunk :]:
                frames.append(chunk)
                size += len(chunk.payload)
                end = chunk.position + chunk.count
                new = max(0, end - max(talk.told, chunk.position))
                self.totals.add("uploaded", new)
                self.totals.add("repeated", chunk.count - new)
                talk.told = max(talk.told, end)
            talk.next_chunk = len(talk.chunks)
            if talk.question is not None and talk.unsent:
                frames.append(talk.question)
                talk.unsent, talk.asked_in = False, number
        frames += [Frame(Kind.CLOSE, session) for session in self._closed]
        self._closed.clear()
        self._messages += bool(frames)
        return frames

    async def _exchange(self, client: httpx.AsyncClient, frames: list[Frame], number: int) -> None:
        message = b"".join(frame.pack() for frame in frames)
        self.totals.add("exchanges", 1)
        self.totals.add("bytes_up", len(message))
        reader = FrameReader(self.settings.hidden_size, ANSWER_BYTES)
        try:
            async with client.stream("POST", f"{PATH}/exchange", content=message) as response:
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
            self._go_down(f"{type(error).__name__}: {error}")
        finally:
            self._in_flight -= 1
            self._wake.set()

    def _unanswered(self, frames: list[Frame], number: int) -> None:
        for session in {frame.session for frame in frames}:
            request = self._by_session.get(session)
            if request is None:
                continue
            talk = self._talks[request]
            if talk.unheard == number:
                talk.unheard = None
            if talk.question is not None and talk.asked_in == number and not talk.unsent:
                self._end(request, talk, "link")

    def _hear(self, frame: Frame, number: int) -> None:
        self._heard = time.monotonic()
        request = self._by_session.get(frame.session)
        if request is None:
            return
        talk = self._talks[request]
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
            self._end(request, talk, code)

    def _end(self, request: str, talk: _Talk, reason: str) -> None:
        """What a request waits for will not come."""
        if talk.question is not None:
            self._answers.append(Outcome(request, talk.question.position, None, reason))
            talk.question = None

    # --- Up and down -----------------------------------------------------------------------------

    def _become(self, state: str) -> None:
        self.state = state
        self.totals.set("up", self.up)

    def _go_down(self, why: str) -> None:
        if self.up:
            logger.warning("the cloud is out of reach (%s): the edge goes on alone", why)
            self._become("down")
        for request, talk in self._talks.items():
            # What it held may be lost, or not: its first reply will say.
            talk.opened, talk.unheard = False, None
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
                with contextlib.suppress(httpx.HTTPError, ValueError):
                    response = await client.get(PATH, timeout=PROBE_TIMEOUT_S)
                    if response.status_code == 200:
                        self._meet(response.json())
                    elif response.status_code in (401, 403, 404):
                        self._turned_away(f"HTTP {response.status_code}: {response.text[:200]}")
            await asyncio.sleep(PROBE_S)

    def _meet(self, cloud: Mapping[str, Any]) -> None:
        ours = self.settings.model, self.settings.hidden_size
        theirs = cloud.get("model"), cloud.get("hidden_size")
        if ours != theirs:
            self._turned_away(f"it is the cloud of {theirs[0]!r}, this is an edge of {ours[0]!r}")
            return
        logger.info("the cloud is there")
        self._become("up")
        self._wake.set()
