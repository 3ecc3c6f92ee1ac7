"""Engine logits against the plain PyTorch reference, fp32, over mixed batches.

Every engine here serves prompts of different lengths at once with a small token budget, so that
its batches mix chunked prefill with decode, and a small KV cache, so that requests are preempted;
then the same prompts again, so that they hit the prefix cache.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import LAYERS, VOCAB, counters, engine, overrides
from vllm_effplugin.config import parse_efficiency
from vllm_effplugin.plan import build_plan
from vllm_effplugin.techniques.layer_parallel.reference import ReferenceDecoder

TOLERANCE = 1e-3
NEW_TOKENS = 40
MIXED_BATCHES: dict[str, Any] = {
    "max_num_batched_tokens": 64,
    "max_num_seqs": 8,
    "num_gpu_blocks_override": 20,
    "block_size": 32,
    "enable_prefix_caching": True,
    "max_logprobs": -1,
    "logprobs_mode": "raw_logits",
    "disable_log_stats": False,
}
"""Options of an engine that mixes chunked prefill with decode, preempts, and hits its prefixes."""

MIXED_SIZES = [[1, 2], [3, 4, 5], [6, 7, 8, 9]]
EVEN_SIZES = [[0, 1], [3, 4, 5, 6], [8, 9]]

ONE_RANK = [
    pytest.param("Llama", {"groups": MIXED_SIZES, "bypass": d}, id=f"Llama-bypass{d}")
    for d in range(4)
] + [
    pytest.param("Llama", {"groups": MIXED_SIZES, "schedule": "fused"}, id="Llama-fused"),
    pytest.param(
        "Llama",
        {"groups": MIXED_SIZES, "bypass": 2, "double_count_bypass": True},
        id="Llama-double-count",
    ),
    *(
        pytest.param(family, {"groups": MIXED_SIZES, **schedule}, id=f"{family}-{name}")
        for family in ("Mistral", "Qwen2", "Qwen3")
        for name, schedule in (("bypass1", {"bypass": 1}), ("fused", {"schedule": "fused"}))
    ),
]
TWO_RANKS = [
    pytest.param("Llama", {"groups": EVEN_SIZES, "bypass": 0}, id="Llama-bypass0"),
    pytest.param("Qwen3", {"groups": EVEN_SIZES, "bypass": 3}, id="Qwen3-bypass3"),
    # Groups of three over two ranks: split by heads, which only the fused schedule can.
    pytest.param("Qwen3", {"groups": MIXED_SIZES, "schedule": "fused"}, id="Qwen3-fused"),
]


def prompts(seed: int = 0) -> list[list[int]]:
    """Token ids of prompts from 3 to 150 tokens; the last two share their first 64."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        for length in (3, 17, 40, 96, 150)
    ]
    return [*drawn, drawn[-1][:64] + drawn[0]]


def step_logits(completion: Any) -> torch.Tensor:
    """Logits `[tokens, V]` of a completion that asked for all of them."""
    return torch.tensor(
        [[step[token].logprob for token in range(VOCAB)] for step in completion.logprobs]
    )


def generate(llm, requests: list[list[int]]) -> list[tuple[list[int], torch.Tensor]]:
    """Greedy tokens and the logits `[NEW_TOKENS, V]` that they were taken from."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=-1, detokenize=False
    )
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in requests], params, use_tqdm=False)
    results = []
    for output in outputs:
        completion = output.outputs[0]
        results.append((list(completion.token_ids), step_logits(completion)))
    return results


def largest_difference(checkpoint, layer_parallel: dict | None, results, requests) -> float:
    """Largest |engine logit - reference logit| over all generated positions."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    efficiency = parse_efficiency({"layer_parallel": layer_parallel} if layer_parallel else None)
    units = build_plan(efficiency, model.config.num_hidden_layers).units
    worst = 0.0
    for prompt, (tokens, logits) in zip(requests, results, strict=True):
        with torch.no_grad():
            sequence = torch.tensor([prompt + tokens[:-1]])
            expected = ReferenceDecoder(model)(sequence, units, efficiency.layer_parallel)
        worst = max(worst, (expected[0, len(prompt) - 1 :] - logits).abs().max().item())
    return worst


def check(checkpoint, family: str, layer_parallel: dict | None, tp: int = 1, **options) -> None:
    efficiency = {"layer_parallel": layer_parallel} if layer_parallel else None
    with engine(
        checkpoint,
        tp=tp,
        hf_overrides=overrides(family, efficiency),
        **MIXED_BATCHES,
        **options,
    ) as llm:
        first = generate(llm, prompts())
        again = generate(llm, prompts())
        seen = counters(llm)
    assert seen["vllm:num_preemptions"] > 0, "the KV cache was not small enough to preempt"
    assert seen["vllm:prefix_cache_hits"] > 0
    assert largest_difference(checkpoint, layer_parallel, first, prompts()) <= TOLERANCE
    assert largest_difference(checkpoint, layer_parallel, again, prompts()) <= TOLERANCE


@pytest.mark.works("layer_parallel", "V1 on CPU", "chunked prefill", "preemption")
@pytest.mark.works("layer_parallel", "prefix caching", "logprobs")
@pytest.mark.parametrize(("family", "layer_parallel"), ONE_RANK)
def test_one_rank(tiny, family, layer_parallel):
    check(tiny(family), family, layer_parallel)


@pytest.mark.works("layer_parallel", "tensor parallelism")
@pytest.mark.parametrize(("family", "layer_parallel"), TWO_RANKS)
def test_two_ranks(tiny, family, layer_parallel):
    check(tiny(family), family, layer_parallel, tp=2)


def test_a_wrong_schedule_is_noticed(tiny):
    """The tolerance separates the schedules: what one computes, the others do not."""
    schedules = [{"bypass": 0}, {"bypass": 1}, {"bypass": 2}, {"schedule": "fused"}]
    model = AutoModelForCausalLM.from_pretrained(tiny("Llama"), dtype=torch.float32).eval()
    ids = torch.tensor([prompts()[2]])
    with torch.no_grad():
        logits = []
        for schedule in schedules:
            config = parse_efficiency({"layer_parallel": {"groups": MIXED_SIZES, **schedule}})
            units = build_plan(config, LAYERS).units
            logits.append(ReferenceDecoder(model)(ids, units, config.layer_parallel))
    for i, one in enumerate(logits):
        for other in logits[i + 1 :]:
            assert (one - other).abs().max() > 20 * TOLERANCE
