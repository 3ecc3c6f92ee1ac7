"""Techniques together, on vLLM's engine against plain PyTorch, fp32."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.test_early_exit import Replay, exiting
from tests.engine.test_layer_parallel_logits import TOLERANCE, generate, prompts
from tests.tiny import counters

GROUPS = [[1, 2], [4, 5, 6, 7], [8, 9]]
"""Layers, of 12."""
EXITS = [
    {"depth": 3, "gate": "rate", "threshold": 0.7},
    {"depth": 8, "gate": "rate", "threshold": 0.5},
]
"""Behind the first group, and between the others."""


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
