"""The Grafana dashboard, drawn from live servers: a check of its every query, and a picture.

    python benchmarks/dashboard.py --plot result.png

Prometheus (`apt-get install prometheus`) watches four servers under load: SmolLM2 with exits, a
classifier with exits that merges texts, and an edge with its cloud, which stands still for a while.
Their weights are SmolLM2's, with heads and gates that are not trained. Then each query of
`deploy/grafana/dashboards/effplugin.json` is put to Prometheus and drawn, since no package registry
carries Grafana. Exit code 1 where a query finds nothing. Not a measurement.

    python benchmarks/dashboard.py --prometheus http://localhost:9090 --minutes 30 --plot result.png

draws it from a Prometheus of your own.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import matplotlib.pyplot as plt
import yaml
from checkpoints import MADE, build_exits, build_merging, build_parts, build_smollm2
from harness import CACHE, termination_unwinds
from matplotlib.axes import Axes
from matplotlib.dates import DateFormatter
from matplotlib.ticker import MaxNLocator
from servers import Server
from slow_link import free_port
from tqdm.auto import tqdm

from vllm_effplugin.engine.settings import CLOUD_URL
from vllm_effplugin.techniques.edge_cloud.link import PATH

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
LOAD_S, OUTAGE_S = 100, 15
SCRAPE_S = 1
WINDOW = f"{10 * SCRAPE_S}s"
"""What Grafana would put for `$__rate_interval`, in the load's short time."""
COLUMNS = 4

PROMPTS = (
    "The capital of France is", "Once upon a time there was", "Water boils at", "A short story:",
    "def fibonacci(n):", "The opposite of hot is", "To make bread, first", "2 + 2 =",
)  # fmt: skip


# --- Queries --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """One line of a panel: its name, and seconds since the epoch with values."""

    name: str
    times: list[float]
    values: list[float]


def ask(client: httpx.Client, target: dict[str, Any], begin: float, end: float) -> list[Series]:
    """A query's answer, as Grafana would ask for it."""
    window = WINDOW if end - begin < 600 else f"{int((end - begin) / 60)}s"
    query = target["expr"].replace("$__rate_interval", window).replace("$model", ".*")
    step = max(SCRAPE_S, (end - begin) / 200)
    asked = {"query": query, "start": begin, "end": end, "step": step}
    answer = client.get("/api/v1/query_range", params=asked)
    answer.raise_for_status()
    found = []
    for result in answer.json()["data"]["result"]:
        labels = result["metric"]
        name = re.sub(r"{{(\w+)}}", lambda m: labels.get(m[1], ""), target["legendFormat"])  # noqa: B023
        times, values = zip(*result["values"], strict=True)
        found.append(Series(name, list(times), [float(value) for value in values]))
    return found


def draw(prometheus: str, begin: float, end: float, out: Path) -> list[str]:
    """Draw all panels.

    Returns:
        titles of panels with queries that found nothing.
    """
    board = json.loads((DEPLOY / "grafana" / "dashboards" / "effplugin.json").read_text())
    rows: list[tuple[str, list[dict[str, Any]]]] = []
    for panel in board["panels"]:
        if panel["type"] == "row":
            rows.append((panel["title"], []))
        else:
            rows[-1][1].append(panel)
    lines = sum(math.ceil(len(panels) / COLUMNS) for _, panels in rows)
    figure, grid = plt.subplots(lines, COLUMNS, figsize=(4.4 * COLUMNS, 2.7 * lines), squeeze=False)
    empty, line = [], 0
    with httpx.Client(base_url=prometheus, timeout=60) as client:
        for title, panels in rows:
            for i, axes in enumerate(grid[line : line + math.ceil(len(panels) / COLUMNS)].flat):
                axes.set_axis_off()
                if i < len(panels):
                    panel = panels[i]
                    found = [ask(client, target, begin, end) for target in panel["targets"]]
                    _panel(axes, f"{title}: {panel['title']}", panel, [*itertools.chain(*found)])
                    if not all(found):
                        empty.append(f"{title}: {panel['title']}")
            line += math.ceil(len(panels) / COLUMNS)
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=75)
    return empty


def _panel(axes: Axes, title: str, panel: dict[str, Any], found: list[Series]) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    if panel["type"] == "stat":
        names = "\n\n".join(series.name for series in found)
        axes.text(0, 0.95, names, va="top", fontsize=9, transform=axes.transAxes)
        return
    axes.set_axis_on()
    for series in found:
        moments = [datetime.fromtimestamp(moment) for moment in series.times]
        axes.plot(moments, series.values, label=series.name)  # type: ignore[arg-type]
    unit = panel["fieldConfig"]["defaults"]["unit"]
    axes.set_ylim(0, 1.02 if unit == "percentunit" else None)
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_formatter(DateFormatter("%H:%M:%S"))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.tick_params(labelsize=8)
    if axes.lines:
        axes.legend(fontsize=7, loc="best")
    else:
        axes.text(0.5, 0.5, "no data", ha="center", transform=axes.transAxes)


# --- What is watched ------------------------------------------------------------------------------


@asynccontextmanager
async def watched(servers: Sequence[Server]) -> AsyncIterator[str]:
    """A Prometheus that scrapes them, by its URL."""
    binary = shutil.which("prometheus")
    if binary is None:
        sys.exit(
            "prometheus is not on PATH: `apt-get install prometheus`, or give --prometheus URL"
        )
    config = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text(encoding="utf-8"))
    config["global"]["scrape_interval"] = f"{SCRAPE_S}s"
    [job] = config["scrape_configs"]
    job["static_configs"] = [{"targets": [f"127.0.0.1:{server.port}" for server in servers]}]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "prometheus.yaml")
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        address = f"127.0.0.1:{free_port()}"
        command = [binary, f"--config.file={file}", f"--storage.tsdb.path={folder}/data"]
        with (MADE / "prometheus.log").open("wb") as log:
            process = subprocess.Popen(
                [*command, f"--web.listen-address={address}"], stdout=log, stderr=log
            )
        try:
            async with httpx.AsyncClient(base_url=f"http://{address}") as client:
                for _ in range(100):
                    with suppress(httpx.TransportError):
                        if (await client.get("/-/ready")).status_code == 200:
                            break
                    await asyncio.sleep(0.1)
                else:
                    sys.exit(f"prometheus did not start: see {MADE}/prometheus.log")
            yield f"http://{address}"
        finally:
            process.terminate()
            process.wait()


async def load(servers: dict[str, Server]) -> None:
    """All of them asked for a while; in the middle, the cloud does not answer."""
    end = time.monotonic() + LOAD_S

    async def client(name: str, path: str, body: Callable[[int], dict[str, Any]]) -> None:
        async with httpx.AsyncClient(base_url=servers[name].url, timeout=120) as speaks:
            for i in itertools.count():
                if time.monotonic() > end:
                    return
                asked = {"model": name, **body(i)}
                (await speaks.post(path, json=asked)).raise_for_status()

    def completion(i: int) -> dict[str, Any]:
        return {"prompt": PROMPTS[i % len(PROMPTS)], "max_tokens": 24, "ignore_eos": True}

    def classification(i: int) -> dict[str, Any]:
        texts = [f"{prompt} {i}" + n % 5 * " and" for n, prompt in enumerate(6 * PROMPTS)]
        return {"data": {"input": texts, "exit": i % 3 > 0}}

    async def outage() -> None:
        cloud = servers["cloud"].process
        assert cloud is not None
        await asyncio.sleep(LOAD_S / 3)
        os.killpg(cloud.pid, signal.SIGSTOP)
        await asyncio.sleep(OUTAGE_S)
        os.killpg(cloud.pid, signal.SIGCONT)

    async def progress() -> None:
        for _ in tqdm(range(LOAD_S), desc="load", unit="s"):
            await asyncio.sleep(1)

    jobs: list[Awaitable[None]] = [outage(), progress()]
    for name in ("exits", "edge"):
        jobs += [client(name, "/v1/completions", completion) for _ in range(3)]
    jobs += [client("merging", "/pooling", classification) for _ in range(2)]
    await asyncio.gather(*jobs)


async def demonstrate(out: Path) -> list[str]:
    """Start all, ask all, draw all; what `draw` returns."""
    smollm2 = CACHE / "smollm2"
    build_smollm2(smollm2)
    MADE.mkdir(parents=True, exist_ok=True)
    edge, cloud = build_parts(smollm2)
    first, *_, last = sorted(os.sched_getaffinity(0))
    plugins = {"VLLM_PLUGINS": "effplugin"}
    upper = Server("cloud", cloud, last, plugins, ready=PATH, served="cloud")
    servers = [
        upper,
        Server("edge", edge, first, {CLOUD_URL: upper.url}, served="edge"),
        Server("exits", build_exits(smollm2), first, served="exits"),
        Server("merging", build_merging(smollm2), last, served="merging"),
    ]
    try:
        for server in servers:
            server.start()
        for server in tqdm(servers, desc="servers", unit="server"):
            await server.wait()
        async with watched(servers) as prometheus:
            begin = time.time()
            await load({server.name: server for server in servers})
            return draw(prometheus, begin, time.time(), out)
    finally:
        for server in servers:
            server.kill(signal.SIGTERM)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plot", type=Path, required=True, metavar="FILE")
    parser.add_argument("--prometheus", metavar="URL", help="draw from this one, start nothing")
    parser.add_argument("--minutes", type=float, default=30, help="with --prometheus (default 30)")
    arguments = parser.parse_args()
    if arguments.prometheus is not None:
        now = time.time()
        draw(arguments.prometheus, now - 60 * arguments.minutes, now, arguments.plot)
        return 0
    with termination_unwinds():
        empty = asyncio.run(demonstrate(arguments.plot))
    for title in empty:
        print(f"no data: {title}")
    return 1 if empty else 0


if __name__ == "__main__":
    sys.exit(main())
