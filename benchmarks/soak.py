"""A soak: mixed traffic for a chosen time, with what has to hold checked all along.

    python benchmarks/soak.py --quick                            # 10 minutes of load
    python benchmarks/soak.py --minutes 60 --json F --plot F.png

Stages follow one another: SmolLM2 with exits that are verified on demand, a classifier whose texts
leave early and merge, and an edge with its cloud, which stands still for a while. Clients ask,
stream, go away and ask nonsense. Once a minute they pause: the server has to be empty, its memory
is measured, and lone requests that want the full model have to get stock vLLM's answers bit for
bit. Heads and gates are not trained. Exit code 1 where something did not hold. What is checked, and
why: docs/soak.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import psutil
from checkpoints import (
    LAYERS,
    MADE,
    build_exits,
    build_merging,
    build_parts,
    build_smollm2,
    build_untrained,
)
from harness import CACHE, SEED, describe_run, termination_unwinds
from servers import Server, samples, total
from soak_checks import (
    Ledger,
    count_problems,
    difference,
    essence,
    grown,
    growth,
    memory_problems,
    rest_problems,
    words_of,
)
from soak_traffic import (
    Ask,
    Reply,
    classification,
    each_length,
    each_length_of_texts,
    language,
    lone_classification,
    lone_language,
    send,
)
from tqdm.auto import tqdm

from vllm_effplugin.engine.settings import CLOUD_URL, VERIFY
from vllm_effplugin.techniques.edge_cloud.link import PATH

STAGES = {"exits": 0.4, "classifier": 0.25, "edge": 0.35}
"""Name -> share of the time."""
PERIOD_S, OUTAGE_S = 50.0, 8.0
REST_LIMIT_S = 45.0
"""Longer than a session of the cloud is remembered."""
BLOCK, BLOCKS = 32, 28
"""Of the language models' caches: so few that requests are preempted, and sessions evicted."""
LAST_SESSION = 4
"""Blocks that the last lone request may have."""
FORGET_S = 15.0

STEP = 64
"""Tokens of a step at most, so that prompts run in chunks."""

SMALL = ("--enforce-eager", "--max-num-seqs", "8", "--max-num-batched-tokens", str(STEP))
LANGUAGE = (
    *SMALL, "--max-model-len", "512", "--enable-prefix-caching", "--block-size", str(BLOCK),
    "--num-gpu-blocks-override", str(BLOCKS),
)  # fmt: skip
CLASSIFIER = (*SMALL, "--num-gpu-blocks-override", "32")


@dataclass
class Stage:
    """What is soaked.

    Attributes:
        servers: the first one is asked.
        traffic: draws a request.
        warm_up: requests that come before.
        lone: requests whose answers are compared.
        stock: the model whose answers they have to get; without, they get what they got at first.
        asked: what that is asked for them, where it is something else.
        expected: their answers' essences.
        clients: that ask at the same time.
        still: a server that stands still for a while.
    """

    name: str
    servers: list[Server]
    traffic: Callable[[random.Random], Ask]
    warm_up: list[Ask]
    lone: list[Ask]
    stock: Server | None = None
    asked: list[Ask] | None = None
    expected: list[Any] = field(default_factory=list)
    clients: int = 6
    still: Server | None = None


@dataclass
class Seen:
    """What is drawn and reported of a stage: values over seconds, and memory at rest."""

    seconds: list[float] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)
    usage: list[float] = field(default_factory=list)
    memory: dict[str, list[float]] = field(default_factory=dict)
    at_rest: dict[str, list[float]] = field(default_factory=dict)
    exact: int = 0
    under_load: list[bool] = field(default_factory=list)
    preemptions: float = 0.0


def memory(server: Server) -> float:
    """MiB that a server's processes have for themselves."""
    assert server.process is not None
    found = 0
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(server.process.pid)
        for process in (parent, *parent.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                found += process.memory_full_info().uss
    return found / 2**20


def salted(ask: Ask) -> Ask:
    """So that nothing is found in the prefix cache, where a request can say so."""
    assert isinstance(ask.body, dict)
    if not ask.path.startswith("/v1"):
        return ask
    return replace(ask, body={**ask.body, "cache_salt": str(time.monotonic_ns())})


class Soak:
    """A stage under load."""

    def __init__(self, stage: Stage, seconds: float, bar: tqdm) -> None:
        self.stage, self.seconds, self._bar = stage, seconds, bar
        self.ledger, self.seen = Ledger(), Seen()
        self._going = asyncio.Event()
        self._began = self._end = 0.0
        self._flying = 0

    @property
    def _over(self) -> bool:
        return time.monotonic() >= self._end

    async def run(self) -> None:
        """All of it; `ledger` and `seen` say what came of it."""
        limits = httpx.Limits(max_connections=None)
        url = self.stage.servers[0].url
        async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as self._client:
            before = await self._samples()
            if not self.stage.expected:  # no stock model says the same: it has to repeat itself
                self.stage.expected = [essence(await self._lone(ask)) for ask in self.stage.lone]
            self._began = time.monotonic()
            self._end = self._began + self.seconds
            for ask in self.stage.warm_up:
                await self._lone(ask)
            self._going.set()
            clients = [self._ask(random.Random(SEED + i)) for i in range(self.stage.clients)]
            async with asyncio.TaskGroup() as tasks:
                watching = tasks.create_task(self._watch())
                if self.stage.still is not None:
                    tasks.create_task(self._stand_still(self.stage.still))
                for client in clients:
                    tasks.create_task(client)
                await self._pauses()
                watching.cancel()
            await self._count(before)

    async def _ask(self, chance: random.Random) -> None:
        while not self._over and self._alive():
            await self._going.wait()
            if chance.random() < 0.04:
                place = chance.randrange(len(self.stage.lone))
                reply = await self._lone(self.stage.lone[place])
                same = words_of(essence(reply)) == words_of(self.stage.expected[place])
                self.seen.under_load.append(same)
            else:
                await self._send(self.stage.traffic(chance))

    async def _send(self, ask: Ask) -> Reply:
        self.ledger.sent += 1
        self._flying += 1
        reply = await send(self._client, ask)
        self._flying -= 1
        self.ledger.enter(ask, reply)
        return reply

    async def _lone(self, ask: Ask) -> Reply:
        return await self._send(salted(ask))

    def _alive(self) -> bool:
        for server in self.stage.servers:
            if server.process is None or server.process.poll() is not None:
                said = f"{server.name} has died: see {server.log}"
                if said not in self.ledger.breaks:
                    self.ledger.breaks.append(said)
                return False
        return True

    # --- Pauses ----------------------------------------------------------------------------------

    async def _pauses(self) -> None:
        pauses = max(2, round(self.seconds / PERIOD_S))
        for pause in range(1, pauses + 1):
            at = self._began + self.seconds * pause / pauses
            while time.monotonic() < at and self._alive():
                await asyncio.sleep(0.2)
            self._going.clear()
            while self._flying:
                await asyncio.sleep(0.05)
            if self._alive():
                await self._rest()
            self._going.set()

    async def _rest(self) -> None:
        for ask, expected in zip(self.stage.lone, self.stage.expected, strict=True):
            found = difference(expected, essence(await self._lone(ask)))
            self.seen.exact += 1
            if found:
                self.ledger.breaks.append(f"a lone answer differs: {found}")
        deadline = time.monotonic() + REST_LIMIT_S
        while wrong := await self._rest_problems():
            if time.monotonic() > deadline:
                self.ledger.breaks += [f"at rest, {each}" for each in wrong]
                break
            await asyncio.sleep(0.5)
        for server in self.stage.servers:
            self.seen.at_rest.setdefault(server.name, []).append(memory(server))

    async def _rest_problems(self) -> list[str]:
        found = []
        for server, shown in zip(self.stage.servers, await self._samples(), strict=True):
            share = LAST_SESSION / BLOCKS if server.name == "cloud" else 0.0
            wrong = rest_problems(shown, session_share=share)
            found += [f"{server.name}: {each}" for each in wrong]
        return found

    async def _count(self, before: Sequence[Mapping[str, float]]) -> None:
        if not self._alive():
            return
        if self.ledger.open:
            self.ledger.breaks.append(f"{self.ledger.open} requests were never answered")
        for server, old, new in zip(self.stage.servers, before, await self._samples(), strict=True):
            change = grown(old, new)
            if server.name != "cloud":
                wrong = count_problems(change, self.ledger)
                self.ledger.breaks += [f"{server.name}: {each}" for each in wrong]
                self.seen.preemptions = total(change, "vllm:num_preemptions_total")
            wrong = memory_problems(self.seen.at_rest.get(server.name, []))
            self.ledger.breaks += [f"{server.name}: {each}" for each in wrong]

    # --- Watching --------------------------------------------------------------------------------

    async def _samples(self) -> list[dict[str, float]]:
        found = []
        for server in self.stage.servers:
            async with httpx.AsyncClient(base_url=server.url, timeout=10) as client:
                found.append(await samples(client))
        return found

    async def _watch(self) -> None:
        async with httpx.AsyncClient(base_url=self.stage.servers[0].url, timeout=10) as client:
            while True:
                await asyncio.sleep(2)
                with suppress(httpx.HTTPError):
                    shown = await samples(client)
                    self.seen.usage.append(total(shown, "vllm:kv_cache_usage_perc"))
                    self.seen.seconds.append(time.monotonic() - self._began)
                    self.seen.ended.append(self.ledger.kinds.total())
                    for server in self.stage.servers:
                        self.seen.memory.setdefault(server.name, []).append(memory(server))
                self._bar.update(2)
                self._bar.set_postfix(
                    requests=self.ledger.kinds.total(), breaks=len(self.ledger.breaks)
                )

    async def _stand_still(self, server: Server) -> None:
        assert server.process is not None
        await asyncio.sleep(min(self.seconds / 3, 1.3 * PERIOD_S))
        os.killpg(server.process.pid, signal.SIGSTOP)
        await asyncio.sleep(OUTAGE_S)
        os.killpg(server.process.pid, signal.SIGCONT)


# --- Stages ---------------------------------------------------------------------------------------


GIVES_BACK = {
    "MALLOC_MMAP_THRESHOLD_": str(2**17),
    "MALLOC_TRIM_THRESHOLD_": str(2**20),
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0",
}
"""What grows, stock or not, and looks like a leak. glibc raises its thresholds with the blocks that
are freed, up to 32 and 64 MiB, and then keeps free blocks of that size or not, by chance. oneDNN
keeps 1,024 primitives, a third of a MiB each: for every number of rows that a shape of weights
met. vLLM keeps 32 for each shape beside that."""


def server(name: str, model: Path, core: int, *options: str, **more: Any) -> Server:
    """One that computes in fp32, and gives back what it has freed."""
    options = ("--dtype", "float32", *options)
    environment = {**GIVES_BACK, **more.pop("environment", {})}
    return Server(
        name, model, core, options=options, environment=environment, **{"served": name, **more}
    )


def build(name: str, smollm2: Path) -> Stage:
    """A stage."""
    first, *_, last = sorted(os.sched_getaffinity(0))
    if name == "exits":
        verify = ("--speculative-config", json.dumps(VERIFY))
        return Stage(
            name,
            [server(name, build_exits(smollm2), last, *LANGUAGE, *verify)],
            lambda chance: language(chance, name),
            each_length(name, STEP, {"exit": False}),
            lone_language(name, {"exit": False}),
            server("stock", smollm2, first, *LANGUAGE, served=name),
        )
    if name == "classifier":
        return Stage(
            name,
            [server(name, build_merging(smollm2), last, *CLASSIFIER)],
            lambda chance: classification(chance, name, LAYERS),
            each_length_of_texts(name, STEP),
            lone_classification(name, stock=False),
            server("stock", build_untrained(smollm2), first, *CLASSIFIER, served=name),
            lone_classification(name, stock=True),
        )
    edge, cloud = build_parts(smollm2, idle_s=FORGET_S / 3, forget_s=FORGET_S)
    routes = {"VLLM_PLUGINS": "effplugin"}
    upper = server("cloud", cloud, last, *LANGUAGE, environment=routes, ready=PATH)
    lower = server(name, edge, first, *LANGUAGE, environment={CLOUD_URL: upper.url})
    lone = lone_language(name, {"cloud_mode": "standalone"}, logprobs=False)
    lone += lone_language(name, {"cloud_mode": "cloud"}, logprobs=False)
    draw = lambda chance: language(chance, name, edge=True)  # noqa: E731
    warm_up = each_length(name, STEP, {"cloud_mode": "cloud"})
    return Stage(name, [lower, upper], draw, warm_up, lone, still=upper)


async def stock_answers(stock: Server, asked: Sequence[Ask]) -> list[Any]:
    """The essences of what a starting stock model says to lone requests."""
    await stock.wait()
    async with httpx.AsyncClient(base_url=stock.url, timeout=None) as client:
        replies = [await send(client, salted(ask)) for ask in asked]
    if wrong := [reply.text for reply in replies if reply.status != 200]:
        sys.exit(f"the stock model does not answer: {wrong[0][:300]}")
    return [essence(reply) for reply in replies]


async def soak(names: Sequence[str], seconds: float, model: Path) -> dict[str, Soak]:
    """All stages."""
    found: dict[str, Soak] = {}
    whole = sum(STAGES[name] for name in names)
    with tqdm(total=round(seconds), unit="s") as bar:
        for name in names:
            stage = build(name, model)
            bar.set_description(f"{name}: starting")
            servers = [*stage.servers, *([stage.stock] if stage.stock else [])]
            try:
                for each in servers:
                    each.start()
                if stage.stock is not None:
                    asked = stage.asked or stage.lone
                    stage.expected = await stock_answers(stage.stock, asked)
                    stage.stock.kill(signal.SIGTERM)
                for each in stage.servers:
                    await each.wait()
                bar.set_description(name)
                found[name] = Soak(stage, seconds * STAGES[name] / whole, bar)
                await found[name].run()
            finally:
                for each in servers:
                    each.kill(signal.SIGTERM)
    return found


# --- Report ---------------------------------------------------------------------------------------


def report(stages: Mapping[str, Soak]) -> dict[str, Any]:
    """Of all stages, as JSON has it."""
    return {
        name: {
            "seconds": stage.seconds,
            "requests": dict(sorted(stage.ledger.kinds.items())),
            "breaks": stage.ledger.breaks,
            "lone_answers_compared": stage.seen.exact,
            "same_under_load": [sum(stage.seen.under_load), len(stage.seen.under_load)],
            "preemptions": stage.seen.preemptions,
            "growth_mib": {
                server: round(growth(values), 1) for server, values in stage.seen.at_rest.items()
            },
            "at_rest_mib": stage.seen.at_rest,
            "over_time": {
                "seconds": stage.seen.seconds,
                "requests": stage.seen.ended,
                "kv_cache_usage": stage.seen.usage,
                "memory_mib": stage.seen.memory,
            },
        }
        for name, stage in stages.items()
    }


def show(found: Mapping[str, Any]) -> None:
    """On the terminal."""
    for name, stage in found.items():
        counts = ", ".join(f"{count} {kind}" for kind, count in stage["requests"].items())
        print(f"{name}: {sum(stage['requests'].values())} requests ({counts})")
        same, of = stage["same_under_load"]
        print(
            f"  {len(stage['breaks'])} breaks; {stage['lone_answers_compared']} lone answers "
            f"compared; under load {same} of {of} the same; {stage['preemptions']:g} preemptions; "
            f"growth in MiB {stage['growth_mib']}"
        )
        for each in stage["breaks"]:
            print(f"  - {each}")


def draw(found: Mapping[str, Any], out: Path) -> None:
    """Memory, requests per second and use of the KV cache over time, per stage."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(found), 7), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(3, len(found), squeeze=False, sharex="col")
    for (memories, rate, usage), (name, stage) in zip(grid.T, found.items(), strict=True):
        seen = stage["over_time"]
        seconds, ended = seen["seconds"], seen["requests"]
        for server, values in seen["memory_mib"].items():
            memories.plot(seconds[: len(values)], values, label=server)
        most = max(max(values, default=0.0) for values in seen["memory_mib"].values())
        memories.set(title=name, ylim=(0, 1.1 * most))
        memories.legend(fontsize=8)
        wide = 5
        rate.plot(
            seconds[wide:],
            [
                (ended[i] - ended[i - wide]) / (seconds[i] - seconds[i - wide])
                for i in range(wide, len(seconds))
            ],
        )
        usage.plot(seconds, seen["kv_cache_usage"])
        usage.set(xlabel="s", ylim=(0, 1))
        for axes in (memories, rate, usage):
            axes.grid(alpha=0.3)
    for axes, label in zip(grid[:, 0], ("MiB", "requests/s", "KV cache in use"), strict=True):
        axes.set_ylabel(label)
    figure.savefig(out, dpi=100)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60, help="of load (default 60)")
    parser.add_argument("--quick", action="store_true", help="10 minutes")
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=list(STAGES), help="default: all"
    )
    parser.add_argument(
        "--model", type=Path, default=CACHE / "smollm2", help="SmolLM2 checkpoint directory"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it there")
    arguments = parser.parse_args()
    build_smollm2(arguments.model)
    MADE.mkdir(parents=True, exist_ok=True)
    meta = describe_run(arguments)
    seconds = 60 * (10 if arguments.quick else arguments.minutes)
    with termination_unwinds():
        found = report(asyncio.run(soak(arguments.stages, seconds, arguments.model)))
    show(found)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"meta": meta, "stages": found}, indent=2))
    if arguments.plot is not None:
        draw(found, arguments.plot)
    return 1 if any(stage["breaks"] for stage in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
