"""What has to hold in a soak: pure functions from what was seen to what is wrong with it."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from servers import total
from soak_traffic import Ask, Reply

GROWTH_MIB = 8.0
"""What a server may grow by, from the end of its warm-up on. See docs/soak.md for why."""

FEWEST_CHARACTERS = 12
"""Of a sentence."""


# --- One request ----------------------------------------------------------------------------------


def problems(ask: Ask, reply: Reply) -> list[str]:
    """What is wrong with a reply; nothing, if it is the one that the request has to get."""
    try:
        return _problems(ask, reply)
    except (KeyError, TypeError, ValueError) as error:
        return [f"an answer of another form, {error!r}: {reply.text[:200]}{reply.events[-2:]}"]


def _problems(ask: Ask, reply: Reply) -> list[str]:
    if reply.error:
        return [reply.error]
    if reply.status is not None and reply.status >= 500:
        return [f"HTTP {reply.status}: {reply.text[:200]}"]
    if reply.left:
        return [] if ask.ends == "left" else ["the client went"]
    if ask.ends == "refused":
        return _refusal_problems(reply)
    if reply.status != 200:
        return [f"HTTP {reply.status}: {reply.text[:200]}"]
    if ask.streams:
        return _stream_problems(ask, reply.events)
    said = reply.json()
    if not isinstance(said, dict):
        return ["the answer is not a JSON object"]
    if ask.path in ("/classify", "/pooling"):
        return _class_problems(ask, said)
    return _answer_problems(ask, said)


def _refusal_problems(reply: Reply) -> list[str]:
    if reply.status is None or not 400 <= reply.status < 500:
        return [f"a bad request got HTTP {reply.status}"]
    said = reply.json()
    if isinstance(said, dict):  # FastAPI's own are below `detail`
        said = said.get("error", said.get("detail"))
    message = said.get("message") if isinstance(said, dict) else said
    if not isinstance(message, str) or len(message) < FEWEST_CHARACTERS:
        return [f"a refusal without a sentence: {reply.text[:200]}"]
    return []


def _answer_problems(ask: Ask, said: Mapping[str, Any]) -> list[str]:
    choices = said.get("choices") or []
    if sorted(choice["index"] for choice in choices) != list(range(ask.choices)):
        return [f"{len(choices)} choices instead of {ask.choices}"]
    counts = {choice["index"]: len(choice["token_ids"]) for choice in choices}
    reasons = {choice["index"]: [choice["finish_reason"]] for choice in choices}
    found = _ending_problems(ask, counts, reasons, said.get("usage"))
    for choice in choices:
        shown = _logprobs(choice)
        if shown is not None and shown != len(choice["token_ids"]):
            found.append(f"{shown} logprobs of {len(choice['token_ids'])} tokens")
    return found


def _stream_problems(ask: Ask, events: Sequence[str]) -> list[str]:
    if events.count("[DONE]") != 1 or events[-1] != "[DONE]":
        return [f"a stream with {events.count('[DONE]')} [DONE], the last event {events[-1:]}"]
    chunks = [json.loads(event) for event in events[:-1]]
    found = [f"an error in a stream: {chunk['error']}" for chunk in chunks if "error" in chunk]
    if found:
        return found
    if len({chunk["id"] for chunk in chunks}) != 1:
        found.append("a stream with several ids")
    counts: Counter[int] = Counter(dict.fromkeys(range(ask.choices), 0))
    reasons: dict[int, list[str]] = {index: [] for index in range(ask.choices)}
    usage = None
    for chunk in chunks:
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            index = choice["index"]
            if index not in reasons:
                return [f"a stream with a choice {index} of {ask.choices}"]
            if reasons[index]:
                found.append("a choice goes on after its end")
            counts[index] += len(choice.get("token_ids") or ())
            if choice["finish_reason"] is not None:
                reasons[index].append(choice["finish_reason"])
    return found + _ending_problems(ask, counts, reasons, usage)


def _ending_problems(
    ask: Ask,
    counts: Mapping[int, int],
    reasons: Mapping[int, Sequence[str]],
    usage: Mapping[str, Any] | None,
) -> list[str]:
    found = []
    for index, given in reasons.items():
        wanted = ("length",) if ask.tokens is not None else ("length", "stop")
        if len(given) != 1 or given[0] not in wanted:
            found.append(f"choice {index} ends with {list(given)}")
        if ask.tokens is not None and counts[index] != ask.tokens:
            found.append(f"choice {index} has {counts[index]} tokens instead of {ask.tokens}")
    told = (usage or {}).get("completion_tokens")
    if told is None or not sum(counts.values()) <= told <= ask.most:
        found.append(f"usage says {told} tokens, there are {sum(counts.values())}")
    return found


def _logprobs(choice: Mapping[str, Any]) -> int | None:
    shown = choice.get("logprobs")
    if shown is None:
        return None
    return len(shown["content"] if "content" in shown else shown["token_logprobs"])


def _class_problems(ask: Ask, said: Mapping[str, Any]) -> list[str]:
    rows = said.get("data") or []
    if len(rows) != ask.choices:
        return [f"{len(rows)} answers for {ask.choices} texts"]
    found = []
    for row in rows:
        if not math.isclose(sum(row["probs"]), 1, abs_tol=1e-3):
            found.append(f"probabilities {row['probs']}")
        for name, wanted in (("layers", ask.layers), ("merged", ask.merged)):
            if wanted is not None and row[name] != wanted:
                found.append(f"{name} {row[name]} instead of {wanted}")
    return found


# --- All requests ---------------------------------------------------------------------------------


@dataclass
class Ledger:
    """Every request of a stage, entered once.

    Attributes:
        sent: requests that began.
        kinds: that ended, by kind.
        tokens, texts: that were answered.
        unsure: tokens and texts of those that were given up, at most.
        origins: of an edge's tokens, as its answers say.
        breaks: what is wrong.
    """

    sent: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    texts: int = 0
    unsure: Counter[str] = field(default_factory=Counter)
    origins: Counter[str] = field(default_factory=Counter)
    breaks: list[str] = field(default_factory=list)
    _ids: set[str] = field(default_factory=set)

    def enter(self, ask: Ask, reply: Reply) -> None:
        """The end of a request."""
        self.kinds[ask.kind] += 1
        wrong = problems(ask, reply)
        self.breaks += [f"{ask.kind}: {each}; {_short(ask)}" for each in wrong]
        classifies = ask.path in ("/classify", "/pooling")
        if reply.left or wrong:
            self.unsure["texts" if classifies else "tokens"] += ask.most
            return
        if ask.ends == "refused":
            return
        chunks = [json.loads(event) for event in reply.events[:-1]] or [reply.json()]
        self._identify(chunks[0], ask)
        if classifies:
            self.texts += ask.choices
            return
        self.tokens += next(c["usage"]["completion_tokens"] for c in chunks[::-1] if c.get("usage"))
        for chunk in chunks:
            report = (chunk.get("kv_transfer_params") or {}).get("effplugin", {})
            self.origins.update(report.get("tokens_by_origin", {}))

    def _identify(self, said: Mapping[str, Any], ask: Ask) -> None:
        name = said.get("id") or said.get("request_id")
        if name in self._ids:
            self.breaks.append(f"{ask.kind}: a second answer with the id {name}")
        if name is not None:
            self._ids.add(name)

    @property
    def open(self) -> int:
        """Requests that have not ended."""
        return self.sent - self.kinds.total()


def _short(ask: Ask) -> str:
    text = ask.body.decode(errors="replace") if isinstance(ask.body, bytes) else str(ask.body)
    return f"{ask.path} {text if len(text) < 300 else text[:150] + ' ... ' + text[-150:]}"


# --- A server at rest -----------------------------------------------------------------------------

GAUGES_AT_REST = (
    "effplugin_exit_pending_tokens",
    "effplugin_edge_waiting_questions",
    "effplugin_cloud_sessions_held",
    "effplugin_cloud_sessions_computed",
    "effplugin_cloud_positions_held",
)


def rest_problems(shown: Mapping[str, float], *, session_share: float = 0.0) -> list[str]:
    """What a server without requests still holds.

    Args:
        shown: its `/metrics`.
        session_share: of a cloud, whose engine shows its last step: the share of the cache that the
            session of that step had.
    """
    found = []
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting"):
        if total(shown, name) > (session_share > 0):
            found.append(f"{name} is {total(shown, name):g}")
    usage = total(shown, "vllm:kv_cache_usage_perc")
    if usage > session_share:
        found.append(f"{usage:.4f} of the KV cache is in use")
    for name in GAUGES_AT_REST:
        if total(shown, name):
            found.append(f"{name} is {total(shown, name):g}")
    return found


def count_problems(shown: Mapping[str, float], ledger: Ledger) -> list[str]:
    """Where what a server has counted is not what its clients got.

    Args:
        shown: what its `/metrics` grew by.
    """
    found = []

    def between(name: str, answered: float, unsure: float) -> None:
        if any(sample.partition("{")[0] == name for sample in shown):
            count = total(shown, name)
            if not answered <= count <= answered + unsure:
                found.append(f"{name} {count:g}, not from {answered:g} to {answered + unsure:g}")

    def ordered(less: str, more: str) -> None:
        if total(shown, less) > total(shown, more):
            found.append(f"{less} {total(shown, less):g} > {more} {total(shown, more):g}")

    texts, tokens = ledger.unsure["texts"], ledger.unsure["tokens"]
    if not ledger.texts:
        between("vllm:generation_tokens_total", ledger.tokens, tokens)
    between("effplugin_edge_tokens_total", ledger.tokens, tokens)
    for origin, answered in ledger.origins.items():
        count = total(shown, "effplugin_edge_tokens_total", f'origin="{origin}"')
        if answered > count:  # of several choices, answers report one
            found.append(f"edge tokens of origin {origin}: {count:g}, answered {answered}")
    between("effplugin_classify_sequences_total", ledger.texts, texts)
    ordered("effplugin_exit_tokens_total", "effplugin_exit_decode_tokens_total")
    ordered("effplugin_exit_compacted_tokens_total", "effplugin_exit_tokens_total")
    ordered("effplugin_exit_shadow_agreed_tokens_total", "effplugin_exit_shadow_tokens_total")
    # Drafts and their verification may run more layers than the full model would.
    drafted = total(shown, "vllm:spec_decode_num_draft_tokens_total") > 0
    for kind in ("classify",) if drafted else ("classify", "exit"):
        ordered(f"effplugin_{kind}_layer_tokens_total", f"effplugin_{kind}_full_layer_tokens_total")
    ordered("effplugin_multiplex_member_tokens_total", "effplugin_multiplex_slot_tokens_total")
    return found


def grown(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """What samples grew by."""
    return {name: value - before.get(name, 0.0) for name, value in after.items()}


# --- Memory and answers ---------------------------------------------------------------------------


def growth(at_rest: Sequence[float]) -> float:
    """MiB from the end of the warm-up, a third of the stage, to its end.

    Args:
        at_rest: MiB, whenever the server had no requests.
    """
    return at_rest[-1] - at_rest[len(at_rest) // 3]


def memory_problems(at_rest: Sequence[float], bound: float = GROWTH_MIB) -> list[str]:
    """Whether memory grows; two measurements at least."""
    if len(at_rest) < 2:
        return [f"memory was measured {len(at_rest)} times"]
    if growth(at_rest) > bound:
        return [f"memory grew by {growth(at_rest):.0f} MiB; {bound:.0f} are allowed"]
    return []


def essence(reply: Reply) -> Any:
    """What of an answer has to be the same bit for bit: tokens and logprobs, or probabilities."""
    said = reply.json()
    if not isinstance(said, dict):
        return None
    if "data" in said:
        return [row["probs"] for row in said["data"]]
    return [
        (choice["token_ids"], json.dumps(choice.get("logprobs")))
        for choice in said.get("choices", ())
    ]


def words_of(found: Any) -> Any:
    """Of an essence what stock vLLM under load would give as well: tokens without logprobs."""
    return [each[0] if isinstance(each, tuple) else each for each in found or ()]


def difference(expected: Any, found: Any) -> str:
    """Where two essences differ; nothing, if they do not."""
    return "" if expected == found else f"{str(expected)[:300]} became {str(found)[:300]}"
