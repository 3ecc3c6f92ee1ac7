"""The edge of a split model on vLLM's engine, against a cloud in plain PyTorch behind real HTTP."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engine.test_edge_cloud import PARTITION, Whole
from tests.tiny import LAYERS, VOCAB, engine, make_checkpoint
from tests.unit.test_edge_link import Server, until
from vllm_effplugin.config import EfficiencyConfig
from vllm_effplugin.config.checkpoint import write_checkpoint
from vllm_effplugin.techniques.early_exit.config import EarlyExitConfig
from vllm_effplugin.techniques.early_exit.exits import Exit
from vllm_effplugin.techniques.edge_cloud.config import CloudConfig, EdgeConfig
from vllm_effplugin.techniques.edge_cloud.loop import CLOUD_URL
from vllm_effplugin.techniques.edge_cloud.service import CloudService, Sampling
from vllm_effplugin.techniques.edge_cloud.split import write_layers

TOKENS = 12


class Upper:
    """The upper layers in plain PyTorch, for the service."""

    most_streams = most_blocks = 1 << 20
    block_size = 16

    def __init__(self, upper: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(upper, dtype=torch.float32).eval()
        self.hidden_size = self.model.config.hidden_size
        self.lock = threading.Lock()
        self.said: list[tuple[int, int]] = []
        self.pause = 0.0

    def open(self, name: str, salt: str) -> UpperStream:
        return UpperStream(self)


class UpperStream:
    def __init__(self, upper: Upper) -> None:
        self._upper = upper
        self._states = torch.zeros(0, upper.hidden_size)

    async def next(self, states: np.ndarray, sampling: Sampling) -> int:
        time.sleep(self._upper.pause)
        self._states = torch.cat([self._states, torch.from_numpy(states.copy())])
        with torch.inference_mode():
            logits = self._upper.model(inputs_embeds=self._states[None]).logits[0, -1]
        token = int(logits.argmax())
        self._upper.said.append((len(self._states) - 1, token))
        return token

    async def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """A model, and the stock checkpoints of its lower and upper layers."""
    folder = tmp_path_factory.mktemp("split")
    whole = make_checkpoint(folder / "whole")
    for name, first, end in (("lower", 0, PARTITION), ("upper", PARTITION, LAYERS)):
        (folder / name).mkdir()
        write_layers(whole, folder / name, first, end)
    return folder


def edge(parts: Path, out: Path, exits: list[dict[str, Any]], **settings: Any) -> Path:
    """An edge with untrained exits, the last behind its layers."""
    config = EarlyExitConfig.model_validate({"exits": exits})
    torch.manual_seed(0)
    tensors = {
        f"model.exits.{index}.{name}": value
        for index, point in enumerate(config.exits)
        for name, value in Exit(point, config, 128).state_dict().items()
    }
    split = {"role": "edge", "model": "tiny", "layers": LAYERS, "transport": "fp32"}
    efficiency = EfficiencyConfig(
        early_exit=config, edge_cloud=EdgeConfig.model_validate({**split, **settings})
    )
    write_checkpoint(parts / "lower", out, efficiency, tensors=tensors or None, provenance={})
    return out


@contextmanager
def clouded(parts: Path, monkeypatch: Any) -> Iterator[tuple[Server, Upper]]:
    from fastapi import FastAPI

    from vllm_effplugin.engine.endpoint import router

    app, upper = FastAPI(), Upper(parts / "upper")
    app.include_router(router)
    config = CloudConfig(role="cloud", model="tiny", partition=PARTITION)
    app.state.effplugin_cloud = CloudService(config, upper)
    server = Server(app)
    monkeypatch.setenv(CLOUD_URL, f"http://127.0.0.1:{server.port}")
    try:
        yield server, upper
    finally:
        server.stop()


def prompts(count: int = 6) -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [
        generator.integers(3, VOCAB, size=int(generator.integers(4, 70))).tolist()
        for _ in range(count)
    ]


def generate(llm: Any, extra: dict[str, Any], count: int = 6) -> list[Any]:
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False, extra_args=extra
    )
    found = llm.generate([{"prompt_token_ids": ids} for ids in prompts(count)], params)
    assert [len(each.outputs[0].token_ids) for each in found] == [TOKENS] * count
    return found


def answered(found: Any) -> dict[str, int]:
    """A response's tokens by origin."""
    origins: dict[str, int] = found.kv_transfer_params["effplugin"]["tokens_by_origin"]
    assert sum(origins.values()) == TOKENS
    return {name: number for name, number in origins.items() if number}


EXITS = [{"depth": 2, "gate": "rate", "threshold": 0.6}, {"depth": 5, "gate": "rate"}]


def test_every_token_from_the_cloud_is_the_whole_models(parts, tmp_path, monkeypatch):
    with clouded(parts, monkeypatch) as (server, _):
        model = edge(parts, tmp_path / "edge", EXITS, mode="cloud")
        with engine(model, max_num_batched_tokens=64) as llm:
            until_up(llm)
            found = generate(llm, {})
            whole = Whole(parts / "whole")
            for ids, each in zip(prompts(), found, strict=True):
                for token in each.outputs[0].token_ids:
                    assert whole.run(ids)[1] == token
                    ids = [*ids, token]
                assert answered(each) == {"cloud": TOKENS}
            totals = server.app.state.effplugin_cloud.contexts.totals
            positions = sum(map(len, prompts())) + 6 * (TOKENS - 1)
            assert (totals.received, totals.repeated) == (positions, 0)
            assert (totals.computed, totals.recomputed) == (positions, 0)
            until(lambda: totals.closed == 6)


def until_up(llm: Any) -> None:
    """The first question is asked where there is somebody to answer."""
    until(lambda: answered(generate(llm, {"cloud_mode": "cloud"}, 1)[0]) == {"cloud": TOKENS})
