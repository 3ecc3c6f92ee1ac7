"""Routes of the API server: the cloud of a split model.

Loaded where `VLLM_PLUGINS` names `effplugin`, which is vLLM's rule for plugins that add routes.
They lie under `/v1`, so that `--api-key` guards them.
"""

from __future__ import annotations

import asyncio
import hashlib
from argparse import Namespace
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from fastapi import APIRouter, FastAPI, HTTPException, Request
from fastapi.responses import StreamingResponse
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient, StreamingInput
from vllm.inputs.engine import tokens_input
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.tasks import SupportedTask

from vllm_effplugin.engine.counters import publish_for
from vllm_effplugin.engine.settings import STATES, efficiency_of
from vllm_effplugin.errors import UnsupportedError
from vllm_effplugin.techniques.edge_cloud.config import CloudConfig
from vllm_effplugin.techniques.edge_cloud.service import CloudService, Sampling
from vllm_effplugin.techniques.edge_cloud.totals import CLOUD_TOTALS
from vllm_effplugin.techniques.edge_cloud.wire import Frame, FrameReader, WireError

router = APIRouter(prefix="/v1/edge_cloud", tags=["edge_cloud"])


class Endpoints:
    """For the entry point in `vllm.endpoint_plugins`."""

    name = "effplugin"
    required_tasks: tuple[SupportedTask, ...] = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(router)

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        state.effplugin_cloud = None
        if engine_client is None:
            return
        config = efficiency_of(engine_client.vllm_config.model_config.hf_config).edge_cloud
        if not isinstance(config, CloudConfig):
            return
        if (getattr(args, "api_server_count", None) or 1) > 1:
            raise UnsupportedError(
                "--api-server-count > 1, which --data-parallel-size > 1 stands for as well, is not "
                "supported with the cloud of a split model, whose sessions live in one API server: "
                "set --api-server-count 1, and scale out with --data-parallel-size or with "
                "replicas behind a router"
            )
        totals = publish_for(state, engine_client.vllm_config, CLOUD_TOTALS, "cloud")
        service = CloudService(config, _Engine(engine_client), totals)
        state.effplugin_cloud = service
        state.effplugin_cloud_tidy = asyncio.create_task(service.tidy_for_ever())


@router.get("")
async def describe(request: Request) -> dict[str, Any]:
    """Which model this is the cloud of, and what clients may take."""
    return _service(request).describe()


@router.post("/exchange")
async def exchange(request: Request) -> StreamingResponse:
    """Frames in, frames out (techniques/edge_cloud/wire.py)."""
    service = _service(request)
    most = service.limits.message_bytes
    reader = FrameReader(service.engine.hidden_size, most)
    frames: list[Frame] = []
    size = 0
    try:
        async for piece in request.stream():
            size += len(piece)
            service.totals.add("bytes_in", len(piece))
            if size > most:
                raise HTTPException(413, f"a message has at most {most} bytes")
            frames += reader.feed(piece)
        reader.end()
    except WireError as error:
        raise HTTPException(400, str(error)) from None
    key = request.headers.get("authorization", "")
    owner = hashlib.sha256(key.encode()).digest()

    async def replies() -> AsyncIterator[bytes]:
        async for frame in service.exchange(owner, frames):
            packed = frame.pack()
            service.totals.add("bytes_out", len(packed))
            yield packed

    return StreamingResponse(replies(), media_type="application/octet-stream")


def _service(request: Request) -> CloudService:
    service = request.app.state.effplugin_cloud
    if service is None:
        raise HTTPException(404, "the model served here is not the cloud of a split model")
    found: CloudService = service
    return found


class _Engine:
    """vLLM's engine, for the service."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        config = client.vllm_config
        replicas = config.parallel_config.data_parallel_size
        self.hidden_size = int(config.model_config.get_hidden_size())
        self.most_streams = config.scheduler_config.max_num_seqs * replicas
        self.block_size = config.cache_config.block_size
        # Room for a token behind them, which the engine wants although it drops it.
        self.most_positions = config.model_config.max_model_len - 1
        # One block of each engine is nobody's.
        self.most_blocks = (config.cache_config.num_gpu_blocks or 0) - replicas

    def open(self, name: str, salt: str) -> _Stream:
        return _Stream(self._client, name, salt)


class _Stream:
    """A resumable request. Its prompt grows; of each turn's one token nothing stays in it."""

    def __init__(self, client: EngineClient, name: str, salt: str) -> None:
        self._salt = salt
        self._running = asyncio.Lock()
        self._inputs: asyncio.Queue[StreamingInput | None] = asyncio.Queue()
        self._outputs = client.generate(self._fed(), _params(Sampling(), b""), name)

    async def _fed(self) -> Any:
        while (item := await self._inputs.get()) is not None:
            yield item

    async def next(self, states: np.ndarray, sampling: Sampling) -> int:
        params = _params(sampling, states.astype("<f4").tobytes())
        # Ids that stand for positions; the scheduler puts the hidden states in their place.
        prompt = tokens_input([0] * len(states), cache_salt=self._salt)
        async with self._running:
            self._inputs.put_nowait(StreamingInput(prompt, params))
            async for output in self._outputs:
                if output.outputs and output.outputs[0].token_ids:
                    return int(output.outputs[0].token_ids[-1])
        raise RuntimeError("the engine ended the session")

    async def close(self) -> None:
        self._inputs.put_nowait(None)
        async with self._running:  # a token that nobody waits for any more
            await self._outputs.aclose()


def _params(sampling: Sampling, states: bytes) -> SamplingParams:
    return SamplingParams(
        max_tokens=1,
        detokenize=False,
        ignore_eos=True,
        output_kind=RequestOutputKind.DELTA,
        extra_args={STATES: states},
        **sampling.model_dump(),
    )
