"""The edge of a split model on vLLM's engine, against a cloud in plain PyTorch behind real HTTP."""

from __future__ import annotations

import threading
import time
from collections import Counter
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
from tests.unit.test_edge_link import Server, service, until
from vllm_effplugin.config import EfficiencyConfig
from vllm_effplugin.config.checkpoint import write_checkpoint
from vllm_effplugin.engine.counters import Counters
from vllm_effplugin.engine.settings import CLOUD_URL
from vllm_effplugin.techniques.early_exit.config import EarlyExitConfig
from vllm_effplugin.techniques.early_exit.exits import Exit
from vllm_effplugin.techniques.edge_cloud.config import CloudConfig, EdgeConfig
from vllm_effplugin.techniques.edge_cloud.service import CloudService, Sampling
from vllm_effplugin.techniques.edge_cloud.split import write_layers
from vllm_effplugin.techniques.edge_cloud.totals import CLOUD_TOTALS
from vllm_effplugin.techniques.layer_parallel.config import LayerParallelConfig

TOKENS = 12


class Upper:
    """The upper layers in plain PyTorch, for the service."""

    most_streams = most_blocks = most_positions = 1 << 20
    block_size = 16

    def __init__(self, upper: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(upper, dtype=torch.float32).eval()
        self.hidden_size = self.model.config.hidden_size
        self.lock = threading.Lock()
        self.said: list[tuple[int, int]] = []
        self.drawn: list[dict[str, Any]] = []
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
        self._upper.drawn.append(sampling.model_dump(exclude_unset=True))
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


def edge(
    parts: Path,
    out: Path,
    exits: list[dict[str, Any]],
    layer_parallel: LayerParallelConfig | None = None,
    **settings: Any,
) -> Path:
    """An edge with untrained exits, the last behind its layers."""
    config = EarlyExitConfig.model_validate({"exits": exits, "compaction": "always"})
    torch.manual_seed(0)
    tensors = {
        f"model.exits.{index}.{name}": value
        for index, point in enumerate(config.exits)
        for name, value in Exit(point, config, 128).state_dict().items()
    }
    split = {"role": "edge", "model": "tiny", "layers": LAYERS, "transport": "fp32"}
    split |= {"deadline_s": 60.0}  # a busy machine is not what is tested
    efficiency = EfficiencyConfig(
        early_exit=config,
        edge_cloud=EdgeConfig.model_validate({**split, **settings}),
        layer_parallel=layer_parallel,
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
    report = found.kv_transfer_params["effplugin"]
    origins: dict[str, int] = report["tokens_by_origin"]
    assert sum(origins.values()) == TOKENS
    assert report["waited_s"] >= report["cloud_s"] >= 0
    assert (report["cloud_s"] > 0) == ("cloud" in origins)
    return {name: number for name, number in origins.items() if number}


def until_up(llm: Any) -> None:
    """The first question is asked where there is somebody to answer."""
    until(lambda: answered(generate(llm, {"cloud_mode": "cloud"}, 1)[0]) == {"cloud": TOKENS})


def rates(first: float, last: float) -> list[dict[str, Any]]:
    """Exits at which pseudo-random shares of the tokens stay."""
    return [
        {"depth": 2, "gate": "rate", "threshold": first},
        {"depth": PARTITION, "gate": "rate", "threshold": last},
    ]


@contextmanager
def edge_and_cloud(
    parts: Path,
    folder: Path,
    monkeypatch: Any,
    exits: list[dict[str, Any]],
    options: dict[str, Any] | None = None,
    **settings: Any,
) -> Iterator[tuple[Any, Server, Upper]]:
    """Both, connected, and with nothing said yet that counts."""
    with clouded(parts, monkeypatch) as (server, upper):
        model = edge(parts, folder / "edge", exits, **settings)
        with engine(model, **(options or {})) as llm:
            until_up(llm)
            settle(llm, server)
            fresh = Counters(CLOUD_TOTALS)
            service(server).totals = service(server).contexts.totals = fresh
            upper.said.clear()
            yield llm, server, upper


def check_said(found: list[Any], whole: Whole, upper: Upper) -> None:
    """Each token of the cloud is what the whole model says after the same words."""
    expected = set()
    for ids, each in zip(prompts(), found, strict=True):
        for token in each.outputs[0].token_ids:
            expected.add((len(ids) - 1, whole.run(ids)[1]))
            ids = [*ids, token]
    assert upper.said
    assert set(upper.said) <= expected


def settle(llm: Any, server: Server) -> None:
    """All sessions are closed. That a request ended, workers learn with the step after it."""
    llm.llm_engine.step()
    until(lambda: not len(service(server).contexts))


SMALL = {
    "max_num_batched_tokens": 48,
    "max_model_len": 128,
    "num_gpu_blocks_override": 9,
    "block_size": 32,
}
"""Prompts in chunks, and room for so few that requests are preempted."""


@pytest.mark.works("edge", "early_exit")
@pytest.mark.works("edge", "V1 on CPU", "Llama", "chunked prefill", "preemption")
@pytest.mark.parametrize("options", [{}, SMALL], ids=["roomy", "small"])
def test_every_token_from_the_cloud_is_the_whole_models(parts, tmp_path, monkeypatch, options):
    exits = rates(0.6, 0.5)
    with edge_and_cloud(parts, tmp_path, monkeypatch, exits, options) as (llm, server, _):
        whole, totals = Whole(parts / "whole"), service(server).contexts.totals
        # At a threshold of 1 no exit is sure enough.
        for extra in ({"cloud_mode": "cloud"}, {"exit_threshold": 1.0}):
            found = generate(llm, extra)
            for ids, each in zip(prompts(), found, strict=True):
                assert answered(each) == {"cloud": TOKENS}
                for token in each.outputs[0].token_ids:
                    assert whole.run(ids)[1] == token
                    ids = [*ids, token]
        positions = 2 * (sum(map(len, prompts())) + 6 * (TOKENS - 1))
        assert (totals["received"], totals["repeated"]) == (positions, 0)
        assert (totals["computed"], totals["recomputed"]) == (positions, 0)
        settle(llm, server)
        assert totals["closed"] == totals["opened"] == 12


@pytest.mark.parametrize("options", [{}, SMALL], ids=["roomy", "small"])
def test_what_left_on_the_edge_is_not_missing_in_the_cloud(parts, tmp_path, monkeypatch, options):
    exits = rates(0.6, 0.5)
    with edge_and_cloud(parts, tmp_path, monkeypatch, exits, options) as (llm, server, upper):
        found = generate(llm, {})
        origins = sum((Counter(answered(each)) for each in found), Counter())
        assert set(origins) == {"edge", "cloud"}
        assert origins["edge"] > 10
        assert origins["cloud"] > 10
        check_said(found, Whole(parts / "whole"), upper)
        totals = service(server).contexts.totals
        assert totals["repeated"] == totals["recomputed"] == 0
        positions = sum(map(len, prompts())) + 6 * (TOKENS - 1)
        assert totals["computed"] <= totals["received"] <= positions
        left = llm.collective_rpc("loop_counters")[0]
        assert left["left"] > 10
        assert left["recomputed"] > 5
        settle(llm, server)


def test_an_edge_alone_asks_nobody(parts, tmp_path, monkeypatch):
    exits = rates(0.6, 0.5)
    with edge_and_cloud(parts, tmp_path, monkeypatch, exits) as (llm, server, upper):
        alone = generate(llm, {"cloud_mode": "standalone"})
        assert all(answered(each) == {"edge": TOKENS} for each in alone)
        assert not upper.said
        assert service(server).contexts.totals["opened"] == 0
        lower = AutoModelForCausalLM.from_pretrained(parts / "lower", dtype=torch.float32).eval()
        whole = generate(llm, {"cloud_mode": "standalone", "exit_threshold": 1.0})
        for ids, each in zip(prompts(), whole, strict=True):
            with torch.inference_mode():
                best = lower.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False)
            assert best[0, len(ids) :].tolist() == list(each.outputs[0].token_ids)


def test_without_a_cloud_the_edge_goes_on(parts, tmp_path, monkeypatch):
    exits = rates(0.6, 0.5)
    with edge_and_cloud(parts, tmp_path, monkeypatch, exits) as (llm, server, upper):
        alone = [each.outputs[0].token_ids for each in generate(llm, {"cloud_mode": "standalone"})]
        server.stop()
        found = generate(llm, {"cloud_mode": "cloud", "exit_threshold": 1.0})
        assert all(answered(each) == {"link": TOKENS} for each in found)
        found = generate(llm, {})
        assert [each.outputs[0].token_ids for each in found] == alone
        server.start()
        until_up(llm)
        # Gone in the middle of it: nobody hangs, and what is said before and after is right.
        upper.said.clear()
        gone = threading.Timer(0.3, server.stop)
        upper.pause = 0.01
        gone.start()
        found = generate(llm, {"cloud_mode": "cloud"})
        gone.join()
        origins = sum((Counter(answered(each)) for each in found), Counter())
        assert set(origins) == {"link", "cloud"}
        check_said(found, Whole(parts / "whole"), upper)


def test_slow_clouds_are_not_waited_for(parts, tmp_path, monkeypatch):
    exits = rates(1.0, 1.0)
    settings = {"mode": "cloud", "deadline_s": 1.5}
    with edge_and_cloud(parts, tmp_path, monkeypatch, exits, **settings) as (llm, _, upper):
        upper.pause = 2.0
        [found] = generate(llm, {}, 1)
        origins = answered(found)
        assert found.kv_transfer_params["effplugin"]["waited_s"] >= 1.5
        assert "cloud" not in origins
        assert origins["deadline"] >= 1
        upper.pause = 0.0
        until_up(llm)


def test_requests_that_never_ask_wait_for_nobody(parts, tmp_path, monkeypatch):
    from vllm import SamplingParams

    settings = {"mode": "cloud", "gather_ms": 1000}
    with edge_and_cloud(parts, tmp_path, monkeypatch, rates(1.0, 1.0), **settings) as (
        llm,
        _,
        upper,
    ):
        upper.pause = 0.1
        for name, mode in (("a", "cloud"), ("b", "cloud"), ("c", "cloud"), ("d", "standalone")):
            params = SamplingParams(
                temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False,
                extra_args={"cloud_mode": mode},
            )  # fmt: skip
            llm.llm_engine.add_request(name, {"prompt_token_ids": [3, 4, 5]}, params)
        finished: list[str] = []
        while llm.llm_engine.has_unfinished_requests():
            done = [each.request_id for each in llm.llm_engine.step() if each.finished]
            if "d" in done:
                # A step of it that waited would have waited for a token of all others.
                assert len(upper.said) < 3 * TOKENS / 2
            finished += done
        assert sorted(name.partition("-")[0] for name in finished) == ["a", "b", "c", "d"]


@pytest.mark.works("edge", "temperature, seeds, `n`")
def test_the_cloud_draws_as_the_request_says(parts, tmp_path, monkeypatch):
    from vllm import SamplingParams

    exits = rates(1.0, 1.0)
    with edge_and_cloud(parts, tmp_path, monkeypatch, exits, mode="cloud") as (llm, _, upper):

        def drawn(**how: Any) -> list[dict[str, Any]]:
            upper.drawn.clear()
            params = SamplingParams(
                max_tokens=TOKENS, ignore_eos=True, detokenize=False, **how
            )  # fmt: skip
            llm.generate({"prompt_token_ids": [3, 4, 5]}, params)
            assert len(upper.drawn) == TOKENS
            return list(upper.drawn)

        assert drawn(temperature=0) == [{}] * TOKENS
        warm = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1}
        assert drawn(**warm) == [warm] * TOKENS
        first, again, other = (drawn(temperature=1.0, seed=seed) for seed in (7, 7, 8))
        assert first == again
        seeds = {each["seed"] for each in first + other}
        assert len(seeds) == 2 * TOKENS  # one seed for all would draw alike at each position


@pytest.mark.refuses("edge", "penalties, biases, allowed tokens")
@pytest.mark.refuses("edge", "logprobs")
@pytest.mark.refuses("edge", "prompt logprobs")
def test_what_the_cloud_cannot_heed_is_refused(parts, tmp_path, monkeypatch):
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    monkeypatch.setenv(CLOUD_URL, "http://127.0.0.1:9")  # nobody
    model = edge(parts, tmp_path / "edge", rates(1.0, 1.0))
    with engine(model) as llm:
        refused = [
            ({"repetition_penalty": 1.2}, "repetition_penalty.*standalone"),
            ({"min_tokens": 3, "max_tokens": 5}, "min_tokens.*standalone"),
            ({"logprobs": 1}, "logprobs"),
            ({"logprobs": 0}, "logprobs"),
            ({"logprob_token_ids": [3]}, "logprob_token_ids"),
            ({"prompt_logprobs": 0}, "prompt_logprobs"),
            ({"extra_args": {"cloud_mode": "sometimes"}}, "cloud_mode"),
            ({"extra_args": {"cloud_mood": "cloud"}}, "cloud_mood"),
        ]
        for settings, named in refused:
            with pytest.raises(VLLMValidationError, match=named):
                llm.generate({"prompt_token_ids": [3, 4]}, SamplingParams(**settings))
        params = SamplingParams(
            temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False,
            repetition_penalty=1.2, extra_args={"cloud_mode": "standalone"},
        )  # fmt: skip
        [found] = llm.generate({"prompt_token_ids": [3, 4]}, params)
        assert answered(found) == {"edge": TOKENS}
