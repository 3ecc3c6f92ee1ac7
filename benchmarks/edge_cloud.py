"""Edge and cloud (CE-CoLLM) against one server in the cloud, over a slow link.

    EFFPLUGIN_DATA=DIR python benchmarks/edge_cloud.py --quick --json result.json --plot result.png

Servers are `vllm serve` processes, those of the edge on the first core, those of the cloud on the
last. Between them lies a link of 40 ms and 20 Mbit/s (`slow_link.py`). Half of the prompts are
MT-Bench's, half TriviaQA's. Cases are `edge_cloud/<mode>/c<clients>`:

- `cloud`: clients speak through the link to stock vLLM with the whole model.
- `naive`: every token is the cloud's, and every hidden state goes up in fp32 for each of them.
- `standalone`, `collaborative`: clients speak to the edge.
- `collaborative-<threshold>`: with that confidence asked of all exits, for the frontier.
- `outage`: collaborative, the cloud's processes killed for ten seconds in the middle and started
  again; `outage-link`: only the link cut.

`--random` takes a Llama with random weights, whose steps take longer than the link, and gates that
let a pseudo-random share of the tokens leave: what splitting saves and costs, not what a model can
spare. `collaborative-0.5` keeps half of the tokens at each of its two exits, and so asks for a
quarter of them.

Metrics:

- `total_s`: until the last answer.
- `edge_s`, `cloud_s`: processor time of the engine; `cloud_server_s`: of the cloud's API server.
- `comm_s`: what a request waited for on average, less what the cloud took.
- `bytes_up`: over the link, headers included.
- `agreement`: share of tokens that are the whole model's after the same words.
- `asked`: share of tokens that the cloud gave; `fallbacks`: tokens that it was to give and did not.
- Of outages: `finished`, share of requests with all their tokens; `duplicates`, tokens beyond that;
  `recovery_s`, from the cloud's first sign of life to its first token.

Baselines are those of mode `cloud` in the same round; of `bytes_up`, those of `naive`.
"""

from __future__ import annotations

import asyncio
import fnmatch
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx
from checkpoints import build_smollm2
from harness import (
    CACHE,
    SEED,
    Metric,
    Row,
    argument_parser,
    as_table,
    describe_run,
    termination_unwinds,
    write_json,
)
from rich.console import Console
from servers import LOGS, Server, samples, total
from slow_link import BITS_PER_S, ROUND_TRIP_S, TIMEOUT_S, Relay, SlowLink
from tqdm.auto import tqdm

from vllm_effplugin.config import EfficiencyConfig
from vllm_effplugin.config.checkpoint import staged_directory
from vllm_effplugin.engine.settings import CLOUD_URL
from vllm_effplugin.preparation.base import load_tokenizer
from vllm_effplugin.preparation.tables import print_whole
from vllm_effplugin.techniques.early_exit.config import EarlyExitConfig
from vllm_effplugin.techniques.early_exit.questions import read_questions
from vllm_effplugin.techniques.edge_cloud.config import CloudConfig, EdgeConfig
from vllm_effplugin.techniques.edge_cloud.link import PATH
from vllm_effplugin.techniques.edge_cloud.split import model_name, write_part

CLIENTS = (8, 32)
THRESHOLDS = (0.3, 0.5, 0.7, 0.9)
REQUESTS = 64
LONGEST_PROMPT = 600
"""Characters."""

RANDOM: dict[str, Any] = {
    "hidden_size": 1536,
    "intermediate_size": 4096,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
"""Of a Llama with 480 million parameters, for SmolLM2's tokenizer."""
RANDOM_EXITS = (4, 8)
"""At a quarter and half of the layers, as in the paper."""

OUTAGE_S, BEFORE_S, AFTER_S = 10.0, 10.0, 10.0
RECOVERY_LIMIT_S = 120.0
HIGHER = ("agreement", "finished")


# --- Load -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        prompt, tokens: ids.
        seconds: until it was there.
        report: of the edge.
    """

    prompt: list[int]
    tokens: list[int]
    seconds: float
    report: dict[str, Any]


def body(prompt: str, new_tokens: int, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Of a request."""
    return {
        "model": "model", "prompt": prompt, "max_tokens": new_tokens, "temperature": 0,
        "ignore_eos": True, "return_token_ids": True, "vllm_xargs": dict(extra) or None,
    }  # fmt: skip


async def load(
    url: str, prompts: Sequence[str], new_tokens: int, clients: int, extra: Mapping[str, Any]
) -> tuple[float, list[Reply]]:
    """Have so many clients ask all prompts; seconds until the last answer, and the answers."""
    waiting, replies = list(reversed(prompts)), []
    limits = httpx.Limits(max_connections=None)

    async def client() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as speaks:
            while waiting:
                began = time.perf_counter()
                asked = body(waiting.pop(), new_tokens, extra)
                answer = await speaks.post("/v1/completions", json=asked)
                answer.raise_for_status()
                said = answer.json()
                [choice] = said["choices"]
                replies.append(
                    Reply(
                        choice["prompt_token_ids"],
                        choice["token_ids"],
                        time.perf_counter() - began,
                        (said.get("kv_transfer_params") or {}).get("effplugin", {}),
                    )
                )

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - began, replies


async def agreement(whole: Server, replies: Sequence[Reply]) -> float:
    """Share of the tokens that are the whole model's after the same words."""
    right = 0
    async with httpx.AsyncClient(base_url=whole.url, timeout=600) as client:
        for reply in replies:
            asked = {"model": "model", "prompt": reply.prompt + reply.tokens, "max_tokens": 1}
            answer = await client.post("/v1/completions", json={**asked, "prompt_logprobs": 0})
            answer.raise_for_status()
            ranks = answer.json()["choices"][0]["prompt_logprobs"][len(reply.prompt) :]
            right += sum(
                rank[str(token)]["rank"] == 1
                for rank, token in zip(ranks, reply.tokens, strict=True)
            )
    return right / sum(len(reply.tokens) for reply in replies)


def read_prompts() -> list[str]:
    """MT-Bench's first turns and TriviaQA's questions, in turn."""
    data = os.environ.get("EFFPLUGIN_DATA")
    if data is None:
        sys.exit(
            "set EFFPLUGIN_DATA to the folder with prompts/mt_bench.jsonl and triviaqa/dev.jsonl"
        )
    lines = (Path(data) / "prompts" / "mt_bench.jsonl").read_text(encoding="utf-8").splitlines()
    turns = [json.loads(line)["turns"][0] for line in lines]
    questions = [each.prompt for each in read_questions(Path(data) / "triviaqa" / "dev.jsonl")]
    half = REQUESTS // 2
    chosen = [
        [text for text in texts if len(text) <= LONGEST_PROMPT][:half]
        for texts in (turns, questions)
    ]
    assert [len(each) for each in chosen] == [half, half]
    found = [*chosen[0], *chosen[1]]
    random.Random(0).shuffle(found)
    return found


# --- Cases ----------------------------------------------------------------------------------------


Change = Callable[[], Awaitable[None]]


@dataclass
class Setup:
    """All servers, and the link between them.

    Attributes:
        whole: stock vLLM in the cloud.
        whole_link, cloud_link: to it, and to the upper layers.
    """

    whole: Server
    whole_link: SlowLink
    cloud: Server
    cloud_link: SlowLink
    edge: Server
    naive_edge: Server
    prompts: list[str]
    new_tokens: int

    async def measure(
        self, mode: str, clients: int, extra: Mapping[str, Any], *, agrees: bool
    ) -> dict[str, float]:
        """The metrics of a mode."""
        direct = mode == "cloud"
        server, link = (self.whole, self.whole_link) if direct else (self.cloud, self.cloud_link)
        edge = self.naive_edge if mode == "naive" else self.edge
        async with httpx.AsyncClient(base_url=server.url) as client:
            before = await samples(client)
            counted = link.up.bytes, server.seconds(), edge.seconds()
            seconds, replies = await load(
                link.url if direct else edge.url, self.prompts, self.new_tokens, clients, extra
            )
            await asyncio.sleep(0.5)  # what still goes up
            after = await samples(client)
        bytes_up, (cloud, api), (below, _) = counted
        now = server.seconds()
        found = {
            "total_s": seconds,
            "cloud_s": now[0] - cloud,
            "cloud_server_s": now[1] - api,
            "bytes_up": float(link.up.bytes - bytes_up),
        }
        if direct:
            name = "vllm:e2e_request_latency_seconds_sum"
            served = total(after, name) - total(before, name)
            waited = sum(reply.seconds for reply in replies) - served
        else:
            found["edge_s"] = edge.seconds()[0] - below
            waited = sum(each.report["waited_s"] - each.report["cloud_s"] for each in replies)
            origins = sum((Counter(each.report["tokens_by_origin"]) for each in replies), Counter())
            found["asked"] = origins["cloud"] / origins.total()
            found["fallbacks"] = float(origins.total() - origins["cloud"] - origins["edge"])
        found["comm_s"] = waited / len(replies)
        if agrees:
            found["agreement"] = await agreement(self.whole, replies)
        return found

    async def outage(self, lose: Change, come_back: Change) -> dict[str, float]:
        """32 clients, and no cloud for a while.

        Args:
            lose: has the cloud go.
            come_back: has it come back, and returns when it is there.
        """
        over = asyncio.Event()
        counts: list[int] = []
        async with httpx.AsyncClient(base_url=self.edge.url, timeout=600) as client:
            clients = [
                asyncio.ensure_future(self._keep_asking(over, counts, self.prompts[n % REQUESTS :]))
                for n in range(CLIENTS[-1])
            ]
            try:
                await asyncio.sleep(BEFORE_S)
                await lose()
                await asyncio.sleep(OUTAGE_S)
                before = await self._cloud_tokens(client)
                await come_back()
                began = time.perf_counter()
                async with asyncio.timeout(RECOVERY_LIMIT_S):
                    while await self._cloud_tokens(client) == before:
                        await asyncio.sleep(0.02)
                recovery = time.perf_counter() - began
                await asyncio.sleep(AFTER_S)
            finally:
                over.set()
                await asyncio.gather(*clients)
        return {
            "requests": float(len(counts)),
            "finished": sum(count >= self.new_tokens for count in counts) / len(counts),
            "duplicates": float(sum(max(0, count - self.new_tokens) for count in counts)),
            "recovery_s": recovery,
        }

    async def _keep_asking(
        self, over: asyncio.Event, counts: list[int], prompts: Sequence[str]
    ) -> None:
        async with httpx.AsyncClient(base_url=self.edge.url, timeout=600) as client:
            turn = 0
            while not over.is_set():
                prompt, turn = prompts[turn % len(prompts)], turn + 1
                count = 0
                asked = {**body(prompt, self.new_tokens, {}), "stream": True}
                with suppress(httpx.HTTPError):  # a request that breaks has not finished
                    async with client.stream("POST", "/v1/completions", json=asked) as answer:
                        async for line in answer.aiter_lines():
                            if line.startswith("data: {"):
                                for choice in json.loads(line[6:])["choices"]:
                                    count += len(choice["token_ids"] or ())
                counts.append(count)

    async def _cloud_tokens(self, client: httpx.AsyncClient) -> float:
        return total(await samples(client), "effplugin_edge_tokens_total", 'origin="cloud"')

    # --- Two ways of losing the cloud ------------------------------------------------------------

    async def kill_cloud(self) -> None:
        """Its processes end without a word."""
        await asyncio.to_thread(self.cloud.kill)

    async def restart_cloud(self) -> None:
        """A new server, in the old one's place."""
        self.cloud.start()
        await self.cloud.wait(every_s=0.02)

    async def cut_link(self) -> None:
        """Connections break, and none can be made."""
        self.cloud_link.cut()

    async def mend_link(self) -> None:
        """Connections can be made again."""
        self.cloud_link.mend()


@asynccontextmanager
async def everything(
    parts: Path, model: Path, transport: str, new_tokens: int, *, naive: bool
) -> AsyncIterator[Setup]:
    """All servers, started and connected; that of mode `naive` on request."""
    below = variant(parts / "edge", f"edge-{transport}", transport=transport)
    slow = {"transport": "fp32", "deadline_s": TIMEOUT_S, "mode": "cloud"}
    first, *_, last = sorted(os.sched_getaffinity(0))
    whole = Server("whole", model, last)
    named = {"VLLM_PLUGINS": "effplugin"}
    cloud = Server("cloud", parts / "cloud", last, named, ready=PATH)
    whole_link, cloud_link = SlowLink(whole.port), SlowLink(cloud.port)
    relay = Relay(cloud_link.url)
    edge = Server("edge", below, first, {CLOUD_URL: cloud_link.url})
    naive_below = variant(parts / "edge", "naive-edge", **slow)
    naive_edge = Server("naive-edge", naive_below, first, {CLOUD_URL: relay.url})
    async with AsyncExitStack() as stack:
        for link in (whole_link, cloud_link):
            await link.start()
            stack.push_async_callback(link.stop)
        serving = asyncio.ensure_future(relay.serve())
        stack.callback(serving.cancel)
        others = (cloud, naive_edge) if naive else (cloud,)
        for pair in ((whole, edge), others):  # one on each core
            for server in pair:
                server.start()
                stack.callback(server.kill, signal.SIGTERM)
            for server in pair:
                await server.wait()
        yield Setup(
            whole, whole_link, cloud, cloud_link, edge, naive_edge, read_prompts(), new_tokens
        )


def variant(edge: Path, name: str, **changes: Any) -> Path:
    """The same edge with other settings."""
    out = edge.with_name(name)
    if not out.exists():
        with staged_directory(out, overwrite=False) as staging:
            for file in edge.iterdir():
                if file.name != "config.json":
                    (staging / file.name).symlink_to(Path("..", edge.name, file.name))
            config = json.loads((edge / "config.json").read_text(encoding="utf-8"))
            config["efficiency"]["edge_cloud"] |= changes
            (staging / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return out


def prepared(model: Path, exits: str) -> Path:
    """Edge and cloud; made unless they are there."""
    out = CACHE / "benchmarks" / f"{model.name}-edge-cloud-{exits.replace(',', '-')}"
    if not (out / "cloud" / "config.json").exists():
        command = [sys.executable, "-m", "vllm_effplugin.cli.main", "prepare", "edge-cloud"]
        split = ("--partition", exits.split(",")[-1], "--exits", exits, "--deadline", "5")
        # `--overwrite` what an interrupted run left.
        subprocess.run([*command, str(model), str(out), *split, "--overwrite"], check=True)
    return out


def build_random_parts(model: Path, tokenizer: Path) -> Path:
    """Edge and cloud of a Llama with seeded random weights; made unless they are there.

    Args:
        tokenizer: a checkpoint that has it.
    """
    out = CACHE / "benchmarks" / f"{model.name}-edge-cloud"
    if not model.exists():
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(SEED)
        with staged_directory(model, overwrite=False) as staging:
            weights = LlamaForCausalLM._from_config(LlamaConfig(**RANDOM), dtype=torch.bfloat16)
            weights.save_pretrained(staging)
            load_tokenizer(tokenizer).save_pretrained(staging)
    if not (out / "cloud" / "config.json").exists():
        depth, layers = RANDOM_EXITS[-1], RANDOM["num_hidden_layers"]
        gates = [{"depth": exit, "gate": "rate", "threshold": 0.7} for exit in RANDOM_EXITS]
        name = model_name(model)
        edge = EdgeConfig(role="edge", model=name, layers=layers, deadline_s=5.0)
        cloud = CloudConfig(role="cloud", model=name, partition=depth)
        exits = EarlyExitConfig.model_validate({"exits": gates})
        for part, first, end, efficiency in (
            ("edge", 0, depth, EfficiencyConfig(early_exit=exits, edge_cloud=edge)),
            ("cloud", depth, layers, EfficiencyConfig(edge_cloud=cloud)),
        ):
            write_part(
                model, out / part, first, end, efficiency,
                work=out.parent, provenance={}, overwrite=True,
            )  # fmt: skip
    return out


@dataclass
class Results:
    """Values by case and metric, one per round."""

    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, case: str, found: Mapping[str, float]) -> None:
        """A round of a case."""
        for name, value in found.items():
            self.values.setdefault(case, {}).setdefault(name, []).append(value)

    def rows(self) -> list[Row]:
        """As the other benchmarks have them."""
        found = []
        for case, metrics in self.values.items():
            for name, values in metrics.items():
                better: Literal["higher", "lower"] = "higher" if name in HIGHER else "lower"
                metric = Metric(name, lambda engine: 0.0, better)
                found.append(Row(case, metric, self._baseline(case, name, len(values)), values))
        return found

    def _baseline(self, case: str, name: str, rounds: int) -> list[float] | None:
        _, mode, clients = case.split("/")
        against = "naive" if name == "bytes_up" else "cloud"
        if mode in (against, "naive") or name not in ("total_s", "cloud_s", "bytes_up"):
            return None
        known = self.values.get(f"edge_cloud/{against}/{clients}", {}).get(name)
        if known is None:
            return None
        return (known * rounds)[:rounds] if len(known) == 1 else known[:rounds]


def names() -> list[str]:
    """All cases, in their order."""
    modes = ["cloud", "standalone", "collaborative", *(f"collaborative-{t:g}" for t in THRESHOLDS)]
    found = [f"edge_cloud/{mode}/c{clients}" for mode in modes for clients in CLIENTS]
    found += [f"edge_cloud/naive/c{clients}" for clients in CLIENTS]
    return [*found, *(f"edge_cloud/{kind}/c{CLIENTS[-1]}" for kind in ("outage-link", "outage"))]


async def run(
    servers: AbstractAsyncContextManager[Setup],
    chosen: Sequence[str],
    rounds: int,
    results: Results,
    *,
    agrees: bool,
) -> None:
    """All rounds of all cases; those of the frontier have one.

    Args:
        agrees: measure the agreement too.
    """
    once = [case for case in chosen if "/naive/" in case or "/collaborative-" in case]
    outages = [case for case in chosen if "/outage" in case]
    repeated = [case for case in chosen if case not in (*once, *outages)]
    steps = [(case, turn) for turn in range(rounds) for case in order(repeated, turn)]
    steps += [(case, 0) for case in (*once, *outages)]
    async with servers as setup:
        # The first requests find cold caches.
        first = setup.prompts[:16], 32, 8
        await load(setup.whole_link.url, *first, {})
        for mode in ("cloud", "collaborative"):
            await load(setup.edge.url, *first, {"cloud_mode": mode})
        with tqdm(total=len(steps), unit="run") as bar:
            for case, turn in steps:
                bar.set_description(case)
                _, mode, clients = case.split("/")
                if mode == "outage":
                    found = await setup.outage(setup.kill_cloud, setup.restart_cloud)
                elif mode == "outage-link":
                    found = await setup.outage(setup.cut_link, setup.mend_link)
                else:
                    name, _, threshold = mode.partition("-")
                    extra: dict[str, Any] = {}
                    if name in ("standalone", "collaborative"):
                        extra["cloud_mode"] = name
                    if threshold:
                        extra["exit_threshold"] = float(threshold)
                    found = await setup.measure(
                        name, int(clients[1:]), extra, agrees=agrees and turn == 0
                    )
                results.add(case, found)
                bar.update()


def order(cases: list[str], turn: int) -> list[str]:
    """There in one round, and back in the next."""
    return cases if turn % 2 == 0 else cases[::-1]


def draw(path: Path, medians: Mapping[tuple[str, str], float]) -> None:
    """Left: the cloud's work over agreement, or over what it is asked. Right: what takes how long.

    Args:
        medians: values by case and metric.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    over = "agreement" if any(name == "agreement" for _, name in medians) else "asked"
    for clients in CLIENTS:
        stock = medians.get((f"edge_cloud/cloud/c{clients}", "cloud_s"))
        swept = [case for case, name in medians if name == over]
        points = sorted(
            (medians[case, over], medians[case, "cloud_s"] / stock)
            for case in swept
            if stock and "/collaborative" in case and case.endswith(f"/c{clients}")
        )
        if points:
            left.plot(*zip(*points, strict=True), "o-", label=f"{clients} clients")
    labels = {
        "agreement": "agreement with the whole model",
        "asked": "share of the tokens that the cloud gives",
    }
    left.set(xlabel=labels[over], ylabel="the cloud's engine time / stock")
    left.grid(alpha=0.3)
    left.legend()
    cases = [case for case, name in medians if name == "total_s"]
    for place, case in enumerate(cases):
        right.barh(place, medians[case, "total_s"], color="tab:blue")
    right.set_yticks(range(len(cases)), [case.partition("/")[2] for case in cases], fontsize=7)
    right.set(xlabel=f"seconds until the last of {REQUESTS} answers", xscale="log")
    right.invert_yaxis()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--model", type=Path, default=CACHE / "smollm2", help="SmolLM2 checkpoint directory"
    )
    parser.add_argument("--random", action="store_true", help="a larger model: see above")
    parser.add_argument("--exits", default="10,15", help="of SmolLM2; the last is the partition")
    parser.add_argument("--new-tokens", type=int, default=32, help="of each answer")
    parser.add_argument(
        "--transport", choices=("fp32", "fp16", "int8"), default="fp16", help="of the edge"
    )
    arguments = parser.parse_args()
    globs = arguments.cases or ["*"]
    chosen = [case for case in names() if any(fnmatch.fnmatchcase(case, glob) for glob in globs)]
    if arguments.list or not chosen:
        print(*(chosen or names()), sep="\n")
        return 0 if chosen else 2
    LOGS.mkdir(parents=True, exist_ok=True)
    build_smollm2(arguments.model)
    model = arguments.model
    if arguments.random:
        model = CACHE / "benchmarks" / "random-llama-480m"
        parts = build_random_parts(model, arguments.model)
    else:
        parts = prepared(model, arguments.exits)
    meta = describe_run(arguments)
    meta["transport"], meta["model"] = arguments.transport, parts.name
    meta["link"] = {"round_trip_s": ROUND_TRIP_S, "bits_per_s": BITS_PER_S}
    meta["requests"], meta["new_tokens"] = REQUESTS, arguments.new_tokens
    results = Results()
    rounds = arguments.rounds or (3 if arguments.quick else 7)
    with termination_unwinds():
        try:
            naive = any("/naive/" in case for case in chosen)
            servers = everything(
                parts, model, arguments.transport, arguments.new_tokens, naive=naive
            )
            agrees = not arguments.random
            asyncio.run(run(servers, chosen, rounds, results, agrees=agrees))
        finally:
            rows = results.rows()
            print_whole(Console(), as_table(rows))
            if arguments.json is not None:
                write_json(arguments.json, meta, rows)
            if arguments.plot is not None and rows:
                medians = {(row.case, row.metric.name): row.as_json()["candidate"] for row in rows}
                draw(arguments.plot, medians)
    return 0


if __name__ == "__main__":
    sys.exit(main())
