"""Off means off: without a technique the engine computes what stock vLLM computes, bit for bit."""

from __future__ import annotations

import pytest

from tests.engine.test_layer_parallel_logits import generate, prompts
from tests.tiny import FAMILIES, architecture, engine, isolated, make_checkpoint, overrides

TRIVIAL_PLANS = {
    "no block": None,
    "no groups": {"layer_parallel": {"groups": []}},
    "no exit is taken": {"early_exit": {"exits": [{"depth": 4}, {"depth": 8}]}},
}


def run(model, changed, **options):
    with engine(
        model,
        hf_overrides=changed,
        max_logprobs=-1,
        logprobs_mode="raw_logits",
        max_num_batched_tokens=64,
        **options,
    ) as llm:
        return generate(llm, prompts())


def assert_identical(one, other):
    for (tokens, logits), (other_tokens, other_logits) in zip(one, other, strict=True):
        assert tokens == other_tokens
        assert logits.equal(other_logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trivial_plan_is_the_stock_model(tiny, family):
    stock = run(tiny(family), {"architectures": [architecture(family)]}, dtype="bfloat16")
    # A list without groups is no list, whatever the family.
    plans = [
        plan for name, plan in TRIVIAL_PLANS.items() if family == "Llama" or name != "no groups"
    ]
    for efficiency in plans:
        ours = run(tiny(family), overrides(family, efficiency), dtype="bfloat16")
        assert_identical(stock, ours)


def test_segments_compute_what_the_whole_stack_computes(tiny):
    stock = run(tiny(), {"architectures": [architecture("Llama")]}, dtype="bfloat16")
    split = run(tiny(), overrides("Llama", {"split_after": [2, 3, 8]}), dtype="bfloat16")
    assert_identical(stock, split)


def test_a_trivial_plan_is_the_stock_model_compiled(tmp_path):
    model = make_checkpoint(tmp_path, num_hidden_layers=6)
    compiled = {"dtype": "bfloat16", "enforce_eager": False}
    stock = isolated(run, model, {"architectures": [architecture("Llama")]}, **compiled)
    # Without any section it is `run_units` over the same layers, as between exits.
    exits = {"early_exit": {"exits": [{"depth": 2}, {"depth": 4}]}}
    ours = isolated(run, model, overrides("Llama", exits), **compiled)
    assert_identical(stock, ours)


def test_compiled_segments_do_not_share_artifacts(tmp_path):
    """Each segment is a graph of its own; loaded for another, it would compute other layers.

    In fp32: within one graph Inductor keeps bf16 sums in fp32, so that in bf16 a segment's end
    rounds once more than the whole stack does there.
    """
    model = make_checkpoint(tmp_path, num_hidden_layers=6)
    changed = overrides("Llama", {"split_after": [1, 2, 4]})
    whole = run(model, overrides("Llama", None), dtype="float32")
    for _ in range(2):  # compiled, then loaded from the cache
        split = isolated(run, model, changed, dtype="float32", enforce_eager=False)
        for (tokens, logits), (other_tokens, other_logits) in zip(whole, split, strict=True):
            assert tokens == other_tokens
            assert (logits - other_logits).abs().max() <= 1e-3
