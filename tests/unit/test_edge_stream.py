"""A session's request in the engine."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np

from vllm_effplugin.engine.endpoint import _Stream
from vllm_effplugin.techniques.edge_cloud.service import Sampling


class Client:
    """An engine that answers when it is told to."""

    def __init__(self) -> None:
        self.may_answer, self.ended = asyncio.Event(), False

    async def generate(self, inputs: Any, params: Any, name: str) -> Any:
        try:
            async for _ in inputs:
                await self.may_answer.wait()
                yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=[7])])
        finally:
            self.ended = True


def test_a_session_may_end_while_a_token_is_computed() -> None:
    """Its client has gone: the token is given to nobody, and the request ends."""

    async def asked_and_closed() -> None:
        client = Client()
        stream = _Stream(client, "session", "salt")  # type: ignore[arg-type]
        asked = asyncio.create_task(stream.next(np.ones((2, 4), np.float32), Sampling()))
        await asyncio.sleep(0)
        closed = asyncio.create_task(stream.close())
        await asyncio.sleep(0)
        client.may_answer.set()
        assert await asked == 7
        await closed
        assert client.ended

    asyncio.run(asked_and_closed())
