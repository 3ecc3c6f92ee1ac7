"""The cloud's side of the wire: what frames ask for, done by the engine.

One engine request per session that is being computed: a resumable one (vLLM's streaming input),
which gets the hidden states of a few more positions with every token that is asked for, and keeps
its cache in between.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_effplugin.engine.counters import Counters
from vllm_effplugin.techniques.edge_cloud.config import CloudConfig
from vllm_effplugin.techniques.edge_cloud.contexts import Context, Contexts, LimitError, Owner
from vllm_effplugin.techniques.edge_cloud.totals import CLOUD_TOTALS, REFUSALS
from vllm_effplugin.techniques.edge_cloud.wire import (
    Frame,
    Kind,
    WireError,
    json_frame,
    token_frame,
)

logger = logging.getLogger(__name__)

MISSING_S = 5.0
"""Seconds that a question waits for hidden states which have not come, before it asks for them."""

TIDY_S = 1.0


class Sampling(BaseModel):
    """How the token of an ASK is drawn: greedily, if nothing is said."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    temperature: float = Field(0.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)


class Stream(Protocol):
    """A session's request in an engine."""

    async def next(self, states: np.ndarray, sampling: Sampling) -> int:
        """Run `[n, d]` hidden states of its next positions; the token behind the last."""
        ...

    async def close(self) -> None:
        """Give up its cache."""
        ...


class Engine(Protocol):
    """What runs the upper layers."""

    @property
    def hidden_size(self) -> int:
        """Channels of a hidden state."""
        ...

    @property
    def most_positions(self) -> int:
        """Positions of a request."""
        ...

    @property
    def most_streams(self) -> int:
        """Requests that it holds at a time."""
        ...

    @property
    def most_blocks(self) -> int:
        """Blocks of its cache."""
        ...

    @property
    def block_size(self) -> int:
        """Positions of a block."""
        ...

    def open(self, name: str, salt: str) -> Stream:
        """A request without any position yet.

        Args:
            name: unique.
            salt: requests of one salt may share what they have in common.
        """
        ...


@dataclass(eq=False)
class _Part:
    """A session's part of the engine, and what waits for it."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    stream: Stream | None = None


class _Closed(Exception):
    """A session has ended, and with it what was asked of it."""


class CloudService:
    """Answers messages.

    Args:
        config: of the checkpoint.
        engine: that runs it.
        totals: what it counts (totals.py).
    """

    def __init__(self, config: CloudConfig, engine: Engine, totals: Counters | None = None) -> None:
        self.config, self.engine = config, engine
        most = min(config.limits.sequence or engine.most_positions, engine.most_positions)
        self.limits = config.limits.model_copy(update={"sequence": most})
        self.totals = Counters(CLOUD_TOTALS) if totals is None else totals
        self.contexts = Contexts(self.limits, self._release, self.totals)
        self._parts: dict[Context, _Part] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing: set[asyncio.Task[Any]] = set()
        self._streams = 0

    async def tidy_for_ever(self) -> None:
        """Evict and forget what is idle."""
        while True:
            await asyncio.sleep(TIDY_S)
            self.contexts.tidy()
            self.totals.set("sessions", len(self.contexts))
            self.totals.set("live", self.contexts.live)
            self.totals.set("positions", self.contexts.positions)

    def describe(self) -> dict[str, Any]:
        """What a client has to know."""
        return {
            "model": self.config.model,
            "partition": self.config.partition,
            "hidden_size": self.engine.hidden_size,
            "limits": self.limits.model_dump(),
        }

    async def exchange(self, owner: Owner, frames: Iterable[Frame]) -> AsyncIterator[Frame]:
        """Do what frames say; their replies, as they come.

        A session's first reply says what is held of it. Answers follow in whatever order the engine
        gives them; what was asked goes on when nobody listens any more, and is kept.
        """
        heard: dict[bytes, Context | None] = {}
        asked: list[tuple[Context, Frame]] = []
        refused: set[bytes] = set()
        for frame in frames:
            try:
                context = self._hear(owner, frame)
                if context is None:
                    if frame.kind is not Kind.CLOSE:
                        heard[frame.session] = None
                    continue
                heard[frame.session] = context
                # Whose states were refused was told why, and they will not come.
                missing = frame.session in refused and context.held <= frame.position
                if frame.kind is Kind.ASK and not missing:
                    asked.append((context, frame))
            except (LimitError, WireError) as error:
                refused.add(frame.session)
                known = self.contexts.find(owner, frame.session)
                if known is not None:
                    heard[frame.session] = known
                code = error.code if isinstance(error, LimitError) else "frame"
                yield self._refused(frame, code, str(error))
        for session, context in heard.items():
            if context is None:  # unknown here: never opened, forgotten, or somebody else's
                self.totals.add("replays", 1)
                yield Frame(Kind.REPLAY, session)
            else:
                yield Frame(Kind.HELD, session, context.held)
        answers = [self._spawn(self._answer(context, frame)) for context, frame in asked]
        for answer in asyncio.as_completed(answers):
            yield await answer

    def _hear(self, owner: Owner, frame: Frame) -> Context | None:
        if frame.kind is Kind.OPEN:
            wanted = frame.json()
            if wanted.get("model") != self.config.model:
                raise LimitError(
                    "model",
                    f"this is the cloud of {self.config.model!r}, not of {wanted.get('model')!r}",
                )
            return self.contexts.open(owner, frame.session)
        context = self.contexts.find(owner, frame.session)
        if context is None:
            return None
        if frame.kind is Kind.APPEND:
            self.contexts.append(context, frame.position, frame.states(self.engine.hidden_size))
            self._part(context).arrived.set()
        elif frame.kind is Kind.CLOSE:
            self.contexts.close(context)
            return None
        elif frame.kind is not Kind.ASK:
            raise WireError(f"{frame.kind.name} is for clients only")
        return context

    # --- Answers ---------------------------------------------------------------------------------

    async def _answer(self, context: Context, frame: Frame) -> Frame:
        position = frame.position
        context.busy += 1
        try:
            sampling = _sampling(frame.json())
            self.contexts.check_length(position + 1)
            part = self._part(context)
            async with part.lock:
                if context.answered is not None and context.answered[0] == position:
                    return token_frame(frame.session, position, context.answered[1], 0.0)
                here = await self._has(context, part, position)
                if context.closed:
                    raise _Closed
                if not here:
                    self.totals.add("replays", 1)
                    return Frame(Kind.REPLAY, frame.session, context.held)
                began = time.perf_counter()
                token = await self._compute(context, part, position, sampling)
                seconds = time.perf_counter() - began
                context.answered = (position, token)
                self.totals.add("tokens", 1)
                self.totals.add("engine_us", round(1e6 * seconds))
                return token_frame(frame.session, position, token, seconds)
        except _Closed:
            return Frame(Kind.REPLAY, frame.session)
        except LimitError as error:
            return self._refused(frame, error.code, str(error))
        except WireError as error:
            return self._refused(frame, "frame", str(error))
        except Exception as error:
            logger.exception("a token could not be computed")
            return self._refused(frame, "engine", f"{type(error).__name__}: {error}")
        finally:
            context.busy -= 1

    async def _has(self, context: Context, part: _Part, position: int) -> bool:
        """Whether the hidden states up to a position are there, or come soon."""
        deadline = time.monotonic() + MISSING_S
        while context.held <= position and not context.closed:
            part.arrived.clear()
            left = deadline - time.monotonic()
            try:
                await asyncio.wait_for(part.arrived.wait(), max(0.0, left))
            except TimeoutError:
                return False
        return True

    async def _compute(
        self, context: Context, part: _Part, position: int, sampling: Sampling
    ) -> int:
        if position < context.computed:
            # The token behind it was computed and is not known any more: its cache goes on behind.
            await self._stop(context, part)
        self._make_room(context, position + 1)
        if part.stream is None:
            name = f"edge-cloud-{context.session.hex()}-{time.monotonic_ns()}"
            part.stream = self.engine.open(name, context.owner.hex())
            self._streams += 1
        try:
            if self._closing:  # what made room may still be in the engine
                await asyncio.wait(set(self._closing))
            if part.stream is None:
                raise _Closed
            return await part.stream.next(self.contexts.take(context, position), sampling)
        except BaseException:
            await self._stop(context, part)
            raise

    def _make_room(self, context: Context, end: int) -> None:
        """Evict what is idle until the engine has room for a session's positions.

        Raises:
            LimitError: where there is not enough.
        """
        while (
            self._streams + (self._part(context).stream is None) > self.engine.most_streams
            or self._blocks(context, end) > self.engine.most_blocks
        ):
            idle = self.contexts.idle()
            if idle is None:
                raise LimitError("full", "the cloud's engine is full: try again later")
            self.contexts.evict(idle)

    def _blocks(self, context: Context, end: int) -> int:
        size = self.engine.block_size
        others = (part for part in self._parts if part is not context)
        return -(-(end + 1) // size) + sum(-(-(other.computed + 1) // size) for other in others)

    # --- Parts of the engine ---------------------------------------------------------------------

    def _part(self, context: Context) -> _Part:
        if context.closed:
            raise _Closed
        return self._parts.setdefault(context, _Part())

    def _release(self, context: Context) -> None:
        part = self._parts.pop(context, None)
        if part is None:
            return
        part.arrived.set()  # who waits for more may find that none will come
        if part.stream is not None:
            # Taken out: who waits for its token may find it gone.
            stream, part.stream = part.stream, None
            self._streams -= 1
            task = self._spawn(stream.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _stop(self, context: Context, part: _Part) -> None:
        context.computed = 0
        stream, part.stream = part.stream, None
        if stream is not None:
            self._streams -= 1
            await stream.close()

    def _refused(self, frame: Frame, code: str, message: str) -> Frame:
        self.totals.add("refusals", 1, REFUSALS.index(code))
        content = {"code": code, "message": message}
        return json_frame(Kind.ERROR, frame.session, content, frame.position)

    def _spawn(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _sampling(content: Mapping[str, Any]) -> Sampling:
    try:
        return Sampling.model_validate(content)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise WireError(problems) from None
