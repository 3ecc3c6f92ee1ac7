"""What the soak sends: seeded requests of many kinds, each with what has to come of it."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

ANSWER_LIMIT_S = 180.0
_TEXT = (
    "the capital of France is Paris and water boils at a hundred degrees while bread needs flour "
    "yeast salt time once upon there was a king who asked why light bends in glass def return "
    "list number question answer perhaps never always because"
)
WORDS = _TEXT.split()
PREAMBLE = " ".join(WORDS * 3)
"""What many prompts begin with, so that prefixes are found."""

Body = dict[str, Any]


@dataclass(frozen=True)
class Ask:
    """A request.

    Attributes:
        kind: what it is counted as.
        ends: `answered`; `refused`, with a sentence; `left`, because its client goes.
        choices: that an answer has.
        tokens: of each choice, where they are certain.
        most: tokens of all choices at most.
        after_s, after_events: when the client goes: so long after asking, so many events into a
            stream.
        layers, merged: what the classifier has to say of each text.
    """

    kind: str
    path: str
    body: Body | bytes
    ends: Literal["answered", "refused", "left"] = "answered"
    choices: int = 1
    tokens: int | None = None
    most: int = 0
    after_s: float | None = None
    after_events: int | None = None
    layers: int | None = None
    merged: int | None = None

    @property
    def streams(self) -> bool:
        return isinstance(self.body, dict) and self.body.get("stream") is True


@dataclass
class Reply:
    """What came of it.

    Attributes:
        status: None where none came.
        events: of a stream, without `data: `.
        left: whether the client went before the end.
        error: what broke the connection.
    """

    status: int | None = None
    text: str = ""
    events: list[str] = field(default_factory=list)
    left: bool = False
    error: str = ""

    def json(self) -> Any:
        """The body; None where it is not JSON."""
        try:
            return json.loads(self.text)
        except ValueError:
            return None


async def send(client: httpx.AsyncClient, ask: Ask) -> Reply:
    """Ask, and stay until the answer is complete, or as long as the request says."""
    reply = Reply()
    try:
        async with asyncio.timeout(ask.after_s or ANSWER_LIMIT_S):
            await _exchange(client, ask, reply)
    except TimeoutError:
        if ask.after_s is None:
            reply.error = f"no answer within {ANSWER_LIMIT_S:.0f} s"
        reply.left = True
    except httpx.HTTPError as error:
        reply.error = f"{type(error).__name__}: {error}"
    return reply


async def _exchange(client: httpx.AsyncClient, ask: Ask, reply: Reply) -> None:
    headers = {"Content-Type": "application/json"}
    content = ask.body if isinstance(ask.body, bytes) else json.dumps(ask.body).encode()
    async with client.stream("POST", ask.path, content=content, headers=headers) as answer:
        reply.status = answer.status_code
        if answer.status_code != 200 or not ask.streams:
            reply.text = (await answer.aread()).decode()
            return
        async for line in answer.aiter_lines():
            if line.startswith("data: "):
                reply.events.append(line.removeprefix("data: "))
                if len(reply.events) == ask.after_events:
                    reply.left = True
                    return
            elif line:
                reply.error = f"a stream holds {line[:80]!r}"


# --- Language models ------------------------------------------------------------------------------


def words(chance: random.Random, most: int) -> str:
    """Some, which begin like others' half of the time."""
    own = " ".join(chance.choices(WORDS, k=chance.randint(1, most)))
    return f"{PREAMBLE} {own}" if chance.random() < 0.5 else own


def exit_wishes(chance: random.Random) -> Body:
    """`vllm_xargs` for a server whose exits are verified on demand."""
    return chance.choice(
        (
            {},
            {"exit": False},
            {"exit": "verify"},
            {"exit": "verify", "exit_threshold": 0.2},
            {"exit": True, "exit_threshold": round(chance.random(), 2)},
            {"exit_threshold": "0.0"},
            {"exit_threshold": 0.3, "exit_min_layer": chance.randint(0, 30)},
        )
    )


def edge_wishes(chance: random.Random) -> Body:
    """`vllm_xargs` for an edge."""
    mode = chance.choice((None, "standalone", "collaborative", "cloud"))
    wishes: Body = {} if mode is None else {"cloud_mode": mode}
    if chance.random() < 0.3:
        wishes["exit_threshold"] = round(chance.random(), 2)
    return wishes


BAD_FIELDS: tuple[Body, ...] = (
    {"vllm_xargs": {"exit": "perhaps"}},
    {"vllm_xargs": {"exit_treshold": 0.5}},
    {"vllm_xargs": {"exit_threshold": 1.5}},
    {"vllm_xargs": {"exit_threshold": "high"}},
    {"vllm_xargs": {"exit_min_layer": -1}},
    {"vllm_xargs": {"exit": {"a": 1}}},
    {"vllm_xargs": 7},
    {"model": "nobody"},
    {"max_tokens": -1},
    {"max_tokens": "many"},
    {"temperature": -1},
    {"prompt": "many words " * 2000, "messages": [{"role": "user", "content": "words " * 4000}]},
    {"prompt": {"a": 1}, "messages": 7},
)
EDGE_BAD_FIELDS: tuple[Body, ...] = (
    *BAD_FIELDS,
    {"vllm_xargs": {"cloud_mode": "never"}},
    {"vllm_xargs": {"cloud_mode": 1}},
    {"vllm_xargs": {"cloud_mod": "cloud"}},
    {"vllm_xargs": {"exit": "verify"}},
    {"vllm_xargs": {"cloud_mode": "cloud"}, "repetition_penalty": 1.3},
    {"vllm_xargs": {"cloud_mode": "collaborative"}, "logprobs": 1, "top_logprobs": 1},
)


def language(chance: random.Random, model: str, *, edge: bool = False) -> Ask:
    """A completion or a chat: answered, refused or given up."""
    if chance.random() < 0.03:
        whole = json.dumps({"model": model, "prompt": "words", "max_tokens": 4}).encode()
        body = chance.choice((whole[: chance.randrange(1, len(whole))], b"\xff\xfe", b"[" * 2000))
        return Ask("refused", "/v1/completions", body, "refused")
    chat = chance.random() < 0.4
    path = "/v1/chat/completions" if chat else "/v1/completions"
    most = chance.choice((1, 8, 24, 64, 96))
    wishes = edge_wishes(chance) if edge else exit_wishes(chance)
    body: Body = {"model": model, "max_tokens": most, "ignore_eos": True, "return_token_ids": True}
    text = words(chance, 120)
    body |= {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    if chance.random() < 0.15:
        bad = dict(chance.choice(EDGE_BAD_FIELDS if edge else BAD_FIELDS))
        bad.pop("prompt" if chat else "messages", None)
        if chat and "logprobs" in bad:
            bad["logprobs"] = True
        if "vllm_xargs" not in bad and wishes:
            bad["vllm_xargs"] = wishes
        return Ask("refused", path, body | bad, "refused")
    if wishes:
        body["vllm_xargs"] = wishes
    choices, tokens = 1, most
    alone = wishes.get("cloud_mode") == "standalone"
    if chance.random() < 0.5:
        body["temperature"] = 0
    else:
        choices = chance.choice((1, 1, 2, 3))
        body |= {"temperature": 0.8, "n": choices}
        body |= chance.choice(({}, {"top_p": 0.9}, {"top_p": 0.9, "top_k": 20}))
    if (not edge or alone) and chance.random() < 0.3:
        body |= {"logprobs": True, "top_logprobs": 2} if chat else {"logprobs": 2}
    exact = True
    if chance.random() < 0.15:
        body["stop"], exact = [" the", "\n"], False
    kind = "chat" if chat else "completion"
    if chance.random() < 0.5:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        kind += ", streamed"
    ends: Literal["answered", "left"] = "left" if chance.random() < 0.15 else "answered"
    after_s = after_events = None
    if ends == "left":
        kind = "given up"
        if "stream" in body and chance.random() < 0.5:
            after_events = chance.randint(1, 20)
        else:
            after_s = chance.choice((0.002, 0.02, 0.2, 1.0, 3.0))
    return Ask(
        kind, path, body, ends, choices, tokens if exact else None, choices * most,
        after_s, after_events,
    )  # fmt: skip


def each_length(model: str, most: int, wishes: Mapping[str, Any]) -> list[Ask]:
    """A request for each number of tokens that a step may have."""
    common: Body = {"model": model, "max_tokens": 1, "ignore_eos": True, "return_token_ids": True}
    common |= {"temperature": 0, "vllm_xargs": dict(wishes)}
    return [
        Ask("warm-up", "/v1/completions", {**common, "prompt": text}, tokens=1, most=1)
        for text in _lengths(most)
    ]


def _lengths(most: int) -> list[str]:
    return [" ".join(length * [WORDS[length % len(WORDS)]]) for length in range(1, most + 1)]


def lone_language(model: str, wishes: Mapping[str, Any], *, logprobs: bool = True) -> list[Ask]:
    """Greedy requests whose answers are compared: short, over several blocks, and a chat.

    A salt of their own keeps them from what others left in the prefix cache.
    """
    common: Body = {
        "model": model, "max_tokens": 24, "temperature": 0, "ignore_eos": True,
        "return_token_ids": True, "vllm_xargs": dict(wishes),
    }  # fmt: skip
    if logprobs:
        common["logprobs"] = 5
    chat = {**common, "messages": [{"role": "user", "content": "Why does light bend in glass?"}]}
    if logprobs:
        chat |= {"logprobs": True, "top_logprobs": 5}
    return [
        Ask("exact", path, body, tokens=24, most=24)
        for path, body in (
            ("/v1/completions", {**common, "prompt": "Once upon a time there was"}),
            ("/v1/completions", {**common, "prompt": f"{PREAMBLE} and then {PREAMBLE}"}),
            ("/v1/chat/completions", chat),
        )
    ]


# --- Classifiers ----------------------------------------------------------------------------------


BAD_DATA: tuple[Any, ...] = (
    {"exit": "no"}, {"exit": 3}, {"exit_bias": "much"}, {"exit_bias": True}, {"exit_tresh": 1},
    {"mux": "maybe"}, {"mux_group": ""}, {"mux_group": 3}, {"mux_group": "x" * 300},
    {"mux_grp": "a"}, {"input": []}, {"input": [7]}, {"input": None}, {"input": "words " * 4000},
)  # fmt: skip


def classification(chance: random.Random, model: str, layers: int) -> Ask:
    """Texts for `/classify`, or for `/pooling` with options."""
    texts = [
        " ".join(chance.choices(WORDS, k=chance.randint(1, 50)))
        for _ in range(chance.choice((1, 1, 2, 5, 8, 16)))
    ]
    data: Body = {"input": texts}
    if chance.random() < 0.15:
        wrong = chance.choice(BAD_DATA)
        body: Body | bytes = {"model": model, "data": {**data, **wrong}}
        if chance.random() < 0.2:
            body = chance.choice((b'{"model": ', b"\xff", b'{"data": 7}', b"[]"))
        return Ask("refused", "/pooling", body, "refused")
    must_layers = must_merged = None
    if chance.random() < 0.3:
        path, body, kind = "/classify", {"model": model, "input": texts}, "classify"
    else:
        path, kind = "/pooling", "classify with options"
        data |= chance.choice(({}, {}, {"exit": False}, {"exit_bias": chance.uniform(-2, 2)}))
        data |= chance.choice(({}, {}, {"mux": False}, {"mux_group": chance.choice("abc")}))
        must_layers = layers if data.get("exit") is False else None
        must_merged = 1 if data.get("mux") is False else None
        body = {"model": model, "data": data}
    left = chance.random() < 0.15
    return Ask(
        "given up" if left else kind, path, body, "left" if left else "answered",
        len(texts), most=len(texts), layers=must_layers, merged=must_merged,
        after_s=chance.choice((0.002, 0.02, 0.1, 0.3)) if left else None,
    )  # fmt: skip


def lone_classification(model: str, *, stock: bool) -> list[Ask]:
    """Texts one at a time, each shorter than a block, so that no prefix is found."""
    found = []
    for text in ("a fine film", "neither here nor there", " ".join(WORDS[:40]), "no"):
        body: Body = {"input": text}
        if not stock:
            body = {"data": {**body, "exit": False, "mux": False}}
        path = "/classify" if stock else "/pooling"
        found.append(Ask("exact", path, {"model": model, **body}, most=1))
    return found


def each_length_of_texts(model: str, most: int) -> list[Ask]:
    """As `each_length`."""
    wishes = {"exit": False, "mux": False}
    return [
        Ask("warm-up", "/pooling", {"model": model, "data": {"input": text, **wishes}}, most=1)
        for text in _lengths(most)
    ]
