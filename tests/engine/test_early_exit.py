"""Early exit in the engine against a plain PyTorch replay of its decisions, fp32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from tests.engine.test_layer_parallel_logits import (
    MIXED_BATCHES,
    NEW_TOKENS,
    generate,
    prompts,
    step_logits,
)
from tests.tiny import VOCAB, counters, engine, isolated, make_checkpoint, overrides
from vllm_effplugin.config import EfficiencyConfig, parse_efficiency
from vllm_effplugin.config.checkpoint import write_checkpoint
from vllm_effplugin.engine.batch import OtherBatch
from vllm_effplugin.engine.graphs import Tokens
from vllm_effplugin.engine.settings import UNTESTED, VERIFY
from vllm_effplugin.offline import run_with_engine
from vllm_effplugin.techniques.early_exit.config import EarlyExitConfig
from vllm_effplugin.techniques.early_exit.evaluate import Measured, measure_settings
from vllm_effplugin.techniques.early_exit.evaluate import settings as exit_settings
from vllm_effplugin.techniques.early_exit.exits import Exit
from vllm_effplugin.techniques.early_exit.forecast import Machine, forecast, measure_machine
from vllm_effplugin.techniques.early_exit.reference import ReferenceSequence
from vllm_effplugin.techniques.early_exit.state_space_reference import StateSpaceSequence
from vllm_effplugin.techniques.early_exit.step import StepRun, pseudo_random
from vllm_effplugin.techniques.early_exit.training import new_block

TOLERANCE = 1e-3
POLICIES = ["recompute", "propagate", "copy"]
SOME = [
    {"depth": 3, "gate": "rate", "threshold": 0.7},
    {"depth": 8, "gate": "rate", "threshold": 0.5},
]
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="verified exits are for CPUs yet")
ALL = [{"depth": 4, "gate": "rate", "threshold": 0.0}]
SOFTMAX = [{"depth": 5, "gate": "softmax", "threshold": 0.02}]


ROOMY: dict[str, Any] = {"enable_prefix_caching": False, "num_gpu_blocks_override": 200}
"""Options of an engine that neither preempts nor shares blocks."""


@dataclass
class Trace:
    """What an engine did, request by request: `(start, length, exit)` of every scheduled row."""

    loop: Any
    events: dict[str, list[tuple[int, int, int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.loop.on_step = self._observe

    def names(self) -> list[str]:
        """Of the step's requests."""
        source = self.loop._source  # of runner V1, or of V2
        batch = source._runner.input_batch if hasattr(source, "_runner") else source.batch
        return batch.req_ids

    def _observe(self, run: Any) -> None:
        names = self.names()
        for row in range(len(run.rows.slots)):
            self.events.setdefault(names[row], []).append(
                (int(run.rows.starts[row]), int(run.rows.lengths[row]), int(run.passage.fired[row]))
            )

    def take(self) -> list[list[tuple[int, int, int]]]:
        """The events so far, in the order in which requests arrived: vLLM numbers them."""
        events = [self.events[name] for name in sorted(self.events, key=arrival)]
        self.events.clear()
        return events


def arrival(request: str) -> int:
    """Its number, which vLLM adds a suffix to."""
    return int(request.split("-")[0])


@contextmanager
def exiting(checkpoint: Path, family: str = "Llama", **options: Any) -> Iterator[tuple[Any, Trace]]:
    """A small engine with exits, which mixes prefill and decode, and preempts; and its trace.

    Of the options, `block` describes the exits, and `sections` the other techniques.
    """
    block = {"compaction": "always", "max_pending": 5, **options.pop("block")}
    with engine(
        checkpoint,
        hf_overrides=overrides(family, {"early_exit": block, **options.pop("sections", {})}),
        **{**MIXED_BATCHES, **options},
    ) as llm:
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        yield llm, Trace(worker.model_runner.get_model().loop)


class Replay:
    """The reference, following what an engine did.

    Args:
        block: describes the exits.
        sections: describe other techniques: groups of layers.
    """

    def __init__(self, checkpoint: Path, block: dict[str, Any], **sections: Any) -> None:
        self.efficiency = parse_efficiency({"early_exit": block, **sections})
        config = self.efficiency.early_exit
        assert config is not None
        self.config = config
        self.model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        torch.manual_seed(0)
        self.exits = [
            Exit(
                point,
                config,
                self.model.config.hidden_size,
                new_block(self.model) if point.adapter == "block" else None,
            )
            for point in config.exits
        ]
        self._sequence = (
            StateSpaceSequence if hasattr(self.model, "backbone") else ReferenceSequence
        )

    def sequence(self) -> ReferenceSequence:
        """A new one of the reference."""
        if self.efficiency.layer_parallel is None:
            return self._sequence(self.model, self.config, self.exits)
        parallel = self.efficiency.layer_parallel
        return ReferenceSequence(self.model, self.config, self.exits, parallel)

    @torch.no_grad()
    def write(self, base: Path, folder: Path) -> Path:
        """A checkpoint whose exits have the parameters that they have here, which are random."""
        for exit in self.exits:
            for parameter in exit.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        tensors = {
            f"model.exits.{index}.{name}": value.contiguous()
            for index, exit in enumerate(self.exits)
            for name, value in exit.state_dict().items()
        }
        write_checkpoint(base, folder, self.efficiency, tensors=tensors, provenance={})
        return folder

    def decisions(self, prompt: list[int], tokens: list[int]) -> list[tuple[int, int, int]]:
        """What the gates decide, worked out here: the prompt in one piece, then each token."""
        sequence = self.sequence()
        whole = [*prompt, *tokens]
        sequence.run(prompt, 0)
        events = [(0, len(prompt), -1)]
        for position in range(len(prompt), len(whole) - 1):
            fired = -1
            for exit, point in enumerate(self.config.exits):
                if point.gate == "rate":
                    [score] = pseudo_random(exit, np.array([position]), np.array([whole[position]]))
                else:
                    score = sequence.confidence(whole[position], position, exit)
                    assert abs(score - point.threshold) > 1e-5, "too close to call"
                if score >= point.threshold:
                    fired = exit
                    break
            if fired < 0:
                sequence.run(whole[position : position + 1], position)
            else:
                sequence.leave(whole[position], position, fired)
            events.append((position, 1, fired))
        return events

    def difference(
        self,
        prompt: list[int],
        tokens: list[int],
        logits: torch.Tensor,
        events: Sequence[Any],
        look: Callable[[ReferenceSequence, int], None] = lambda sequence, last: None,
    ) -> float:
        """Largest |engine logit - reference logit| over a request's generated positions.

        Args:
            look: called after each event with the last position that ran.

        Steps are not traced when nobody in the batch may leave, and prefix-cache hits are not
        computed: what the events leave out is run exactly, and not compared. Nor is what a
        preempted request runs again: it had given its token before, from an exit perhaps.
        """
        sequence = self.sequence()
        whole = [*prompt, *tokens]
        computed, given, worst = 0, len(prompt) - 1, 0.0
        for start, length, exit in events:
            if start > computed:
                sequence.run(whole[:start], 0)
                given = max(given, start)
            if exit >= 0:
                assert length == 1
                assert start >= len(prompt), "a prompt token left"
                expected = sequence.leave(whole[start], start, exit)
            else:
                expected = sequence.run(whole[start : start + length], start)[-1]
            computed = start + length
            look(sequence, computed - 1)
            if given < computed < len(whole):
                given = computed
                ours = logits[computed - len(prompt)]
                worst = max(worst, (expected - ours).abs().max().item())
        return worst

    def taken(self, results: Sequence[Any]) -> set[int]:
        """The exits that `prompts()` take, -1 for none: the results are what gates decide."""
        fired: set[int] = set()
        for prompt, (tokens, logits) in zip(prompts(), results, strict=True):
            decided = self.decisions(prompt, tokens)
            fired.update(exit for _, _, exit in decided)
            assert self.difference(prompt, tokens, logits, decided) <= TOLERANCE
        return fired

    def agreement(
        self, prompt: list[int], tokens: list[int], events: Sequence[Any]
    ) -> tuple[int, int]:
        """Tokens that left, and how many of these the full model would have said as well."""
        sequence = self.sequence()
        whole = [*prompt, *tokens]
        fired = agreed = 0
        for start, length, exit in events:
            full = sequence.run(whole[start : start + length], start)[-1]
            if exit >= 0:
                left = sequence.leave(whole[start], start, exit)
                fired += 1
                agreed += int(full.argmax() == left.argmax())
        return fired, agreed


@pytest.mark.works("early_exit", "V1 on CPU", "chunked prefill", "preemption", "prefix caching")
@pytest.mark.parametrize(
    ("family", "exits", "policy"),
    [
        *(pytest.param("Llama", SOME, policy, id=f"Llama-{policy}") for policy in POLICIES),
        *(pytest.param("Qwen3", SOME, policy, id=f"Qwen3-{policy}") for policy in POLICIES),
        pytest.param("Llama", ALL, "recompute", id="Llama-all-recompute"),
        pytest.param("Llama", ALL, "propagate", id="Llama-all-propagate"),
        pytest.param("Llama", SOFTMAX, "recompute", id="Llama-softmax-recompute"),
        pytest.param("Llama", SOFTMAX, "copy", id="Llama-softmax-copy"),
        pytest.param("Mistral", SOME, "copy", id="Mistral-copy"),
        pytest.param("Qwen2", SOME, "propagate", id="Qwen2-propagate"),
    ],
)
def test_mixed_batches(tiny, family, exits, policy):
    """Chunked prefill, decode, preemption and prefix-cache hits."""
    block = {"exits": exits, "cache": policy}
    replay = Replay(tiny(family), block)
    with exiting(tiny(family), family, block=block) as (llm, trace):
        for again in (False, True):
            results = generate(llm, prompts())
            events = trace.take()
            seen = trace.loop.counters
            assert seen["left"] > 0
            assert policy != "recompute" or seen["recomputed"] > 0
            assert (counters(llm)["vllm:prefix_cache_hits"] > 0) >= again
            if again and policy != "recompute":
                break  # approximate blocks may be hit, which the replay does not follow
            for prompt, (tokens, logits), happened in zip(prompts(), results, events, strict=True):
                assert replay.difference(prompt, tokens, logits, happened) <= TOLERANCE
        assert counters(llm)["vllm:num_preemptions"] > 0, "the KV cache was not small enough"


@pytest.mark.parametrize(
    ("gate", "adapter", "compaction"),
    [
        ("linear", "linear", "always"),
        ("mlp", "none", "auto"),
        ("linear", "block", "always"),
        ("mlp", "block", "auto"),
        ("softmax", "block", "always"),
    ],
)
def test_trained_exits(tiny, tmp_path, gate, adapter, compaction):
    """Gates and adapters from a checkpoint; with `auto` the stack runs as one graph at first."""
    point = {"gate": gate, "adapter": adapter, "threshold": 0.02 if gate == "softmax" else 0.6}
    block = {"exits": [{"depth": 3, **point}, {"depth": 8, **point}], "compaction": compaction}
    replay = Replay(tiny(), block)
    checkpoint = replay.write(tiny(), tmp_path / "exits")
    options = {"num_gpu_blocks_override": 200, "enable_prefix_caching": False}
    with exiting(checkpoint, block=block, **options) as (llm, _):
        results = generate(llm, prompts())
    assert replay.taken(results) == {-1, 0, 1}


WITH_BLOCKS = [{**point, "adapter": "block"} for point in SOME]


@pytest.mark.parametrize(
    ("family", "policy"),
    [
        *(("Llama", policy) for policy in POLICIES),
        ("Mistral", "recompute"),
        ("Qwen2", "copy"),
        ("Qwen3", "propagate"),
    ],
)
def test_blocks_in_mixed_batches(tiny, tmp_path, family, policy):
    """An exit's own layer has the entries of all tokens before, whatever ran without it."""
    block = {"exits": WITH_BLOCKS, "cache": policy}
    replay = Replay(tiny(family), block)
    checkpoint = replay.write(tiny(family), tmp_path / "exits")
    off = [{"exit": False}] * len(prompts())
    with exiting(checkpoint, family, block=block) as (llm, trace):
        ask(llm, prompts(), *off, max_tokens=1)  # fills the prefix cache with blocks that lack them
        trace.take()
        for again in (False, True):
            hits = counters(llm)["vllm:prefix_cache_hits"]
            results = generate(llm, prompts())
            events = trace.take()
            assert (counters(llm)["vllm:prefix_cache_hits"] > hits) >= again
            if again and policy != "recompute":
                break
            for prompt, (tokens, logits), happened in zip(prompts(), results, events, strict=True):
                assert replay.difference(prompt, tokens, logits, happened) <= TOLERANCE
        assert trace.loop.counters["left"] > 0
        assert counters(llm)["vllm:num_preemptions"] > 0


@pytest.mark.parametrize("policy", POLICIES)
def test_alone_and_in_a_crowd(tiny, policy):
    """What a request generates does not depend on the others."""
    block = {"exits": SOME, "cache": policy}
    options = {"num_gpu_blocks_override": 200, "enable_prefix_caching": False}
    with exiting(tiny(), block=block, **options) as (llm, _):
        crowd = generate(llm, prompts())
        for prompt, (tokens, logits) in zip(prompts(), crowd, strict=True):
            [(alone, logits_alone)] = generate(llm, [prompt])
            assert alone == tokens
            assert (logits - logits_alone).abs().max() <= TOLERANCE


def ask(llm: Any, requests: list[list[int]], *asked: dict[str, Any], **fields: Any) -> list[Any]:
    """Greedy completions, request by request with its own extra arguments."""
    from vllm import SamplingParams

    fields = {"temperature": 0, "max_tokens": NEW_TOKENS, "ignore_eos": True, **fields}
    params = [SamplingParams(detokenize=False, extra_args=extra, **fields) for extra in asked]
    return llm.generate([{"prompt_token_ids": ids} for ids in requests], params, use_tqdm=False)


@pytest.mark.works("early_exit", "tensor parallelism")
@pytest.mark.parametrize(
    ("exits", "policy", "compaction"),
    [
        (SOME, "recompute", "always"),
        (SOFTMAX, "recompute", "auto"),
        (WITH_BLOCKS, "propagate", "always"),
    ],
    ids=["recompute", "softmax-auto", "blocks-propagate"],
)
def test_two_ranks(tiny, tmp_path, exits, policy, compaction):
    """Both ranks take the first one's decisions; what they are is worked out apart."""
    block = {"exits": exits, "cache": policy, "compaction": compaction, "max_pending": 5}
    replay = Replay(tiny(), block)
    checkpoint = replay.write(tiny(), tmp_path / "exits")
    options = {"num_gpu_blocks_override": 200, "enable_prefix_caching": False}
    changed = overrides("Llama", {"early_exit": block})
    with engine(checkpoint, tp=2, hf_overrides=changed, **{**MIXED_BATCHES, **options}) as llm:
        results = generate(llm, prompts())
    assert replay.taken(results) == {-1, *range(len(exits))}


@pytest.mark.parametrize("policy", ["propagate", "copy"])
def test_exact_requests_never_see_approximate_entries(tiny, policy):
    """Not even one whose prompt is what an approximate request wrote."""
    block = {"exits": ALL, "cache": policy}
    prompt = prompts()[4]
    with exiting(tiny(), block=block, num_gpu_blocks_override=200, max_model_len=512) as (llm, _):
        [first] = ask(llm, [prompt], {}, max_tokens=100)
        written = prompt + list(first.outputs[0].token_ids)
        [exact] = ask(llm, [written], {"exit": False}, logprobs=-1, max_tokens=8)
        # Another request of the same policy does share them.
        before = counters(llm)["vllm:prefix_cache_hits"]
        ask(llm, [written], {}, max_tokens=1)
        assert counters(llm)["vllm:prefix_cache_hits"] - before >= len(prompt) // 32 * 32 + 32
    replay = Replay(tiny(), block)
    tokens = list(exact.outputs[0].token_ids)
    logits = step_logits(exact.outputs[0])
    events = [(0, len(written), -1), *((len(written) + i, 1, -1) for i in range(8))]
    assert replay.difference(written, tokens, logits, events) <= TOLERANCE


@pytest.mark.parametrize("policy", ["propagate", "copy"])
def test_blocks_that_are_shared_are_whole(tiny, policy):
    """Entries of tokens that left are in the cache when their block is full, read or not."""
    block = {"exits": ALL, "cache": policy, "max_pending": 64}
    prompt = prompts()[4]
    with exiting(tiny(), block=block, num_gpu_blocks_override=200) as (llm, trace):
        tokens = 2 + (-len(prompt)) % 32 + 32  # ends two positions into a block
        [first] = ask(llm, [prompt], {}, max_tokens=tokens)
        [happened] = trace.take()
        written = prompt + list(first.outputs[0].token_ids)
        before = counters(llm)["vllm:prefix_cache_hits"]
        [second] = ask(llm, [written], {}, max_tokens=1, logprobs=-1)
        shared = int(counters(llm)["vllm:prefix_cache_hits"] - before)
    assert shared >= len(prompt) + 32
    replay = Replay(tiny(), block)
    sequence = replay.sequence()
    for start, length, exit in [(0, len(prompt), -1), *(e for e in happened if e[2] >= 0)]:
        if exit < 0:
            sequence.run(written[start : start + length], start)
        else:
            sequence.leave(written[start], start, exit)
    expected = sequence.run(written[shared:], shared)[-1]
    [logits] = step_logits(second.outputs[0])
    assert (expected - logits).abs().max() <= TOLERANCE


PARALLEL = pytest.param(
    {"layer_parallel": {"groups": [[1, 2], [4, 5, 6, 7]], "bypass": 1}},
    marks=pytest.mark.works(
        "layer_parallel",
        "temperature, seeds, `n`",
        "penalties, biases, allowed tokens",
        "logprobs",
        "prompt logprobs",
    ),
    id="groups",
)
"""Beside exits at depths 3, 4 and 8."""
ALONE_OR_PARALLEL = pytest.mark.parametrize("sections", [pytest.param({}, id="alone"), PARALLEL])


@pytest.mark.works("early_exit", "temperature, seeds, `n`", "logprobs")
@ALONE_OR_PARALLEL
def test_several_samples_of_one_prompt(tiny, sections):
    """They share the prompt's blocks and leave at exits of their own."""
    block = {"exits": SOME, "cache": "recompute"}
    replay = Replay(tiny(), block, **sections)
    options = {"sections": sections, "num_gpu_blocks_override": 200}
    with exiting(tiny(), block=block, **options) as (llm, _):
        fields = {"n": 3, "temperature": 1.0, "logprobs": -1}
        results = ask(llm, prompts()[:4], *[{}] * 4, **fields)
    for prompt, result in zip(prompts(), results, strict=False):
        samples = [list(sample.token_ids) for sample in result.outputs]
        assert len({tuple(sample) for sample in samples}) == 3
        for sample, tokens in zip(result.outputs, samples, strict=True):
            decided = replay.decisions(prompt, tokens)
            assert replay.difference(prompt, tokens, step_logits(sample), decided) <= TOLERANCE


@pytest.mark.works("early_exit", "penalties, biases, allowed tokens", "prompt logprobs")
@ALONE_OR_PARALLEL
def test_sampling_features_see_the_exits_logits(tiny, sections):
    """Penalties, biases and allowed tokens; and the logits of prompts are the full model's."""
    block = {"exits": ALL, "cache": "recompute"}
    replay = Replay(tiny(), block, **sections)
    prompt = prompts()[3]
    allowed = list(range(10, 60))
    options = {"sections": sections, "num_gpu_blocks_override": 200}
    with exiting(tiny(), block=block, **options) as (llm, trace):
        [penalised] = ask(llm, [prompt], {}, repetition_penalty=1.5, logprobs=-1)
        [biased] = ask(llm, [prompt], {}, logit_bias={77: 100.0})
        [few] = ask(llm, [prompt], {}, allowed_token_ids=allowed)
        [scored] = ask(llm, [prompt], {}, prompt_logprobs=-1, max_tokens=2)
        assert trace.loop.counters["left"] > 0
    tokens = list(penalised.outputs[0].token_ids)
    logits = step_logits(penalised.outputs[0])
    decided = replay.decisions(prompt, tokens)
    assert replay.difference(prompt, tokens, logits, decided) <= TOLERANCE
    for position, token in enumerate(tokens):
        seen = list({*prompt, *tokens[:position]})
        changed = logits[position].clone()
        changed[seen] = torch.where(changed[seen] > 0, changed[seen] / 1.5, changed[seen] * 1.5)
        assert token == int(changed.argmax())
    assert set(biased.outputs[0].token_ids) == {77}
    assert set(few.outputs[0].token_ids) <= set(allowed)
    expected = replay.sequence().run(prompt, 0)
    for position, row in enumerate(scored.prompt_logprobs[1:]):
        ours = torch.tensor([row[token].logprob for token in range(VOCAB)])
        assert (ours - expected[position]).abs().max() <= TOLERANCE


def test_callers_decide(tiny):
    """In one batch: the checkpoint's threshold, exits off, another threshold, a least depth."""
    block = {"exits": SOME, "cache": "recompute"}
    asked = [{}, {"exit": False}, {"exit_threshold": 0.0}, {"exit_min_layer": 4}]
    with exiting(tiny(), block=block, num_gpu_blocks_override=200) as (llm, trace):
        ask(llm, prompts()[:4], *asked)
        fired = [{exit for _, _, exit in events} for events in trace.take()]
    assert fired == [{-1, 0, 1}, {-1}, {-1, 0}, {-1, 1}]


@pytest.mark.works("early_exit", "speculation (verified exits)")
@on_cpu
@pytest.mark.parametrize("gate", ["softmax", "rate"])
def test_verified_exits_are_the_full_model(tiny, gate):
    """Token for token, over chunked prefill, preemption, prefix hits and block ends."""
    exits = [{"depth": 9, "gate": gate, "threshold": 0.02}]
    block = {"exits": exits, "cache": "propagate"}
    verify, off = [{"exit": "verify"}] * len(prompts()), [{"exit": False}] * len(prompts())
    options = {"speculative_config": {**VERIFY, "num_speculative_tokens": 3}}
    with exiting(tiny(), block=block, **options) as (llm, trace):
        for _ in range(2):
            expected = ask(llm, prompts(), *off, max_tokens=80)
            verified = ask(llm, prompts(), *verify, max_tokens=80)
            for one, other in zip(expected, verified, strict=True):
                assert one.outputs[0].token_ids == other.outputs[0].token_ids
        seen = counters(llm)
        assert trace.loop.counters["decoded"] == 0
    drafted = seen["vllm:spec_decode_num_draft_tokens"]
    accepted = seen["vllm:spec_decode_num_accepted_tokens"]
    assert 0 < accepted < drafted
    assert seen["vllm:num_preemptions"] > 0
    assert seen["vllm:prefix_cache_hits"] > 0
    with engine(tiny(), hf_overrides={"architectures": ["LlamaForCausalLM"]}) as llm:
        stock = ask(llm, prompts(), *[{}] * len(prompts()), max_tokens=80)
    for one, other in zip(stock, verified, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids


@on_cpu
def test_verified_exits_with_blocks(tiny, tmp_path):
    """Drafts come from the exit's own layer, whose entries the full model's steps write."""
    block = {"exits": [{"depth": 11, "gate": "rate", "threshold": 0.0, "adapter": "block"}]}
    replay = Replay(tiny(), block)
    checkpoint = replay.write(tiny(), tmp_path / "exits")
    requests = [prompt[:30] for prompt in prompts()]
    verify, off = [{"exit": "verify"}] * len(requests), [{"exit": False}] * len(requests)
    options = {"speculative_config": {**VERIFY, "num_speculative_tokens": 1}, "max_num_seqs": 16}
    with exiting(checkpoint, block=block, num_gpu_blocks_override=200, **options) as (llm, _):
        expected = ask(llm, requests, *off)
        verified = ask(llm, requests, *verify)
        seen = counters(llm)
    right = 0
    for prompt, one, other in zip(requests, expected, verified, strict=True):
        tokens = list(one.outputs[0].token_ids)
        assert list(other.outputs[0].token_ids) == tokens
        sequence = replay.sequence()
        whole = [*prompt, *tokens]
        sequence.run(prompt, 0)
        position = len(prompt)
        while position < len(whole) - 1:
            guess = int(sequence.leave(whole[position], position, 0).argmax())
            sequence.run(whole[position : position + 2], position)
            # Right guesses are taken two at a time; at a block's first position there is none.
            taken = guess == whole[position + 1] and position % 32 != 0
            right += taken
            position += 1 + taken
    # The runner does not draft for the last tokens of a request.
    accepted = seen["vllm:spec_decode_num_accepted_tokens"]
    assert right - len(requests) <= accepted <= right
    assert right > 2 * len(requests)


@on_cpu
def test_verified_and_other_requests_share_a_batch(tiny):
    """Some verify, some leave for good, some do neither: each as it would alone."""
    block = {"exits": SOME, "cache": "recompute"}
    asked = [{"exit": "verify"}, {}, {"exit": False}, {"exit": "verify", "exit_min_layer": 5}, {}]
    replay = Replay(tiny(), block)
    options = {"num_gpu_blocks_override": 200, "enable_prefix_caching": False}
    with exiting(tiny(), block=block, speculative_config=VERIFY, **options) as (llm, trace):
        together = ask(llm, prompts()[:5], *asked, logprobs=-1)
        trace.take()
        for prompt, extra, mine in zip(prompts(), asked, together, strict=False):
            [alone] = ask(llm, [prompt], extra, logprobs=-1)
            tokens = list(mine.outputs[0].token_ids)
            assert list(alone.outputs[0].token_ids) == tokens
            events = [(0, len(prompt), -1)]
            events += [(len(prompt) + i, 1, -1) for i in range(len(tokens))]
            if extra == {}:
                events = replay.decisions(prompt, tokens)
            logits = step_logits(mine.outputs[0])
            assert replay.difference(prompt, tokens, logits, events) <= TOLERANCE


@on_cpu
def test_sampled_requests_beside_drafts(tiny):
    """Each draft is looked at with its own request's temperature, `top_k` and `top_p`."""
    from vllm import SamplingParams

    block = {"exits": [{"depth": 9, "gate": "softmax", "threshold": 0.02}], "cache": "propagate"}
    requests = [{"prompt_token_ids": prompt[:20]} for prompt in prompts()[:4]]
    likeliest = ({}, {"temperature": 0.9, "top_k": 1}, {"temperature": 1.7, "top_p": 1e-6})

    def sampled(llm: Any, wish: Any, ways: Sequence[dict[str, Any]]) -> list[list[int]]:
        params = [
            SamplingParams(
                detokenize=False, extra_args={"exit": wish}, max_tokens=60, ignore_eos=True,
                **{"temperature": 0, **way},
            )
            for way in ways
        ]  # fmt: skip
        asked = [request for request in requests for _ in ways]
        outputs = llm.generate(asked, params * len(requests), use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    options = {"num_gpu_blocks_override": 200, "max_num_seqs": 16, "speculative_config": VERIFY}
    with exiting(tiny(), block=block, **options) as (llm, _):
        expected = [each for each in sampled(llm, False, [{}]) for _ in likeliest]
        assert sampled(llm, "verify", likeliest) == expected
        # Beside requests that nothing is known of, other than that they end.
        random = {"temperature": 1.0, "top_k": 5, "top_p": 0.9}
        mixed = sampled(llm, "verify", [{}, random, likeliest[1]])
        assert mixed[::3] == mixed[2::3] == expected[::3]
        assert mixed[1::3] != expected[::3]
        assert counters(llm)["vllm:spec_decode_num_accepted_tokens"] > 0


@on_cpu
def test_a_request_at_the_length_limit_changes_no_other(tiny):
    """Near it the runner stops drafting for all, and would make all verify zeros instead."""
    block = {"exits": SOME, "cache": "recompute"}
    replay = Replay(tiny(), block)
    requests = [prompts()[4][:60], *(prompt[:20] for prompt in prompts()[:3])]
    options = {"max_model_len": 96, "enable_prefix_caching": False, "speculative_config": VERIFY}
    with exiting(tiny(), block=block, **options) as (llm, _):
        results = ask(llm, requests, *[{}] * 4, max_tokens=60, logprobs=-1)
    for prompt, result in zip(requests, results, strict=True):
        tokens = list(result.outputs[0].token_ids)
        assert len(tokens) == min(60, 96 - len(prompt))
        decided = replay.decisions(prompt, tokens)
        logits = step_logits(result.outputs[0])
        assert replay.difference(prompt, tokens, logits, decided) <= TOLERANCE


def test_verify_needs_a_server_that_can(tiny):
    from vllm.exceptions import VLLMValidationError

    with (
        exiting(tiny(), block={"exits": SOME}) as (llm, _),
        pytest.raises(VLLMValidationError, match="--speculative-config"),
    ):
        ask(llm, [prompts()[0]], {"exit": "verify"})


@pytest.mark.parametrize("policy", POLICIES)
def test_shadow_mode_counts_and_changes_nothing(tiny, policy):
    """Every token that leaves is compared with the full model; the replay does so as well."""
    block = {"exits": SOME, "cache": policy}
    options = {"num_gpu_blocks_override": 200, "enable_prefix_caching": False}
    with exiting(tiny(), block=block, **options) as (llm, _):
        plain = generate(llm, prompts())
    with exiting(tiny(), block={**block, "shadow": 1.0}, **options) as (llm, trace):
        watched = generate(llm, prompts())
        events = trace.take()
        totals = trace.loop.counters.as_dict()
    for (tokens, logits), (other, other_logits) in zip(plain, watched, strict=True):
        assert tokens == other
        assert (logits - other_logits).abs().max() <= TOLERANCE
    replay = Replay(tiny(), block)
    counts = [
        replay.agreement(prompt, tokens, happened)
        for prompt, (tokens, _), happened in zip(prompts(), watched, events, strict=True)
    ]
    assert totals["left"] == 0
    assert totals["shadowed"] == sum(totals["exits"]) == sum(fired for fired, _ in counts)
    assert totals["shadow_agreed"] == sum(agreed for _, agreed in counts)
    assert 0 < totals["shadow_agreed"] < totals["shadowed"]


def test_a_bad_request_harms_no_other(tiny):
    from vllm.exceptions import VLLMValidationError

    with exiting(tiny(), block={"exits": SOME}) as (llm, _):
        [before] = ask(llm, [prompts()[0]], {})
        with pytest.raises(VLLMValidationError, match="exit_threshold"):
            ask(llm, [prompts()[0]], {"exit_threshold": 7})
        with pytest.raises(VLLMValidationError, match="exit_treshold"):
            ask(llm, [prompts()[0]], {"exit_treshold": 0.5})
        [after] = ask(llm, [prompts()[0]], {})
    assert before.outputs[0].token_ids == after.outputs[0].token_ids


EAGER = {"enforce_eager": True, "skip_tokenizer_init": True, "dtype": "float32"}


def test_what_prepare_and_eval_measure(tiny, tmp_path):
    """The two functions that other processes run, on a checkpoint with exits."""
    early_exit = EarlyExitConfig.model_validate({"exits": SOFTMAX, "compaction": "auto"})
    efficiency = EfficiencyConfig(early_exit=early_exit)
    write_checkpoint(tiny(), tmp_path / "exits", efficiency, provenance={})
    folder = str(tmp_path / "exits")
    measured = run_with_engine(partial(measure_machine, **EAGER), folder, (1, 4))
    machine = Machine.model_validate(measured)
    assert machine.num_layers == 12
    assert len(machine.segments) == 2
    assert all(seconds > 0 for column in (machine.whole, machine.head) for seconds in column)
    assert machine.steps.keys() == {1, 4}
    assert forecast(machine, early_exit, [0], np.zeros((4, 32), dtype=int), 4).speed > 0

    swept = [setting.model_dump() for setting in exit_settings([0.0, 1.0])]
    measure = partial(measure_settings, **EAGER)
    rows = [
        Measured.model_validate(row)
        for row in run_with_engine(measure, folder, prompts()[:3], swept, 12, 8)
    ]
    off, checkpoint, everyone, nobody = rows
    assert [row.name for row in rows] == ["off", "checkpoint", "0", "1"]
    for row in (off, nobody):
        assert (row.agreement, row.same_output, row.layer_tokens) == (1, 1, 1)
        assert row.mean_depth == 12
    assert off.outputs == nobody.outputs
    assert everyone.agreement < 1
    assert everyone.same_output < 1
    assert 0 < checkpoint.agreement <= 1
    assert all(row.tokens_s > 0 and row.relative > 0 for row in rows)


@pytest.mark.parametrize("policy", POLICIES)
def test_padded_segments(tiny, policy, monkeypatch):
    """What is behind an exit reads persistent inputs, filled up to sizes with CUDA graphs.

    On a GPU the runner fills up whole batches; here the step's own context has to say so, too.
    """
    block = {"exits": SOME, "cache": policy}
    replay = Replay(tiny(), block)
    with exiting(tiny(), block=block) as (llm, trace):
        inputs = trace.loop.graph_inputs
        assert not inputs.sizes
        inputs._sizes = [1, 3, 4, 8]  # some batches are larger
        last, sizes, addresses = trace.loop.segments[-1], set(), set()

        def observed(positions, hidden, residual):
            placed = inputs.place(positions, hidden, residual)
            sizes.add(len(placed[1]))
            addresses.update((len(placed[1]), tensor.data_ptr()) for tensor in placed)
            return last(positions, hidden, residual)

        def padded(run):
            common = run._step.common
            return Tokens(common.slot_mapping, run._positions, OtherBatch(common), inputs)

        trace.loop.segments[-1] = observed
        monkeypatch.setattr(StepRun, "_all_tokens", padded)
        results = generate(llm, prompts())
        for prompt, (tokens, logits), seen in zip(prompts(), results, trace.take(), strict=True):
            assert replay.difference(prompt, tokens, logits, seen) <= TOLERANCE
    captured = {size for size in sizes if size in inputs.sizes}
    assert len(captured) > 1
    assert max(sizes) > 8
    # vLLM captures graphs of models in which it finds something compiled.
    assert set(trace.loop.parts) < set(trace.loop.trunk.modules())
    # Each captured size reads the same memory every time: positions, hidden, residual.
    assert len({entry for entry in addresses if entry[0] in captured}) == 3 * len(captured)


def speak(checkpoint: Path, **options: Any) -> list[tuple[Any, Any]]:
    """Results and events of an engine in a process of its own: in segments, then as one graph."""
    with exiting(checkpoint, **options) as (llm, trace):
        said = [(generate(llm, prompts()), trace.take())]
        trace.loop.preference.segments = lambda tokens: False
        return [*said, (generate(llm, prompts()), trace.take())]


def check_compiled(folder: Path, family: str, exits: list[dict[str, Any]], **options: Any) -> None:
    """Segments, and the one graph that has all exits in it, against the replay."""
    model = make_checkpoint(folder / "model", family, num_hidden_layers=6)
    block = {"exits": exits}
    replay = Replay(model, block, **options.get("sections", {}))
    checkpoint = replay.write(model, folder / "exits")
    options = {"block": block, "enforce_eager": False, **ROOMY, **options}
    for results, events in isolated(speak, checkpoint, family=family, **options):
        assert {exit for happened in events for _, _, exit in happened} == {-1, 0, 1}
        for prompt, (tokens, logits), happened in zip(prompts(), results, events, strict=True):
            assert replay.difference(prompt, tokens, logits, happened) <= TOLERANCE


@pytest.mark.works("early_exit", "compiled")
def test_compiled(tmp_path):
    first = {"depth": 2, "gate": "linear", "adapter": "block", "threshold": 0.5}
    second = {"depth": 4, "gate": "mlp", "adapter": "linear", "threshold": 0.5}
    check_compiled(tmp_path, "Llama", [first, second])


@pytest.mark.parametrize("policy", POLICIES)
def test_bf16_differs_by_its_rounding_only(tiny, policy):
    check_rounding(tiny(), "Llama", policy)


def check_rounding(checkpoint: Path, family: str, policy: str, **options: Any) -> None:
    """As far from the fp32 reference where tokens leave as where none does."""
    noise = []
    for exits in (SOME, [{**point, "threshold": 0.9999999} for point in SOME]):
        block = {"exits": exits, "cache": policy}
        replay = Replay(checkpoint, block)
        options = {**options, "dtype": "bfloat16"}
        with exiting(checkpoint, family, block=block, **options) as (llm, trace):
            results = generate(llm, prompts())
            followed = zip(prompts(), results, trace.take(), strict=True)
            noise.append(max(replay.difference(p, *result, seen) for p, result, seen in followed))
    leaving, staying = noise
    assert leaving <= 1.5 * staying


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a CUDA device")
@pytest.mark.parametrize("policy", POLICIES)
def test_cuda_graphs(tiny, policy, monkeypatch):
    monkeypatch.setenv(UNTESTED, "1")
    block = {"exits": SOME, "cache": policy}
    replay = Replay(tiny(), block)
    with exiting(tiny(), block=block, enforce_eager=False) as (llm, trace):
        results = generate(llm, prompts())
        inputs = trace.loop.graph_inputs
        assert inputs.captured == set(inputs.sizes)
        assert inputs.captured
        for prompt, (tokens, logits), seen in zip(prompts(), results, trace.take(), strict=True):
            assert replay.difference(prompt, tokens, logits, seen) <= TOLERANCE


def test_measured_steps_stay_inside_the_model_length(tiny):
    """Attention that is told of longer requests reads the block table beyond its end."""
    options = {"max_model_len": 40, "max_num_seqs": 4, "num_gpu_blocks_override": 8}
    seen = []

    def observe(step, input_ids, positions):
        seen.append((len(positions), int(step.common.seq_lens.max())))
        width = trace.loop.trunk.config.hidden_size
        return torch.zeros(len(positions), width, device=positions.device)

    with exiting(tiny(), block={"exits": SOME, "compaction": "auto"}, **options) as (llm, trace):
        assert trace.loop.preference.costs.whole.sizes == (1, 2, 4, 8, 16, 32, 64)
        trace.loop.rehearsal = observe
        [ran] = llm.collective_rpc("_run_dummy", args=(32,))
        [too_long] = llm.collective_rpc("_run_dummy", args=(256,))
        trace.loop.rehearsal = None
    assert (ran, too_long) == (True, False)
    assert seen == [(32, 40)]


@st.composite
def schedules(draw: st.DrawFn) -> list[tuple[int, int, int, dict[str, Any], int]]:
    """Requests: prompt length and seed, tokens, extra arguments, step at which it arrives or 0.

    A negative arrival aborts the request some steps later.
    """
    extra = st.one_of(
        st.just({}),
        st.just({"exit": False}),
        st.builds(lambda value: {"exit_threshold": value}, st.sampled_from([0.0, 0.3, 0.9])),
        st.just({"exit_min_layer": 6}),
    )
    return draw(
        st.lists(
            st.tuples(
                st.integers(1, 70), st.integers(0, 3), st.integers(1, 16), extra, st.integers(0, 12)
            ),
            min_size=1,
            max_size=4,
        )
    )


@pytest.mark.parametrize(
    ("policy", "examples"), [("recompute", 160), ("propagate", 60), ("copy", 60)]
)
def test_random_schedules(tiny, policy, examples):
    block = {"exits": SOME, "cache": policy}
    follow_random_schedules(Replay(tiny(), block), tiny(), "Llama", block, examples)


def follow_random_schedules(
    replay: Replay, checkpoint: Path, family: str, block: dict[str, Any], examples: int
) -> None:
    """Random arrivals, lengths, wishes and aborts, against the replay."""
    from vllm import SamplingParams

    options = {"enable_prefix_caching": False, "num_gpu_blocks_override": 7, "max_model_len": 128}
    with exiting(checkpoint, family, block=block, **options) as (llm, trace):
        numbers = iter(range(10**9))

        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(schedules(), st.integers(0, 5))
        # The last is preempted behind a token that left, and its resumed prompt ends just there.
        @example([(25, 0, 9, {}, 0), (25, 0, 9, {}, 0), (58, 0, 8, {}, 0)], 0)
        def check(wanted, aborted):
            arrivals = []
            for length, seed, tokens, extra, arrival in wanted:
                generator = torch.Generator().manual_seed(seed)
                prompt = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
                params = SamplingParams(
                    temperature=0,
                    max_tokens=tokens,
                    ignore_eos=True,
                    detokenize=False,
                    logprobs=-1,
                    extra_args=extra,
                )
                arrivals.append((arrival, str(next(numbers)), prompt, params))
            run_schedule(llm, trace, replay, arrivals, aborted)

        check()


def run_schedule(llm, trace, replay, arrivals, aborted) -> None:
    trace.take()
    vllm_engine = llm.llm_engine
    waiting = sorted(arrivals, key=lambda item: item[0])
    finished = {}
    step = 0
    while waiting or vllm_engine.has_unfinished_requests():
        while waiting and waiting[0][0] <= step:
            _, name, prompt, params = waiting.pop(0)
            vllm_engine.add_request(name, {"prompt_token_ids": prompt}, params)
        if step == 10 and aborted < len(arrivals):
            vllm_engine.abort_request([arrivals[aborted][1]])
        for output in vllm_engine.step():
            if output.finished and output.outputs[0].finish_reason == "length":
                finished[output.request_id] = output.outputs[0]
        step += 1
    events = {str(arrival(name)): happened for name, happened in trace.events.items()}
    for _, name, prompt, _ in arrivals:
        completion = finished.get(name)
        if completion is None:
            assert arrivals[aborted][1] == name
            continue
        logits = step_logits(completion)
        tokens = list(completion.token_ids)
        happened = events.get(name)
        if happened is None:  # nobody could leave while it ran
            happened = [
                (0, len(prompt), -1),
                *((len(prompt) + i, 1, -1) for i in range(len(tokens))),
            ]
        assert replay.difference(prompt, tokens, logits, happened) <= TOLERANCE
