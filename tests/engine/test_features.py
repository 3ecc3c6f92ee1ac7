"""Layer-parallel groups together with other features of the engine."""

from __future__ import annotations

import pytest
import torch

from tests.engine.test_layer_parallel_logits import (
    MIXED_SIZES,
    check,
    generate,
    largest_difference,
    prompts,
)
from tests.engine.test_off import run
from tests.tiny import counters, engine, isolated, make_checkpoint, overrides

GROUPS = {"groups": MIXED_SIZES, "bypass": 1}


def speculated(model, speculative: dict | None) -> tuple[list[list[int]], float]:
    """Greedy tokens of repeating prompts, and how many of them had been speculated."""
    from vllm import SamplingParams

    repeating = [[5, 6, 7, 8] * 12, [9, 10, 11] * 9, prompts()[2]]
    with engine(
        model,
        hf_overrides=overrides("Llama", {"layer_parallel": GROUPS}),
        disable_log_stats=False,
        speculative_config=speculative,
    ) as llm:
        params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False)
        outputs = llm.generate(
            [{"prompt_token_ids": ids} for ids in repeating], params, use_tqdm=False
        )
        seen = counters(llm)
    accepted = seen.get("vllm:spec_decode_num_accepted_tokens", 0)
    return [list(output.outputs[0].token_ids) for output in outputs], accepted


@pytest.mark.works("layer_parallel", "speculation (ngram)")
def test_ngram_speculation_gives_the_same_tokens(tiny):
    settings = {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 1,
    }
    tokens, accepted = isolated(speculated, tiny(), settings)
    assert accepted > 0, "nothing was speculated"
    assert (tokens, 0) == speculated(tiny(), None)


@pytest.mark.works("layer_parallel", "compiled", "tensor parallelism")
def test_compiled_on_two_ranks(tmp_path):
    """Each rank compiles its own member's graph; both must make the same collective calls."""
    model = make_checkpoint(tmp_path, num_hidden_layers=6)
    layer_parallel = {"groups": [[0, 1], [3, 4]], "bypass": 1}
    changed = overrides("Llama", {"layer_parallel": layer_parallel})
    results = isolated(run, model, changed, tp=2, enforce_eager=False)
    assert largest_difference(model, layer_parallel, results, prompts()) <= 1e-3


def test_bf16_differs_by_its_rounding_only(tiny):
    """bf16 engine against the fp32 reference: as far from it as stock bf16 is from fp32 stock."""
    noise = {}
    for layer_parallel in (None, GROUPS):
        efficiency = {"layer_parallel": layer_parallel} if layer_parallel else None
        with engine(
            tiny(),
            hf_overrides=overrides("Llama", efficiency),
            dtype="bfloat16",
            max_logprobs=-1,
            logprobs_mode="raw_logits",
        ) as llm:
            results = generate(llm, prompts())
        noise[layer_parallel is not None] = largest_difference(
            tiny(), layer_parallel, results, prompts()
        )
    assert noise[True] <= 2 * noise[False]


@pytest.mark.works("layer_parallel", "V2 on CUDA")
@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a CUDA device")
@pytest.mark.parametrize("schedule", [{"bypass": 1}, {"schedule": "fused"}])
def test_cuda_graphs(tiny, schedule):
    """Runner V2 with piecewise CUDA graphs."""
    check(tiny(), "Llama", {"groups": MIXED_SIZES, **schedule}, enforce_eager=False)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_ray_executor(tiny):
    layer_parallel = {"groups": [[0, 1], [4, 5]], "bypass": 1}
    check(tiny(), "Llama", layer_parallel, tp=2, distributed_executor_backend="ray")
