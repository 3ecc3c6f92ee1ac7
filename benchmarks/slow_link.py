"""A link of 40 ms and 20 Mbit/s between two ports of this machine, and naive splitting over it."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import StreamingResponse

from vllm_effplugin.techniques.edge_cloud.link import PATH
from vllm_effplugin.techniques.edge_cloud.wire import Frame, FrameReader, Kind

ROUND_TRIP_S, BITS_PER_S = 0.040, 20e6
TIMEOUT_S = 300.0


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Lane:
    """One direction: bytes leave one after the other, and arrive half a round trip later."""

    def __init__(self) -> None:
        self.bytes = 0
        self._free = 0.0

    async def send(self, size: int) -> float:
        """Wait until so many bytes have left; when they arrive."""
        self.bytes += size
        now = time.monotonic()
        self._free = max(self._free, now) + 8 * size / BITS_PER_S
        await asyncio.sleep(self._free - now)
        return self._free + ROUND_TRIP_S / 2


class SlowLink:
    """A TCP proxy that shapes all its connections together.

    Args:
        port: where it leads, on this machine.
    """

    def __init__(self, port: int) -> None:
        self.up, self.down = Lane(), Lane()
        self.port, self._target = free_port(), port
        self._is_cut = False
        self._open: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        """Of its near end."""
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Accept connections."""
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port)

    def cut(self) -> None:
        """Break what is connected, and let nothing connect."""
        self._is_cut = True
        for writer in self._open:
            writer.transport.abort()

    def mend(self) -> None:
        """Let connections through again."""
        self._is_cut = False

    async def stop(self) -> None:
        """End all connections."""
        self.cut()
        self._server.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_writer = None
        try:
            if self._is_cut:
                return
            self._open.add(writer)
            await asyncio.sleep(ROUND_TRIP_S)  # the handshake
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
            await asyncio.gather(
                self._carry(reader, far_writer, self.up), self._carry(far_reader, writer, self.down)
            )
        except (OSError, asyncio.CancelledError):
            pass  # the connection broke, or the benchmark is over
        finally:
            self._open.discard(writer)
            for each in (writer, far_writer):
                if each is not None:
                    each.close()

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, lane: Lane
    ) -> None:
        arrivals: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        delivering = asyncio.ensure_future(self._deliver(arrivals, writer))
        try:
            while piece := await reader.read(1 << 14):
                arrivals.put_nowait((await lane.send(len(piece)), piece))
            arrivals.put_nowait((0.0, b""))
            await delivering
        finally:
            delivering.cancel()

    async def _deliver(
        self, arrivals: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter
    ) -> None:
        while True:
            arrival, piece = await arrivals.get()
            if not piece:
                with suppress(OSError):
                    writer.write_eof()
                return
            await asyncio.sleep(arrival - time.monotonic())
            writer.write(piece)
            await writer.drain()


class Relay:
    """What naive splitting does to a cloud: each question comes with all its hidden states.

    It stands between an edge, which it tells what its cloud would, and the link.

    Args:
        url: the link's near end.
    """

    def __init__(self, url: str) -> None:
        self.port = free_port()
        self._client = httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S)
        self._sessions: dict[bytes, list[Frame]] = {}
        self._model: dict[bytes, Frame] = {}
        self._ended: list[Frame] = []
        app = FastAPI()
        app.get(PATH)(self._describe)
        app.post(f"{PATH}/exchange")(self._exchange)
        config = uvicorn.Config(app, port=self.port, log_level="error", lifespan="off")
        self._server = uvicorn.Server(config)
        self._hidden_size = 0

    @property
    def url(self) -> str:
        """For the edge."""
        return f"http://127.0.0.1:{self.port}"

    async def serve(self) -> None:
        """Until it is cancelled."""
        await self._server.serve()

    async def _describe(self) -> Any:
        try:
            found = (await self._client.get(PATH)).json()
        except httpx.HTTPError as error:
            raise HTTPException(503, str(error)) from None
        self._hidden_size = found["hidden_size"]
        return found

    async def _exchange(self, request: Request) -> StreamingResponse:
        reader = FrameReader(self._hidden_size, 1 << 30)
        frames = list(reader.feed(await request.body()))
        asked = []
        for frame in frames:
            if frame.kind is Kind.OPEN:
                self._model[frame.session] = frame
                self._sessions[frame.session] = []
            elif frame.kind is Kind.APPEND:
                self._sessions[frame.session].append(frame)
            elif frame.kind is Kind.ASK:
                asked.append(frame)
            elif frame.kind is Kind.CLOSE:
                self._sessions.pop(frame.session, None)
        return StreamingResponse(self._answers(asked))

    async def _answers(self, asked: list[Frame]) -> AsyncIterator[bytes]:
        for answer in asyncio.as_completed([self._ask(frame) for frame in asked]):
            yield await answer

    async def _ask(self, question: Frame) -> bytes:
        name = os.urandom(16)
        known = [self._model[question.session], *self._sessions[question.session], question]
        frames = [
            Frame(each.kind, name, each.position, each.count, each.encoding, each.payload)
            for each in known
        ]
        ended, self._ended = self._ended, []
        message = b"".join(frame.pack() for frame in (*ended, *frames))
        # Another client each time, so that nothing is found again.
        headers = {"Authorization": name.hex()}
        response = await self._client.post(f"{PATH}/exchange", content=message, headers=headers)
        self._ended.append(Frame(Kind.CLOSE, name))
        said = FrameReader(self._hidden_size, 1 << 16).feed(response.content)
        [answer] = [each for each in said if each.kind is not Kind.HELD]
        back = Frame(answer.kind, question.session, answer.position, payload=answer.payload)
        return back.pack()
