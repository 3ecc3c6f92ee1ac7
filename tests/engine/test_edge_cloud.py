"""The cloud of a split model on vLLM's engine: its tokens are the whole model's."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import LAYERS, VOCAB, isolated, make_checkpoint
from vllm_effplugin.config import EfficiencyConfig
from vllm_effplugin.techniques.edge_cloud.config import CloudConfig
from vllm_effplugin.techniques.edge_cloud.service import CloudService
from vllm_effplugin.techniques.edge_cloud.split import model_name, write_part
from vllm_effplugin.techniques.edge_cloud.wire import (
    Encoding,
    Frame,
    Kind,
    append_frame,
    json_frame,
)

PARTITION = 5
TOKENS = 12
OWNER = bytes(32)
Talk = Callable[[CloudService, "Whole"], Coroutine[Any, Any, None]]


class Whole:
    """The unsplit model in plain PyTorch."""

    def __init__(self, model: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    @torch.inference_mode()
    def run(self, ids: list[int]) -> tuple[np.ndarray, int]:
        """Hidden states at the partition, `[n, d]`, and the next token."""
        found = self.model(torch.tensor([ids]), output_hidden_states=True)
        return found.hidden_states[PARTITION][0].numpy(), int(found.logits[0, -1].argmax())


def split(folder: Path, family: str) -> tuple[Path, Path]:
    """A model, and its cloud."""
    whole = make_checkpoint(folder / "whole", family)
    config = CloudConfig(role="cloud", model=model_name(whole), partition=PARTITION)
    efficiency = EfficiencyConfig(edge_cloud=config)
    write_part(whole, folder / "cloud", PARTITION, LAYERS, efficiency, work=folder, provenance={})
    return whole, folder / "cloud"


@asynccontextmanager
async def serving(cloud: Path, **options: Any) -> AsyncIterator[CloudService]:
    """The cloud's service over an engine of its own."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from vllm_effplugin.config.checkpoint import read_efficiency
    from vllm_effplugin.engine.endpoint import _Engine

    settings = {
        "dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True,
        "max_model_len": 256, "max_num_seqs": 8, "kv_cache_memory_bytes": 1 << 26, "block_size": 32,
        **options,
    }  # fmt: skip
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(cloud), **settings))
    try:
        config = read_efficiency(cloud).edge_cloud
        assert config is not None
        yield CloudService(config, _Engine(engine))
    finally:
        engine.shutdown()


async def say(service: CloudService, *frames: Frame) -> list[Frame]:
    return [frame async for frame in service.exchange(OWNER, frames)]


async def converse(service: CloudService, whole: Whole, seed: int, often: float) -> None:
    """A client that asks for a share of its tokens, and knows the others itself."""
    luck, session = random.Random(seed), bytes([seed + 1]) * 16
    ids = [luck.randrange(3, VOCAB) for _ in range(luck.randrange(4, 90))]
    frames = [json_frame(Kind.OPEN, session, {"model": service.config.model})]
    sent = 0
    for _ in range(TOKENS):
        states, token = whole.run(ids)
        while sent < len(ids):  # in pieces, at times the same twice
            end = min(len(ids), sent + luck.randrange(1, 50))
            piece = append_frame(session, sent, states[sent:end], Encoding.FP32)
            frames += [piece] * luck.choice((1, 1, 2))
            sent = end
        if luck.random() < often:
            [_, answer] = await say(
                service, *frames, json_frame(Kind.ASK, session, {}, len(ids) - 1)
            )
            assert answer.kind is Kind.TOKEN, answer
            assert answer.token()[0] == token
            frames = []
        ids.append(token)
    await say(service, *frames, Frame(Kind.CLOSE, session))


def run(folder: Path, family: str, talk: Talk, options: dict[str, Any]) -> None:
    whole, cloud = split(folder, family)

    async def main() -> None:
        async with serving(cloud, **options) as service:
            await talk(service, Whole(whole))

    asyncio.run(main())


async def many(service: CloudService, whole: Whole) -> None:
    sessions = range(6)
    await asyncio.gather(*(converse(service, whole, n, (1, 0.4)[n % 2]) for n in sessions))
    totals = service.contexts.totals
    assert totals["received"] >= totals["computed"] > 200
    assert totals["recomputed"] == 0
    assert totals["repeated"] > 0
    assert (totals["opened"], totals["closed"]) == (6, 6)


async def everything(service: CloudService, whole: Whole) -> None:
    """Engines take longer to start than all of this."""
    await many(service, whole)
    await refused(service, whole)
    await drawn(service, whole)
    await to_the_end(service, whole)
    await crowded(service, whole)


@pytest.mark.works(
    "cloud", "V1 on CPU", "chunked prefill", "async scheduling", "tensor parallelism"
)
@pytest.mark.works("cloud", "temperature, seeds, `n`")
@pytest.mark.parametrize(
    ("family", "talk", "options"),
    [
        ("Llama", everything, {}),
        # Prompts in chunks.
        ("Qwen3", everything, {"max_num_batched_tokens": 32, "async_scheduling": True}),
        ("Llama", many, {"tensor_parallel_size": 2}),
    ],
)
def test_tokens_are_the_whole_models(tmp_path, monkeypatch, family, talk, options):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    isolated(run, tmp_path, family, talk, options)


async def drawn(service: CloudService, whole: Whole) -> None:
    """Tokens come as often as the whole model gives them, and for a seed always the same."""
    ids = [5, 40, 9, 77]
    states, _ = whole.run(ids)
    with torch.inference_mode():
        logits, best = whole.model(torch.tensor([ids])).logits[0, -1].topk(2)
    share = float(logits.softmax(-1)[0])
    assert 0.2 < share < 0.8
    seen: list[list[int]] = [[], []]
    for tokens in seen:
        for seed in range(100):
            session = bytes([100]) + seed.to_bytes(15)
            how = {"temperature": 1.0, "top_k": 2, "seed": seed}
            [_, answer] = await say(
                service,
                json_frame(Kind.OPEN, session, {"model": service.config.model}),
                append_frame(session, 0, states, Encoding.FP32),
                json_frame(Kind.ASK, session, how, len(ids) - 1),
            )
            tokens.append(answer.token()[0])
            await say(service, Frame(Kind.CLOSE, session))
    assert seen[0] == seen[1]
    assert set(seen[0]) == set(best.tolist())
    # Five standard deviations.
    assert abs(seen[0].count(int(best[0])) / 100 - share) < 0.25


async def to_the_end(service: CloudService, whole: Whole) -> None:
    """vLLM checks the length of each piece of a session, not that of all."""
    most, session = 255, bytes([101]) * 16  # --max-model-len 256, and a token behind them
    assert service.describe()["limits"]["sequence"] == most
    ids = [random.Random(9).randrange(3, VOCAB) for _ in range(most + 1)]
    states, _ = whole.run(ids)
    await say(service, json_frame(Kind.OPEN, session, {"model": service.config.model}))
    for start, end in ((0, 200), (200, most - 1), (most - 1, most)):
        upload = append_frame(session, start, states[start:end], Encoding.FP32)
        [_, answer] = await say(service, upload, json_frame(Kind.ASK, session, {}, end - 1))
        assert answer.token()[0] == whole.run(ids[:end])[1]
    more = append_frame(session, most, states[most:], Encoding.FP32)
    [error, held] = await say(service, more, json_frame(Kind.ASK, session, {}, most))
    assert (error.json()["code"], held.position) == ("too_long", most)
    await say(service, Frame(Kind.CLOSE, session))


async def crowded(service: CloudService, whole: Whole) -> None:
    """Sessions that lost their cache are computed again."""
    service.engine.most_streams = 3
    for _ in range(2):
        for n in range(5):
            await converse_a_little(service, whole, n)
    totals = service.contexts.totals
    assert totals["evicted"] >= 5
    assert totals["recomputed"] >= 50
    assert service.contexts.live <= 3


async def converse_a_little(service: CloudService, whole: Whole, seed: int) -> None:
    """A question of a session that stays open; the second time it goes on with the first."""
    luck, session = random.Random(seed), bytes([seed + 1]) * 16
    ids = [luck.randrange(3, VOCAB) for _ in range(40)]
    held = service.contexts.find(OWNER, session)
    start, end = (0, 25) if held is None else (25, 40)
    states, token = whole.run(ids[:end])
    [_, answer] = await say(
        service,
        json_frame(Kind.OPEN, session, {"model": service.config.model}),
        append_frame(session, start, states[start:], Encoding.FP32),
        json_frame(Kind.ASK, session, {}, end - 1),
    )
    assert answer.token()[0] == token


async def refused(service: CloudService, whole: Whole) -> None:
    """Text is nothing that upper layers can read; other requests go on."""
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams

    client: Any = service.engine._client  # type: ignore[attr-defined]
    with pytest.raises(VLLMValidationError, match="upper part of a split model"):
        async for _ in client.generate({"prompt_token_ids": [3, 4]}, SamplingParams(), "text"):
            pass
    await converse(service, whole, 6, 1.0)
