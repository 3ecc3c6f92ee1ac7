"""The engine tests once more, on vLLM's model runner V2.

Runner V2 needs Triton. On a CPU its kernels run in Triton's interpreter (`triton_interpreter`):
slowly, but they are the same. Which runner a process has is settled when it imports vLLM, so these
tests run in a pytest of their own.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
INTERPRETER = HERE.parent / "triton_interpreter"

EXITS = [
    "test_mixed_batches[Llama-recompute]",
    "test_mixed_batches[Qwen3-propagate]",
    "test_mixed_batches[Llama-softmax-copy]",
    "test_blocks_in_mixed_batches[Llama-recompute]",
    "test_trained_exits[mlp-block-auto]",
    "test_exact_requests_never_see_approximate_entries[propagate]",
    "test_several_samples_of_one_prompt[alone]",
    "test_callers_decide",
    "test_shadow_mode_counts_and_changes_nothing[recompute]",
    "test_a_bad_request_harms_no_other",
    "test_measured_steps_stay_inside_the_model_length",
]

STATES = [
    "test_state_policies[recompute]",
    "test_state_policies[state-only]",
    "test_states_are_those_of_a_scan[Llama-exits0-recompute]",
    "test_states_are_those_of_a_scan[Mamba2-exits4-freeze]",
    "test_shadow_mode_changes_nothing[Llama-propagate]",
]


CLASSIFIERS = [
    "test_as_in_pytorch[Llama]",
    "test_as_in_pytorch[Bert]",
    "test_without_leaving_it_is_the_stock_classifier[Llama]",
    "test_chunked_prefill",
    "test_preempted_prompts",
    "test_prefix_cache_has_no_entries_of_those_that_left",
    "test_totals",
]


MERGING = [
    "test_as_in_pytorch[Llama]",
    "test_as_in_pytorch[Bert]",
    "test_who_merges_with_whom",
    "test_exits_before_merging[Llama-9]",
    "test_totals",
]


@pytest.mark.works("layer_parallel", "V2 on CPU (Triton's interpreter)")
@pytest.mark.works("early_exit", "V2 on CPU (Triton's interpreter)")
@pytest.mark.works("joint_exit", "V2 on CPU (Triton's interpreter)")
@pytest.mark.works("multiplex", "V2 on CPU (Triton's interpreter)")
@pytest.mark.parametrize(
    "tests",
    [
        {"test_early_exit.py": EXITS},
        {
            "test_early_exit.py": ["test_two_ranks[recompute]"],
            "test_mamba.py": STATES,
            "test_off.py": ["test_a_trivial_plan_is_the_stock_model[Llama]"],
            "test_layer_parallel_logits.py": ["test_one_rank[Llama-bypass1]"],
        },
        {"test_joint_exit.py": CLASSIFIERS, "test_multiplex.py": MERGING},
    ],
    ids=["exits", "states-and-others", "classifiers"],
)
def test_on_runner_v2(tests: dict[str, list[str]]) -> None:
    """Many tests in one process: importing vLLM takes as long as some of them."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(INTERPRETER), os.environ.get("PYTHONPATH", "")]),
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
    }
    ids = [f"{HERE / module}::{test}" for module, names in tests.items() for test in names]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *ids],
        cwd=HERE.parent.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-2000:]
    assert re.search(rf"^{len(ids)} passed", ran.stdout, re.MULTILINE)


def test_the_environment_selects_it() -> None:
    """Without, the tests above would run on V1 and prove nothing."""
    code = "from vllm.config import VllmConfig; print(VllmConfig().use_v2_model_runner)"
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    environment = {**os.environ, "PYTHONPATH": str(INTERPRETER), "TRITON_INTERPRET": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert ran.stdout.split()[-1] == "True", ran.stderr[-2000:]
