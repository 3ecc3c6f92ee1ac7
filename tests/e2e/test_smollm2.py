"""A real model through real servers: what a user sees."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.dashboard import check
from tests.e2e.server import serving, shown
from tests.tiny import counters, engine, isolated, overrides
from vllm_effplugin import __version__
from vllm_effplugin.config import parse_efficiency
from vllm_effplugin.config.checkpoint import write_checkpoint
from vllm_effplugin.engine.settings import VERIFY
from vllm_effplugin.techniques.early_exit.step import pseudo_random

PROMPTS = [
    "The capital of France is",
    "Once upon a time",
    "Water boils at",
    "def fibonacci(n):",
    "The three laws of motion state that",
    "To make bread, first",
    "In 1969, humans",
    "The opposite of hot is",
    "A list of colours: red,",
    "Dear customer, we",
    "Photosynthesis is the process by which",
    "2 + 2 =",
    "The quick brown fox",
    "Shakespeare wrote",
    "If it rains tomorrow,",
    "The largest planet in the solar system is",
    "import numpy as np",
    "Once the meeting ended, Anna",
    "The main difference between cats and dogs is",
    "She opened the door and",
]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    """The demo checkpoint, built as `make serve` builds it."""
    pytest.importorskip("gguf")
    folder = tmp_path_factory.mktemp("models") / "smollm2"
    command = [sys.executable, "-m", "vllm_effplugin.cli.main", "demo-model", str(folder)]
    subprocess.run(command, check=True)
    return folder


def greedy(model: Path, changed: dict) -> list[list[int]]:
    """48 greedy tokens of each prompt, bf16 and compiled."""
    from vllm import SamplingParams

    options = {"skip_tokenizer_init": False, "dtype": "bfloat16", "enforce_eager": False}
    with engine(model, hf_overrides=changed, **options) as llm:
        params = SamplingParams(temperature=0, max_tokens=48)
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_a_trivial_plan_gives_the_stock_models_tokens(smollm2):
    stock = isolated(greedy, smollm2, {})
    assert len(stock) == 20
    trivial = overrides("Llama", {"layer_parallel": {"groups": []}})
    assert isolated(greedy, smollm2, trivial) == stock


HALF = {"exits": [{"depth": 20, "gate": "rate", "threshold": 0.5}], "compaction": "always"}


def predictions(model: Path) -> list[tuple[int, int, int, bool]]:
    """For each decoded token: itself, what the exact model says, again, and whether it left.

    Half the tokens leave at layer 20 under `recompute`, in bf16. What the exact model says is
    computed over the finished texts, all at once and one by one: the noise of bf16.
    """
    from vllm import SamplingParams

    rows = []
    options = {"skip_tokenizer_init": False, "dtype": "bfloat16", "enable_prefix_caching": False}
    with engine(model, hf_overrides=overrides("Llama", {"early_exit": HALF}), **options) as llm:
        params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        whole = [[*o.prompt_token_ids, *o.outputs[0].token_ids] for o in outputs]
        exact = SamplingParams(max_tokens=1, prompt_logprobs=1, extra_args={"exit": False})
        inputs = [{"prompt_token_ids": ids} for ids in whole]
        together = llm.generate(inputs, exact, use_tqdm=False)
        alone = [llm.generate([one], exact, use_tqdm=False)[0] for one in inputs]
        for output, ids, *scored in zip(outputs, whole, together, alone, strict=True):
            for position in range(len(output.prompt_token_ids) + 1, len(ids)):
                last = position - 1  # the token that was run to get this one
                [draw] = pseudo_random(0, np.array([last]), np.array([ids[last]]))
                best = [
                    min(ranks, key=lambda token, ranks=ranks: ranks[token].rank)
                    for ranks in (score.prompt_logprobs[position] for score in scored)
                ]
                rows.append((ids[position], *best, bool(draw >= 0.5)))
    return rows


def test_tokens_that_stay_do_not_suffer_from_those_that_left(smollm2):
    """Under `recompute` they agree with the exact model as well as bf16 agrees with itself."""
    rows = isolated(predictions, smollm2)
    stayed, left = ([row for row in rows if row[3] == early] for early in (False, True))
    agreement = sum(ours == exact for ours, exact, _, _ in stayed) / len(stayed)
    floor = sum(again == exact for _, exact, again, _ in stayed) / len(stayed)
    guesses = sum(ours == exact for ours, exact, _, _ in left) / len(left)
    print(f"agreement: stayed {agreement:.4f}, bf16 {floor:.4f}, left at 20 {guesses:.4f}")
    assert 0.4 < len(left) / len(rows) < 0.6
    assert agreement >= floor - 0.02
    assert guesses < 0.6, "exits at random are bad guesses; were they taken?"


def continued(
    model: Path, changed: dict, wishes: dict, count: int, tokens: int, **options: object
) -> tuple[list, dict]:
    """Greedy continuations of some prompts, in fp32; and the engine's counters."""
    from vllm import SamplingParams

    prompts = [f"{opening} {PROMPTS[i // 20]}" for i, opening in enumerate(PROMPTS * 4)][:count]
    assert len(set(prompts)) == count
    with engine(
        model, hf_overrides=changed, skip_tokenizer_init=False, disable_log_stats=False, **options
    ) as llm:
        params = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, extra_args=wishes
        )
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seen = counters(llm)
    return [list(output.outputs[0].token_ids) for output in outputs], seen


@pytest.mark.parametrize(
    ("count", "tokens"),
    [
        (16, 40),
        pytest.param(
            64,
            128,
            marks=pytest.mark.skipif("EFFPLUGIN_SLOW" not in os.environ, reason="EFFPLUGIN_SLOW"),
        ),
    ],
)
def test_verified_exits_are_the_stock_model(smollm2, count, tokens):
    """Token for token. In fp32: in bf16 stock vLLM differs from itself with the batch."""
    exits = {"exits": [{"depth": 26, "gate": "softmax", "threshold": 0.4}]}
    ours = overrides("Llama", {"early_exit": exits})
    stock, _ = isolated(continued, smollm2, {}, {}, count, tokens)
    verified, seen = isolated(
        continued, smollm2, ours, {"exit": "verify"}, count, tokens, speculative_config=VERIFY
    )
    drafted = seen["vllm:spec_decode_num_draft_tokens"]
    accepted = seen["vllm:spec_decode_num_accepted_tokens"]
    print(f"{accepted:.0f} of {drafted:.0f} drafted tokens accepted")
    assert 0 < accepted < drafted
    assert verified == stock


def check_forms(client: httpx.Client) -> None:
    """A grammar is kept to, and a stream's pieces are the whole answer."""
    body = {"model": "demo", "prompt": "A number:", "max_tokens": 12, "temperature": 0}
    found = client.post(
        "/v1/completions", json={**body, "structured_outputs": {"regex": "[0-9]{3}-[a-c]{2}"}}
    )
    assert found.status_code == 200, found.text
    assert re.fullmatch("[0-9]{3}-[a-c]{2}", found.json()["choices"][0]["text"])
    whole = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as streamed:
        *pieces, last = [line[6:] for line in streamed.iter_lines() if line.startswith("data: ")]
    assert last == "[DONE]"
    assert "".join(json.loads(piece)["choices"][0]["text"] for piece in pieces) == whole


@pytest.mark.works("layer_parallel", "structured output", "streaming")
def test_vllm_serve_needs_no_flag(smollm2, tmp_path):
    """A prepared checkpoint behind `vllm serve`: chat answers, and bad requests harm nobody."""
    checkpoint = tmp_path / "prepared"
    efficiency = parse_efficiency({"layer_parallel": {"groups": [[20, 21], [26, 27]]}})
    write_checkpoint(smollm2, checkpoint, efficiency, provenance={})
    with serving(checkpoint, tmp_path) as (client, log):
        question = [{"role": "user", "content": "What is gravity?"}]
        body = {"model": "demo", "messages": question, "max_tokens": 8, "temperature": 0}
        answer = client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 8
        assert client.post("/v1/chat/completions", json={**body, "n": -1}).status_code == 400
        again = client.post("/v1/chat/completions", json=body)
        assert again.json()["choices"] == answer.json()["choices"]
        check_forms(client)
        found = shown(client)
        labels = f'{{model_name="demo",techniques="layer_parallel",version="{__version__}"}}'
        assert found[f"effplugin_info{labels}"] == 1
        assert found['effplugin_layers{model_name="demo"}'] == 30
        assert found['effplugin_sequential_layers{model_name="demo"}'] == 28
    assert "0-19 [20 21] 22-25 [26 27] 28-29" in log.read_text(), "the plan is not in the log"


@pytest.mark.works("early_exit", "structured output", "streaming")
def test_callers_choose_how_to_exit(smollm2, tmp_path):
    """Exits, none, and verified ones over HTTP; wrong wishes; what `/metrics` shows."""
    checkpoint = tmp_path / "exits"
    exits = [{"depth": 24, "gate": "softmax", "threshold": 0.2}]
    efficiency = parse_efficiency({"early_exit": {"exits": exits, "shadow": 0.5}})
    write_checkpoint(smollm2, checkpoint, efficiency, provenance={})
    verify = ["--dtype", "float32", "--speculative-config", json.dumps(VERIFY)]
    with serving(checkpoint, tmp_path, *verify) as (client, _):

        def complete(**wishes: object) -> httpx.Response:
            body = {"model": "demo", "prompt": PROMPTS[1], "max_tokens": 40, "temperature": 0}
            return client.post("/v1/completions", json={**body, "vllm_xargs": wishes})

        def text(**wishes: object) -> str:
            answer = complete(**wishes)
            assert answer.status_code == 200, answer.text
            return answer.json()["choices"][0]["text"]

        full = text(exit="false")
        assert text(exit="verify") == full
        early = text()
        assert early != full
        for wishes in ({"exit_threshold": 2}, {"exit": "perhaps"}, {"exit_tresh": 1}):
            refused = complete(**wishes)
            assert refused.status_code == 400
            assert next(iter(wishes)) in refused.text
        assert text() == early
        totals = shown(client)
        check_forms(client)
    labels = 'engine="0",model_name="demo"'
    check(totals, "exit")
    fired = totals[f'effplugin_exit_tokens_total{{depth="24",{labels}}}']
    decoded = totals[f"effplugin_exit_decode_tokens_total{{{labels}}}"]
    compared = totals[f"effplugin_exit_shadow_tokens_total{{{labels}}}"]
    assert 0 < compared < fired <= decoded == 2 * 39
    ran, full = (
        totals[f"effplugin_exit_{name}_total{{{labels}}}"]
        for name in ("layer_tokens", "full_layer_tokens")
    )
    assert ran > full, "drafting is work, too"
    assert totals[f"vllm:spec_decode_num_accepted_tokens_total{{{labels}}}"] > 0


def test_a_bad_block_refuses_to_start(smollm2, tmp_path):
    """One sentence that names the field, from `vllm serve` itself."""
    checkpoint = tmp_path / "bad"
    write_checkpoint(smollm2, checkpoint, parse_efficiency({}), provenance={})
    config = json.loads((checkpoint / "config.json").read_text())
    config["efficiency"] = {"layer_parallel": {"groups": [[28, 29, 30]]}}
    (checkpoint / "config.json").write_text(json.dumps(config))
    vllm = Path(sys.executable).with_name("vllm")
    done = subprocess.run(
        [str(vllm), "serve", str(checkpoint)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode != 0
    assert "group [28, 29, 30] is outside the model, which has 30 layers" in done.stderr
