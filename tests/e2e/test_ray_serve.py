"""Replicas on a real Ray: what becomes of requests when one of them, or its engine, is killed."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
import pytest
import ray
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray.serve.config import RequestRouterConfig

from tests.e2e.server import free_port, serving
from tests.e2e.test_edge_cloud import ask, origins, split
from tests.e2e.test_metrics import make_exits
from tests.engine.test_edge import edge, rates
from tests.unit.test_edge_link import until as wait_until
from vllm_effplugin.deployment.ray_serve import SessionRouter, build
from vllm_effplugin.engine.settings import CLOUD_URL
from vllm_effplugin.techniques.edge_cloud.link import SESSION_HEADER

TOKENS = 40
SMALL = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "4"]
SMALL += ["--served-model-name", "demo"]
PROMPTS = ("Water boils at", "Once upon a time", "The capital of", "Two and two")
RESTART_S = 180


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Ray on this machine, apart from any other, and where its Ray Serve answers."""
    # Not pytest's folder: Ray puts sockets there, whose paths may have 107 bytes.
    folder, port = tempfile.mkdtemp(prefix="ray-"), free_port()
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    settings |= {"VLLM_PLUGINS": "effplugin"}
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": settings},
        _temp_dir=folder,
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def replicas() -> dict[int, psutil.Process]:
    """Their processes, by pid."""
    mine = psutil.Process().children(recursive=True)
    return {each.pid: each for each in mine if "ServeReplica" in " ".join(_words(each))}


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def engine_of(replica: psutil.Process) -> psutil.Process:
    """The process of its engine."""
    [found] = [each for each in replica.children() if "EngineCore" in " ".join(_words(each))]
    return found


def running() -> int:
    """Replicas that Ray Serve sends requests to."""
    deployment = serve.status().applications["default"].deployments["Replica"]
    return sum(count for state, count in deployment.replica_states.items() if state == "RUNNING")


async def until(condition: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        await asyncio.sleep(0.5)


@dataclass
class Answer:
    """What a client saw of one request.

    Attributes:
        asked: when.
        text: None where it is not whole.
        error: what said so.
    """

    prompt: str
    asked: float
    text: str | None = None
    error: str | None = None


async def answer(client: httpx.AsyncClient, prompt: str, stream: bool) -> Answer:
    """Ask, and look at the answer as an OpenAI client does."""
    seen = Answer(prompt, time.monotonic())
    body = {"model": "demo", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
    body |= {"ignore_eos": True, "stream": stream}
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                said = (await response.aread()).decode()
                seen.error = f"{response.status_code} {said}" if said else None
            elif stream:
                await _read_stream(response, seen)
            else:
                whole = json.loads(await response.aread())
                seen.text = whole["choices"][0]["text"]
    except httpx.TransportError as error:
        seen.error = repr(error)
    return seen


async def _read_stream(response: httpx.Response, seen: Answer) -> None:
    text = ""
    async for line in response.aiter_lines():
        if line == "data: [DONE]":
            seen.text = text if seen.error is None else None
        elif line:
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                seen.error = str(event["error"])
            else:
                text += event["choices"][0]["text"]


@dataclass
class Load:
    """Of clients that ask on and on.

    Attributes:
        answers: all that they saw.
        pause: seconds between a client's requests.
    """

    answers: list[Answer] = field(default_factory=list)
    pause: float = 0.1


@asynccontextmanager
async def load(client: httpx.AsyncClient) -> AsyncIterator[Load]:
    """Six clients."""
    made = Load()
    ended = asyncio.Event()

    async def ask_on(number: int) -> None:
        turn = number
        while not ended.is_set():
            turn += 1
            prompt = PROMPTS[turn % len(PROMPTS)]
            made.answers.append(await answer(client, prompt, stream=turn % 3 > 0))
            await asyncio.sleep(made.pause)

    clients = [asyncio.create_task(ask_on(number)) for number in range(6)]
    yield made
    ended.set()
    await asyncio.gather(*clients)


async def kill_under_load(address: str) -> None:
    async with httpx.AsyncClient(base_url=address, timeout=120) as client:
        expected = {}
        for prompt in PROMPTS:
            first = await answer(client, prompt, stream=False)
            assert first.text, first
            expected[prompt] = first.text
        before = replicas()
        assert len(before) == 2
        first, second = before.values()
        engine = engine_of(first)
        async with load(client) as asked:
            await asyncio.sleep(3)
            # A replica.
            first.kill()
            killed = time.monotonic()
            await until(lambda: not engine.is_running(), 20)
            await until(lambda: running() == 1, 30)
            alone = time.monotonic()
            asked.pause = 3  # a replica that starts wants some of the core too
            await until(lambda: running() == 2, RESTART_S)
            asked.pause = 0.1
            await asyncio.sleep(3)
            [third] = [each for pid, each in replicas().items() if pid not in before]
            # An engine: its replica answers that it is dead, and ends.
            engine_of(second).kill()
            dead = time.monotonic()
            await until(lambda: not second.is_running(), 20)
            await until(lambda: running() == 1, 30)
            replaced = time.monotonic()
            await until(lambda: len({*replicas()} - {*before, third.pid}) == 1, 60)
    answers = asked.answers
    print(sum(each.text is not None for each in answers), "complete; else:")
    for each in answers:
        if each.text is None:
            print(each)
        else:
            assert each.text == expected[each.prompt]
            assert each.error is None
    assert [each for each in answers if each.text is None and each.error is None] == []
    failed = [each.asked for each in answers if each.error is not None]
    assert failed
    assert not [asked for asked in failed if asked < killed - 3]
    assert not [asked for asked in failed if alone < asked < dead - 3 or asked > replaced]
    assert len(answers) > 3 * len(failed)


def test_a_session_stays_with_its_replica(address):
    # Local, so that Ray sends it whole: replicas that import this module import vLLM.
    @serve.ingress()
    class Name:
        def __serve_build_asgi_app__(self) -> FastAPI:
            app, name = FastAPI(), serve.get_replica_context().replica_id.unique_id
            app.add_api_route("/", lambda: name)
            return app

    router = RequestRouterConfig(request_router_class=SessionRouter)
    serve.run(serve.deployment(Name, num_replicas=3, request_router_config=router).bind())
    with httpx.Client(base_url=address) as client:

        def ask(session: str | None) -> str:
            headers = {} if session is None else {SESSION_HEADER: session}
            return client.get("/", headers=headers).text

        found = {str(session): ask(str(session)) for session in range(12)}
        assert len(set(found.values())) > 1
        for session, home in found.items():
            assert {ask(session) for _ in range(3)} == {home}
        assert len({ask(None) for _ in range(30)}) == 3
    serve.delete("default")


@pytest.mark.works("early_exit", "replicas on Ray Serve")
def test_a_request_ends_or_says_that_it_does_not(address, tmp_path):
    model = make_exits(tmp_path)
    serve.run(build({"model": str(model), "replicas": 2, "vllm_args": SMALL}))
    asyncio.run(kill_under_load(address))
    check_metrics()


def check_metrics() -> None:
    """Ray's agent shows what the technique and vLLM count, by replica."""
    for name in ("effplugin_exit_decode_tokens_total", "vllm_generation_tokens_total"):
        # Those of replicas that ended are gone; the others' are up to ten seconds old.
        wait_until(lambda name=name: exported(f"ray_{name}"), 30)
        found = exported(f"ray_{name}")
        assert all(labels["ReplicaId"] for labels, _ in found)
        assert {labels["model_name"] for labels, _ in found} == {"demo"}
        assert sum(value for _, value in found) > 0


def homes() -> set[str]:
    """Replicas of a cloud that sessions were opened at."""
    opened = exported("ray_effplugin_cloud_sessions_total")
    return {found["ReplicaId"] for found, value in opened if found["event"] == "opened" and value}


def exported(name: str) -> list[tuple[dict[str, str], float]]:
    """Labels and values of a metric at Ray's agent."""
    [node] = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    families = text_string_to_metric_families(httpx.get(url).text)
    samples = [sample for family in families for sample in family.samples]
    return [(sample.labels, sample.value) for sample in samples if sample.name == name]


@pytest.mark.works("cloud", "replicas on Ray Serve")
@pytest.mark.skipif("EFFPLUGIN_SLOW" not in os.environ, reason="two clouds: EFFPLUGIN_SLOW=1")
def test_an_edge_goes_to_the_other_cloud(address, tmp_path, monkeypatch):
    """Its sessions are at one replica; when that is killed, its requests finish."""
    _, cloud = split(tmp_path)
    serve.run(build({"model": str(cloud), "replicas": 2, "vllm_args": SMALL}))
    monkeypatch.setenv(CLOUD_URL, address)
    below = edge(tmp_path, tmp_path / "edge", rates(0.6, 0.5))
    always = {"vllm_xargs": {"cloud_mode": "cloud"}}
    with serving(below, tmp_path, "--dtype", "float32") as (client, _):
        wait_until(lambda: origins(ask(client, **always)) == {"cloud": 16}, 90)
        for _ in range(4):
            assert origins(ask(client, **always)) == {"cloud": 16}
        wait_until(lambda: homes(), 60)
        [home] = homes()
        actor = ray.get_actor(f"SERVE_REPLICA::default#Replica#{home}", namespace="serve")
        with ThreadPoolExecutor() as pool:
            answers = [pool.submit(ask, client, **always) for _ in range(8)]
            time.sleep(0.2)
            ray.kill(actor)
            found = [origins(each.result()) for each in answers]
        assert [sum(each.values()) for each in found] == [16] * 8
        wait_until(lambda: origins(ask(client, **always)) == {"cloud": 16}, 60)
    serve.delete("default")
