"""Early exit of a Mamba-2 model, and gates that keep a state, against PyTorch, fp32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.test_early_exit import (
    ROOMY,
    SOFTMAX,
    SOME,
    TOLERANCE,
    Replay,
    Trace,
    arrival,
    ask,
    check_compiled,
    check_rounding,
    exiting,
    follow_random_schedules,
)
from tests.engine.test_layer_parallel_logits import MIXED_BATCHES, generate, prompts
from tests.engine.test_off import assert_identical, run
from tests.tiny import architecture, counters, engine, overrides
from vllm_effplugin.engine.state_pages import pages_at, state_tensors

STATE_POLICIES = ["recompute", "freeze", "state-only"]
MAMBA = {"gate": "mamba", "threshold": 0.6}
GATES = [{"depth": 3, **MAMBA}, {"depth": 8, **MAMBA}]
MOST_LEAVE = [{"depth": 3, "gate": "rate", "threshold": 0.2}, {"depth": 8, **MAMBA}]
"""Mostly, the first token of a block does not reach the second gate."""


# --- A Mamba-2 model ------------------------------------------------------------------------------


def test_without_leaving_it_is_the_stock_model(tiny):
    stock = run(tiny("Mamba2"), {"architectures": [architecture("Mamba2")]}, dtype="bfloat16")
    for efficiency in (None, {"early_exit": {"exits": [{"depth": 4}, {"depth": 8}]}}):
        ours = run(tiny("Mamba2"), overrides("Mamba2", efficiency), dtype="bfloat16")
        assert_identical(stock, ours)


@pytest.mark.works("early_exit", "Mamba-2", "V1 on CPU")
@pytest.mark.parametrize(
    ("exits", "policy"),
    [*((SOME, policy) for policy in STATE_POLICIES), (SOFTMAX, "recompute")],
    ids=[*STATE_POLICIES, "softmax"],
)
def test_state_policies(tiny, exits, policy):
    """Chunked prefill and decode, with waiting tokens that catch up through the scan."""
    block = {"exits": exits, "cache": policy}
    replay = Replay(tiny("Mamba2"), block)
    with exiting(tiny("Mamba2"), "Mamba2", block=block, **ROOMY) as (llm, trace):
        results = generate(llm, prompts())
        events = trace.take()
        assert trace.loop.counters["left"] > 0
        assert (trace.loop.counters["recomputed"] > 0) == (policy == "recompute")
    for prompt, (tokens, logits), happened in zip(prompts(), results, events, strict=True):
        assert replay.difference(prompt, tokens, logits, happened) <= TOLERANCE


@pytest.mark.parametrize("policy", STATE_POLICIES)
def test_random_schedules_of_a_state_space_model(tiny, policy):
    block = {"exits": SOME, "cache": policy}
    replay = Replay(tiny("Mamba2"), block)
    follow_random_schedules(replay, tiny("Mamba2"), "Mamba2", block, 20)


@pytest.mark.parametrize("policy", ["freeze", "state-only"])
def test_costs_of_a_state_space_model(tiny, policy):
    """Measured with states of the rows' own, which kernels skip where there is none."""
    block = {"exits": SOME, "cache": policy, "compaction": "auto"}
    with exiting(tiny("Mamba2"), "Mamba2", block=block, **ROOMY) as (_, trace):
        costs = trace.loop.preference.costs
    assert costs.whole.sizes[:4] == (1, 2, 4, 8)
    assert all(seconds > 0 for seconds in costs.whole.seconds)
    free = [max(column.seconds) < 0.1 * min(costs.whole.seconds) for column in costs.fill]
    assert free == [policy == "freeze"] * 2


# --- Gates with a state ---------------------------------------------------------------------------


class States:
    """The pages of the gates behind each step, for the rows that reached them."""

    def __init__(self, trace: Trace) -> None:
        self.trace, self.pages = trace, {}
        self._observe = trace.loop.on_step
        trace.loop.on_step = self

    def __call__(self, run: Any) -> None:
        self._observe(run)
        names = self.trace.names()
        for row, (last, fired) in enumerate(
            zip(run.rows.starts + run.rows.lengths - 1, run.passage.fired, strict=True)
        ):
            page = pages_at(run._step, np.array([row]), np.array([last]))
            for number, exit in enumerate(self.trace.loop.exits):
                if exit.point.gate == "mamba" and (fired < 0 or number <= fired):
                    parts = state_tensors(exit.gate.states)
                    kept = torch.cat([part[page].flatten() for part in parts])
                    self.pages[arrival(names[row]), int(last), number] = kept

    def look(self, request: int, found: list[float]):
        """A callback that compares one request's with the reference's."""

        def look(sequence: Any, last: int) -> None:
            for number, trace in sequence._gates.items():
                ours = self.pages.get((request, last, number))
                if ours is not None:
                    theirs = torch.cat([part.flatten() for part in trace._behind[last + 1]])
                    found.append((ours - theirs).abs().max().item())

        return look


@pytest.mark.parametrize(
    ("family", "exits", "policy"),
    [
        ("Llama", GATES, "recompute"),
        ("Llama", GATES, "propagate"),
        ("Llama", MOST_LEAVE, "copy"),
        ("Mamba2", GATES, "recompute"),
        ("Mamba2", MOST_LEAVE, "freeze"),
        ("Mamba2", GATES, "state-only"),
    ],
)
def test_states_are_those_of_a_scan(tiny, tmp_path, family, exits, policy):
    """Over chunked prefill, decode, preemption, reordering and prefix hits."""
    attends = family != "Mamba2"
    block = {"exits": exits, "cache": policy, "gate_width": 32}
    replay = Replay(tiny(family), block)
    checkpoint = replay.write(tiny(family), tmp_path / "exits")
    options = {} if attends else ROOMY
    off = [{"exit": False}] * len(prompts())
    with exiting(checkpoint, family, block=block, **options) as (llm, trace):
        states = States(trace)
        ask(llm, prompts(), *off, max_tokens=1)  # fills the prefix cache with blocks without states
        first = len(prompts())
        for again in (False, True):
            trace.take()
            states.pages.clear()
            hits = counters(llm)["vllm:prefix_cache_hits"] if attends else 0
            results = generate(llm, prompts())
            events = trace.take()
            if again and policy != "recompute":
                break  # approximate blocks may be hit, which the replay does not follow
            found: list[float] = []
            requests = enumerate(zip(prompts(), results, events, strict=True), start=first)
            for request, (prompt, (tokens, logits), happened) in requests:
                look = states.look(request, found)
                assert replay.difference(prompt, tokens, logits, happened, look) <= TOLERANCE
            assert len(found) > 30
            assert max(found) <= 1e-4
            first += len(prompts())
            if attends and again:
                assert counters(llm)["vllm:prefix_cache_hits"] > hits
        assert trace.loop.counters["left"] > 0
        assert not attends or counters(llm)["vllm:num_preemptions"] > 0


@pytest.mark.parametrize(
    ("family", "adapter", "compaction"),
    [("Llama", "block", "always"), ("Llama", "none", "auto"), ("Mamba2", "linear", "auto")],
)
def test_what_gates_decide(tiny, tmp_path, family, adapter, compaction):
    """Worked out apart; with `auto` the stack runs as one graph at first."""
    exits = [{**point, "adapter": adapter} for point in GATES]
    block = {"exits": exits, "compaction": compaction, "gate_width": 32}
    replay = Replay(tiny(family), block)
    checkpoint = replay.write(tiny(family), tmp_path / "exits")
    with exiting(checkpoint, family, block=block, **ROOMY) as (llm, _):
        results = generate(llm, prompts())
    assert replay.taken(results) == {-1, 0, 1}


@pytest.mark.parametrize(
    ("family", "policy"), [("Llama", "propagate"), ("Mamba2", "freeze"), ("Mamba2", "state-only")]
)
def test_shadow_mode_changes_nothing(tiny, tmp_path, family, policy):
    """Tokens that run on to be compared leave states as if they had left."""
    block = {"exits": MOST_LEAVE, "cache": policy, "gate_width": 32}
    replay = Replay(tiny(family), block)
    checkpoint = replay.write(tiny(family), tmp_path / "exits")
    with exiting(checkpoint, family, block=block, **ROOMY) as (llm, trace):
        states = States(trace)
        plain = generate(llm, prompts())
        expected = dict(states.pages)
        for nth, as_one in enumerate((False, True), start=1):
            trace.take()
            states.pages.clear()
            trace.loop.shadow = 1.0
            if as_one:
                trace.loop.preference.segments = lambda tokens: False
            watched = generate(llm, prompts())
            assert trace.loop.counters["shadowed"] > 0
            for (tokens, logits), (other, other_logits) in zip(plain, watched, strict=True):
                assert tokens == other
                assert (logits - other_logits).abs().max() <= TOLERANCE
            assert len(expected) > 10
            for (request, last, gate), kept in expected.items():
                watched_state = states.pages[request + nth * len(prompts()), last, gate]
                assert (kept - watched_state).abs().max() <= 1e-4


def test_two_ranks(tiny, tmp_path):
    block = {"exits": GATES, "cache": "state-only", "compaction": "always", "max_pending": 5}
    block["gate_width"] = 16  # a rank's share of a page is small
    replay = Replay(tiny("Mamba2"), block)
    checkpoint = replay.write(tiny("Mamba2"), tmp_path / "exits")
    changed = overrides("Mamba2", {"early_exit": block})
    with engine(checkpoint, tp=2, hf_overrides=changed, **{**MIXED_BATCHES, **ROOMY}) as llm:
        results = generate(llm, prompts())
    assert replay.taken(results) == {-1, 0, 1}


def test_compiled(tmp_path):
    check_compiled(tmp_path, "Mamba2", [{"depth": 2, **MAMBA}, {"depth": 4, **MAMBA}])


@pytest.mark.parametrize("policy", ["recompute", "state-only"])
def test_bf16_differs_by_its_rounding_only(tiny, policy):
    check_rounding(tiny("Mamba2"), "Mamba2", policy, **ROOMY)


def test_a_page_too_small_for_a_state_is_refused(tiny, tmp_path):
    from vllm_effplugin.errors import UnsupportedError

    block = {"exits": GATES, "gate_width": 256}
    replay = Replay(tiny(), block)
    checkpoint = replay.write(tiny(), tmp_path / "exits")
    with (
        pytest.raises(UnsupportedError, match="--block-size"),
        exiting(checkpoint, block=block),
    ):
        pass
