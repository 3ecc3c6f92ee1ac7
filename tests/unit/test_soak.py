"""The soak's checks: each of them can fail."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

# The benchmarks are scripts beside the package, not part of it.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from soak_checks import (
    Ledger,
    count_problems,
    difference,
    essence,
    grown,
    growth,
    memory_problems,
    problems,
    rest_problems,
    words_of,
)
from soak_traffic import Ask, Reply, classification, language

COMPLETION = Ask("completion", "/v1/completions", {}, choices=2, tokens=3, most=6)
STREAMED = replace(COMPLETION, body={"stream": True})
CLASSES = Ask("classify", "/pooling", {}, choices=2, most=2, layers=6, merged=1)
REFUSED = Ask("refused", "/pooling", b"{", "refused")


def answer(**changes: Any) -> Reply:
    """Two choices of three tokens."""
    choices = [
        {"index": i, "token_ids": [1, 2, 3], "finish_reason": "length", "logprobs": None}
        for i in range(2)
    ]
    said = {"id": "a", "choices": choices, "usage": {"completion_tokens": 6}, **changes}
    return Reply(200, json.dumps(said))


def choice(index: int = 0, tokens: int = 3, reason: str | None = "length", **more: Any) -> dict:
    return {"index": index, "token_ids": [7] * tokens, "finish_reason": reason, **more}


def events(*chunks: list[dict]) -> Reply:
    """A stream of choices, and its end."""
    told: list[dict] = [{"id": "a", "choices": chunk} for chunk in chunks]
    told.append({"id": "a", "choices": [], "usage": {"completion_tokens": 6}})
    return Reply(200, events=[*map(json.dumps, told), "[DONE]"])


def rows(*changes: dict[str, Any]) -> Reply:
    whole = {"probs": [0.25, 0.75], "layers": 6, "merged": 1}
    return Reply(200, json.dumps({"data": [{**whole, **change} for change in changes]}))


GOOD_STREAM = events([choice(1, 1, None)], [choice(0)], [choice(1, 2)])


@pytest.mark.parametrize(
    ("ask", "reply"),
    [
        (COMPLETION, answer()),
        (STREAMED, GOOD_STREAM),
        (CLASSES, rows({}, {})),
        (REFUSED, Reply(400, '{"error": {"message": "this is not JSON at all"}}')),
        (REFUSED, Reply(400, '{"detail": "There was an error parsing the body"}')),
        (replace(STREAMED, ends="left"), Reply(200, events=["{}"], left=True)),
        (replace(COMPLETION, ends="left"), Reply(left=True)),
        (replace(COMPLETION, ends="left"), answer()),
    ],
)
def test_what_is_right_passes(ask: Ask, reply: Reply) -> None:
    assert problems(ask, reply) == []


@pytest.mark.parametrize(
    ("ask", "reply", "named"),
    [
        (COMPLETION, Reply(error="ReadError"), "ReadError"),
        (COMPLETION, Reply(500, "oh"), "HTTP 500"),
        (COMPLETION, Reply(404, "who"), "HTTP 404"),
        (COMPLETION, Reply(200, "[1]"), "not a JSON object"),
        (COMPLETION, Reply(left=True), "the client went"),
        (COMPLETION, answer(choices=[choice()]), "1 choices instead of 2"),
        (COMPLETION, answer(choices=[choice(), choice(0)]), "2 choices instead of 2"),
        (COMPLETION, answer(choices=[choice(), choice(1, 2)]), "2 tokens instead of 3"),
        (COMPLETION, answer(choices=[choice(), choice(1, 3, "stop")]), "ends with"),
        (COMPLETION, answer(choices=[choice(), choice(1, 3, None)]), "ends with"),
        (COMPLETION, answer(usage={"completion_tokens": 7}), "usage says 7"),
        (COMPLETION, answer(usage=None), "usage says None"),
        (COMPLETION, answer(choices=[choice(), {}]), "another form"),
        (
            COMPLETION,
            answer(choices=[choice(), choice(1, logprobs={"token_logprobs": [0.5]})]),
            "1 logprobs of 3",
        ),
        (STREAMED, replace(GOOD_STREAM, events=GOOD_STREAM.events[:-1]), "0 .DONE."),
        (STREAMED, replace(GOOD_STREAM, events=[*GOOD_STREAM.events, "[DONE]"]), "2 .DONE."),
        (STREAMED, Reply(200), "0 .DONE."),
        (STREAMED, events([choice()]), "choice 1 ends with"),
        (STREAMED, events([choice()], [choice(1)], [choice(1)]), "goes on after its end"),
        (STREAMED, events([choice(5)]), "a choice 5 of 2"),
        (
            STREAMED,
            Reply(200, events=['{"error": {"message": "no"}}', "[DONE]"]),
            "an error in a stream",
        ),
        (
            STREAMED,
            replace(GOOD_STREAM, events=['{"id": "b", "choices": []}', *GOOD_STREAM.events]),
            "several ids",
        ),
        (CLASSES, rows({}), "1 answers for 2 texts"),
        (CLASSES, rows({}, {"probs": [0.5, 0.6]}), "probabilities"),
        (CLASSES, rows({}, {"layers": 3}), "layers 3 instead of 6"),
        (CLASSES, rows({}, {"merged": 2}), "merged 2 instead of 1"),
        (REFUSED, Reply(200, "{}"), "bad request got HTTP 200"),
        (REFUSED, Reply(400, "{}"), "without a sentence"),
        (REFUSED, Reply(400, '{"error": {"message": "no"}}'), "without a sentence"),
        (REFUSED, Reply(503, "{}"), "HTTP 503"),
    ],
)
def test_what_is_wrong_with_a_reply_is_named(ask: Ask, reply: Reply, named: str) -> None:
    found = problems(ask, reply)
    assert found
    assert any(named.replace(".DONE.", "[DONE]") in each for each in found), found


def test_every_request_is_in_the_ledger_once() -> None:
    ledger = Ledger(sent=3)
    ledger.enter(COMPLETION, answer(id="a"))
    ledger.enter(replace(COMPLETION, ends="left"), Reply(left=True))
    assert (ledger.open, ledger.tokens, ledger.unsure["tokens"]) == (1, 6, 6)
    assert ledger.breaks == []
    report = {"effplugin": {"tokens_by_origin": {"edge": 4, "cloud": 2}}}
    ledger.enter(COMPLETION, answer(id="a", kv_transfer_params=report))
    assert ledger.open == 0
    assert ledger.origins == {"edge": 4, "cloud": 2}
    [said] = ledger.breaks
    assert "a second answer with the id a" in said


REST = {
    "vllm:num_requests_running": 0.0,
    "vllm:num_requests_waiting": 0.0,
    "vllm:kv_cache_usage_perc": 0.0,
    "effplugin_exit_pending_tokens": 0.0,
    "effplugin_edge_waiting_questions": 0.0,
    "effplugin_cloud_sessions_held": 0.0,
    "effplugin_cloud_sessions_computed": 0.0,
    "effplugin_cloud_positions_held": 0.0,
}


def shown(values: dict[str, float]) -> dict[str, float]:
    return {f'{name}{{engine="0"}}': value for name, value in values.items()}


@pytest.mark.parametrize("name", REST)
def test_nothing_may_be_left_at_rest(name: str) -> None:
    assert rest_problems(shown(REST)) == []
    found = rest_problems(shown({**REST, name: 1.0}))
    assert found
    assert all(name in each or "KV cache" in each for each in found)


def test_a_clouds_engine_may_show_its_last_session() -> None:
    last = {**REST, "vllm:num_requests_running": 1.0, "vllm:kv_cache_usage_perc": 0.1}
    assert rest_problems(shown(last), session_share=0.1) == []
    assert rest_problems(shown(last), session_share=0.05)
    assert rest_problems(shown({**last, "vllm:num_requests_running": 2.0}), session_share=0.1)


def test_counts_are_those_of_the_answers() -> None:
    ledger = Ledger(tokens=100, unsure=Counter(tokens=10), origins=Counter(edge=60, cloud=40))
    good = {
        "vllm:generation_tokens_total{}": 104.0,
        'effplugin_edge_tokens_total{origin="edge"}': 64.0,
        'effplugin_edge_tokens_total{origin="cloud"}': 40.0,
        "effplugin_exit_decode_tokens_total{}": 90.0,
        "effplugin_exit_tokens_total{}": 50.0,
        "effplugin_exit_compacted_tokens_total{}": 40.0,
        "effplugin_exit_shadow_tokens_total{}": 5.0,
        "effplugin_exit_shadow_agreed_tokens_total{}": 5.0,
        "effplugin_exit_layer_tokens_total{}": 5.0,
        "effplugin_exit_full_layer_tokens_total{}": 5.0,
    }
    assert count_problems(good, ledger) == []
    for name, wrong in {
        "vllm:generation_tokens_total{}": 99.0,
        'effplugin_edge_tokens_total{origin="edge"}': 71.0,  # 111 in all
        'effplugin_edge_tokens_total{origin="cloud"}': 39.0,
        "effplugin_exit_tokens_total{}": 91.0,
        "effplugin_exit_compacted_tokens_total{}": 51.0,
        "effplugin_exit_shadow_agreed_tokens_total{}": 6.0,
        "effplugin_exit_layer_tokens_total{}": 6.0,
    }.items():
        assert count_problems({**good, name: wrong}, ledger), name
    drafts = {"vllm:spec_decode_num_draft_tokens_total{}": 9.0}
    assert not count_problems(
        {**good, **drafts, "effplugin_exit_layer_tokens_total{}": 6.0}, ledger
    )
    texts = Ledger(texts=7)
    assert count_problems({"effplugin_classify_sequences_total{}": 7.0}, texts) == []
    assert count_problems({"effplugin_classify_sequences_total{}": 8.0}, texts)
    merged = "effplugin_multiplex_member_tokens_total{}"
    assert count_problems({merged: 8.0, merged.replace("member", "slot"): 7.0}, texts)


def test_memory_may_not_grow_after_its_warm_up() -> None:
    assert growth([100, 400, 401, 402]) == 2
    assert memory_problems([100, 400, 401, 402], bound=5) == []
    assert memory_problems([100, 400, 401, 406], bound=5)
    assert memory_problems([100])


def test_answers_are_compared_bit_for_bit() -> None:
    logprobs = {"token_logprobs": [-0.1, -0.2, -0.3]}
    one = essence(answer(choices=[choice(logprobs=logprobs)]))
    logprobs["token_logprobs"][2] = -0.3 - 1e-9
    other = essence(answer(choices=[choice(logprobs=logprobs)]))
    assert not difference(one, one)
    assert difference(one, other)
    assert difference(essence(rows({})), essence(rows({"probs": [0.25 + 1e-9, 0.75]})))
    assert difference(one, essence(Reply(error="none")))
    assert not difference(words_of(one), words_of(other))


def test_growth_of_counters() -> None:
    assert grown({"a": 1.0}, {"a": 3.0, "b": 2.0}) == {"a": 2.0, "b": 2.0}


def test_traffic_is_seeded_and_of_all_kinds() -> None:
    def drawn(seed: int) -> list[Ask]:
        chance = random.Random(seed)
        found = [language(chance, "m", edge=i % 2 == 0) for i in range(600)]
        return found + [classification(chance, "m", 30) for _ in range(300)]

    asks = drawn(0)
    assert asks == drawn(0) != drawn(1)
    kinds = Counter(ask.kind for ask in asks)
    assert set(kinds) == {
        "completion", "completion, streamed", "chat", "chat, streamed", "classify",
        "classify with options", "given up", "refused",
    }  # fmt: skip
    assert {ask.ends for ask in asks} == {"answered", "refused", "left"}
