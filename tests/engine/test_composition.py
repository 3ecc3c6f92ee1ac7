"""Techniques together, on vLLM's engine against plain PyTorch, fp32."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine import test_edge
from tests.engine.test_early_exit import ROOMY, Replay, check_compiled, exiting
from tests.engine.test_edge import answered, check_said, edge_and_cloud, rates, settle
from tests.engine.test_edge_cloud import PARTITION, Whole, many, serving
from tests.engine.test_layer_parallel_logits import (
    MIXED_BATCHES,
    TOLERANCE,
    generate,
    prompts,
)
from tests.tiny import LAYERS, counters, engine, isolated, make_checkpoint, overrides
from tests.unit.test_edge_link import service
from vllm_effplugin.config import EfficiencyConfig
from vllm_effplugin.plan import build_plan
from vllm_effplugin.techniques.edge_cloud.config import CloudConfig
from vllm_effplugin.techniques.edge_cloud.split import model_name, write_layers, write_part
from vllm_effplugin.techniques.layer_parallel.config import LayerParallelConfig
from vllm_effplugin.techniques.layer_parallel.reference import ReferenceDecoder

GROUPS = [[1, 2], [4, 5, 6, 7], [8, 9]]
"""Layers, of 12."""
EXITS = [
    {"depth": 3, "gate": "rate", "threshold": 0.7},
    {"depth": 8, "gate": "rate", "threshold": 0.5},
]
"""Behind the first group, and between the others."""


@pytest.mark.works("layer_parallel", "early_exit")
@pytest.mark.parametrize(
    ("family", "schedule"),
    [
        pytest.param("Llama", {"bypass": 1}, id="Llama-bypass1"),
        pytest.param("Llama", {"schedule": "fused"}, id="Llama-fused"),
        pytest.param("Qwen3", {"bypass": 0}, id="Qwen3-bypass0"),
        pytest.param("Mistral", {"schedule": "fused"}, id="Mistral-fused"),
        pytest.param("Qwen2", {"bypass": 2}, id="Qwen2-bypass2"),
    ],
)
def test_exits_between_groups(tiny, family, schedule):
    """Chunked prefill, decode, preemption and prefix-cache hits, and waiting tokens in groups."""
    parallel: dict[str, Any] = {"layer_parallel": {"groups": GROUPS, **schedule}}
    block = {"exits": EXITS}
    replay = Replay(tiny(family), block, **parallel)
    with exiting(tiny(family), family, block=block, sections=parallel) as (llm, trace):
        for again in (False, True):
            results = generate(llm, prompts())
            events = trace.take()
            assert trace.loop.counters["left"] > 0
            assert trace.loop.counters["recomputed"] > 0
            assert (counters(llm)["vllm:prefix_cache_hits"] > 0) >= again
            for prompt, (tokens, logits), happened in zip(prompts(), results, events, strict=True):
                assert replay.difference(prompt, tokens, logits, happened) <= TOLERANCE
        assert counters(llm)["vllm:num_preemptions"] > 0


def test_exits_between_groups_on_two_ranks(tiny, tmp_path):
    """A layer of a group on each rank; both take the first one's decisions."""
    sections: dict[str, Any] = {"layer_parallel": {"groups": [[1, 2], [4, 5, 6, 7]], "bypass": 1}}
    point = {"gate": "linear", "adapter": "linear", "threshold": 0.6}
    block = {"exits": [{"depth": 3, **point}, {"depth": 8, **point}], "compaction": "always"}
    replay = Replay(tiny(), block, **sections)
    checkpoint = replay.write(tiny(), tmp_path / "exits")
    changed = overrides("Llama", {"early_exit": block, **sections})
    options = {**MIXED_BATCHES, **ROOMY}
    with engine(checkpoint, tp=2, hf_overrides=changed, **options) as llm:
        results = generate(llm, prompts())
    assert replay.taken(results) == {-1, 0, 1}


def test_compiled_exits_between_groups(tmp_path):
    """Segments, and the one graph with groups and exits in it."""
    sections = {"layer_parallel": {"groups": [[0, 1], [4, 5]], "bypass": 1}}
    first = {"depth": 2, "gate": "linear", "adapter": "none", "threshold": 0.5}
    second = {"depth": 4, "gate": "mlp", "adapter": "linear", "threshold": 0.5}
    check_compiled(tmp_path, "Llama", [first, second], sections=sections)


BELOW, ABOVE = [[0, 1], [2, 3, 4]], [[6, 7], [9, 10, 11]]
"""Groups on both sides of the partition."""


class Grouped(Whole):
    """The unsplit model in plain PyTorch, with groups of layers."""

    def __init__(self, model: Path, parallel: LayerParallelConfig) -> None:
        super().__init__(model)
        self._parallel, self._decoder = parallel, ReferenceDecoder(self.model)
        units = build_plan(EfficiencyConfig(layer_parallel=parallel), LAYERS).units
        self._below = [unit for unit in units if unit.first < PARTITION]
        self._above = [unit for unit in units if unit.first >= PARTITION]

    @torch.inference_mode()
    def run(self, ids: list[int]) -> tuple[np.ndarray, int]:
        hidden, context = self._decoder.embed(torch.tensor([ids]))
        below = self._decoder.run(self._below, hidden, context, self._parallel)
        above = self._decoder.run(self._above, below, context, self._parallel)
        return below[0].numpy(), int(self._decoder.logits(above)[0, -1].argmax())


def parallel(groups: list[list[int]], **schedule: Any) -> LayerParallelConfig:
    return LayerParallelConfig.model_validate({"groups": groups, **schedule})


def run_cloud(folder: Path, schedule: dict[str, Any], options: dict[str, Any]) -> None:
    whole = make_checkpoint(folder / "whole")
    config = CloudConfig(role="cloud", model=model_name(whole), partition=PARTITION)
    own = parallel([[layer - PARTITION for layer in group] for group in ABOVE], **schedule)
    efficiency = EfficiencyConfig(edge_cloud=config, layer_parallel=own)
    write_part(whole, folder / "cloud", PARTITION, LAYERS, efficiency, work=folder, provenance={})

    async def main() -> None:
        async with serving(folder / "cloud", **options) as cloud:
            await many(cloud, Grouped(whole, parallel(ABOVE, **schedule)))

    asyncio.run(main())


@pytest.mark.works("layer_parallel", "cloud")
@pytest.mark.parametrize(
    ("schedule", "options"),
    [({"bypass": 1}, {"max_num_batched_tokens": 32}), ({"schedule": "fused"}, {})],
    ids=["bypass1", "fused"],
)
def test_a_cloud_with_groups(tmp_path, monkeypatch, schedule, options):
    """Its tokens are those of the whole model with the same groups."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    isolated(run_cloud, tmp_path, schedule, options)


@pytest.mark.works("layer_parallel", "edge")
@pytest.mark.parametrize("schedule", [{"bypass": 1}, {"schedule": "fused"}], ids=str)
def test_an_edge_with_groups(tmp_path, monkeypatch, schedule):
    """What it sends up is the state behind its groups; tokens that wait run them, too."""
    whole = make_checkpoint(tmp_path / "whole")
    for name, first, end in (("lower", 0, PARTITION), ("upper", PARTITION, LAYERS)):
        (tmp_path / name).mkdir()
        write_layers(whole, tmp_path / name, first, end)
    groups = parallel(BELOW, **schedule)
    exits = rates(0.6, 0.5)
    with edge_and_cloud(
        tmp_path, tmp_path, monkeypatch, exits, test_edge.SMALL, layer_parallel=groups
    ) as (llm, server, upper):
        found = test_edge.generate(llm, {})
        origins = sum((Counter(answered(each)) for each in found), Counter())
        assert min(origins["edge"], origins["cloud"]) > 10
        check_said(found, Grouped(whole, groups), upper)
        assert service(server).contexts.totals["repeated"] == 0
        assert llm.collective_rpc("loop_counters")[0]["recomputed"] > 5
        settle(llm, server)
