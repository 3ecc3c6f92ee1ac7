"""Live servers, asked anything: what we added gives no HTTP 500, and harms nobody afterwards.

Bodies come from the servers' own `/openapi.json`, narrowed to our fields; what vLLM does with
others is not ours to test.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.e2e.server import serving, shown
from tests.e2e.test_edge_cloud import split
from tests.e2e.test_metrics import total
from tests.engine.test_joint_exit import JOINT, tensors
from tests.engine.test_multiplex import trained
from tests.tiny import add_tokenizer, make_checkpoint, make_classifier
from tests.unit.test_edge_link import until
from tests.unit.test_wire_fuzz import resealed
from vllm_effplugin.config import EfficiencyConfig, parse_efficiency
from vllm_effplugin.config.checkpoint import write_checkpoint
from vllm_effplugin.engine.io_processor import ClassifyData
from vllm_effplugin.techniques.early_exit.request import ExitRequest
from vllm_effplugin.techniques.edge_cloud.wire import (
    HEADER_BYTES,
    Encoding,
    Frame,
    Kind,
    append_frame,
    json_frame,
    read_frames,
)

FP32 = ("--dtype", "float32")
EXAMPLES = 60
HIDDEN = 128
SESSION = bytes(range(16))
slow = pytest.mark.skipif("EFFPLUGIN_SLOW" not in os.environ, reason="EFFPLUGIN_SLOW")
"""Every further server takes up to a minute."""
MODES = list(schemathesis.GenerationMode)


def bodies(client: httpx.Client, path: str, schema: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    """Bodies of a route that have one field of ours, right and wrong.

    Args:
        schema: of the body, with nothing but that field.
    """
    whole = client.get("/openapi.json").json()
    route = whole["paths"][path]["post"]
    route["requestBody"]["content"] = {"application/json": {"schema": dict(schema)}}
    whole["paths"] = {path: {"post": route}}
    operation = schemathesis.openapi.from_dict(whole)[path]["POST"]
    cases = st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in MODES))
    return cases.map(lambda case: case.body)


def only(field: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {field: dict(schema)},
        "required": [field],
        "additionalProperties": False,
    }


def fuzz(cases: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    """The same examples each time, as few as a minute allows."""
    found = settings(
        max_examples=EXAMPLES, derandomize=True, deadline=None, database=None,
        phases=(Phase.generate,), suppress_health_check=list(HealthCheck),
    )(given(cases)(check))  # fmt: skip
    found()


def understood_or_refused(answer: httpx.Response) -> None:
    assert answer.status_code in (200, 400, 422), answer.text
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]


@contextmanager
def unharmed(ask: Callable[[], Any]) -> Iterator[None]:
    """What was answered before is answered afterwards."""
    before = ask()
    yield
    assert ask() == before


def test_language_models(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    add_tokenizer(base)
    exits = [{"depth": 6, "gate": "softmax", "threshold": 0.02}]
    write_checkpoint(
        base, tmp_path / "exits", parse_efficiency({"early_exit": {"exits": exits}}), provenance={}
    )
    good = {"model": "demo", "max_tokens": 3, "temperature": 0, "ignore_eos": True}
    prompts: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": "Water boils at"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
    }
    template = ("--chat-template", "{{ messages[0].content }}")
    with serving(tmp_path / "exits", tmp_path, *FP32, *template) as (client, _):

        def ask(path: str, **fields: Any) -> httpx.Response:
            return client.post(path, json={**good, **prompts[path], **fields})

        def answer(path: str) -> Any:
            [choice] = ask(path, vllm_xargs={"exit": False}, logprobs=True).json()["choices"]
            return choice.get("text") or choice["message"]["content"], choice["logprobs"]

        xargs = {
            "type": "object",
            "properties": ExitRequest.model_json_schema()["properties"],
            "minProperties": 1,
        }

        def checked(path: str) -> Callable[[Any], None]:
            def check(body: Any) -> None:
                if isinstance(body, dict) and "vllm_xargs" in body:
                    understood_or_refused(ask(path, vllm_xargs=body["vllm_xargs"]))

            return check

        for path in prompts:
            with unharmed(partial(answer, path)):
                fuzz(bodies(client, path, only("vllm_xargs", xargs)), checked(path))


@slow
def test_classifiers(tmp_path: Path) -> None:
    base = make_classifier(tmp_path / "base")
    add_tokenizer(base)
    block = {"multiplex": {"depth": 9, "sizes": [2]}, "joint_exit": JOINT}
    efficiency = EfficiencyConfig.model_validate(block)
    assert efficiency.joint_exit is not None
    extra = trained((2,)) | tensors(efficiency.joint_exit)
    write_checkpoint(base, tmp_path / "mux", efficiency, tensors=extra, provenance={})
    with serving(tmp_path / "mux", tmp_path, *FP32) as (client, _):

        def check(body: Any) -> None:
            if isinstance(body, dict) and "data" in body:
                data = body["data"]
                asked = {"model": "demo", "data": data, "truncate_prompt_tokens": 64}
                understood_or_refused(client.post("/pooling", json=asked))

        def answers() -> Any:
            data = {"input": ["a good one", "bad"], "exit": False, "mux": False}
            return client.post("/pooling", json={"model": "demo", "data": data}).json()["data"]

        with unharmed(answers):
            fuzz(bodies(client, "/pooling", only("data", ClassifyData.model_json_schema())), check)


CLOSE = Frame(Kind.CLOSE, SESSION).pack()


def message() -> bytes:
    """A session of three positions, and a question."""
    states = np.random.default_rng(0).normal(size=(3, HIDDEN)).astype(np.float32)
    frames = [
        json_frame(Kind.OPEN, SESSION, {"model": "tiny"}),
        append_frame(SESSION, 0, states, Encoding.FP32),
        json_frame(Kind.ASK, SESSION, {"temperature": 0.0}, 2),
    ]
    return b"".join(frame.pack() for frame in frames)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Noise, a message with a part changed, or with a header changed and its checksum right."""
    whole = message() + CLOSE
    start = draw(st.integers(0, len(whole)))
    end = draw(st.integers(start, min(len(whole), start + 80)))
    cut_out = whole[:start] + draw(st.binary(max_size=80)) + whole[end:]
    head = bytearray(Frame(Kind.ASK, SESSION, payload=draw(st.binary(max_size=40))).pack())
    head[draw(st.integers(4, HEADER_BYTES - 5))] = draw(st.integers(0, 255))
    return draw(st.sampled_from((cut_out, resealed(bytes(head)), draw(st.binary(max_size=200)))))


@slow
def test_clouds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, cloud = split(tmp_path)
    monkeypatch.setenv("VLLM_PLUGINS", "effplugin")
    with serving(cloud, tmp_path, *FP32) as (client, _):

        def tell(body: bytes) -> httpx.Response:
            return client.post("/v1/edge_cloud/exchange", content=body)

        def check(body: bytes) -> None:
            answer = tell(body)
            assert answer.status_code in (200, 400), answer.text
            if answer.status_code == 400:
                assert answer.json()
            for frame in read_frames(answer.content, HIDDEN, 1 << 20) if answer.is_success else ():
                assert frame.kind is not Kind.ERROR or frame.json()["code"] != "engine"

        def token() -> int:
            replies = read_frames(tell(message()).content, HIDDEN, 1 << 20)
            tell(CLOSE)
            [found] = [reply.token()[0] for reply in replies if reply.kind is Kind.TOKEN]
            return found

        with unharmed(token):
            fuzz(damaged(), check)
        tell(CLOSE)
        until(lambda: total(shown(client), "cloud_sessions_held") == 0, 10)
