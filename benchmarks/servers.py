"""`vllm serve` processes of benchmarks, and what they show at `/metrics`."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
from harness import CACHE, DTYPE
from slow_link import free_port

LOGS = CACHE / "benchmarks"
START_LIMIT_S = 600.0


@dataclass
class Server:
    """`vllm serve` on one core.

    Attributes:
        name: of its log.
        served: what clients call the model.
        environment, options: besides what all of them have.
        ready: path that answers when it is.
    """

    name: str
    model: Path
    core: int
    environment: Mapping[str, str] = field(default_factory=dict)
    ready: str = "/health"
    served: str = "model"
    options: Sequence[str] = ()
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        """What it says."""
        return LOGS / f"server-{self.name}.log"

    @property
    def url(self) -> str:
        """Without the link."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Begin to start; `wait` waits."""
        command = [
            str(Path(sys.executable).with_name("vllm")), "serve", str(self.model),
            "--served-model-name", self.served, "--host", "127.0.0.1", "--port", str(self.port),
            "--dtype", DTYPE, "--max-model-len", "1024", "--max-num-seqs", "32",
            "--no-enable-prefix-caching",  # every mode sends the same prompts
            "--disable-uvicorn-access-log",
            # vLLM's CPU backend puts the worker into a process of its own unless it is told this
            # and `VLLM_ENABLE_V1_MULTIPROCESSING=0`. The two would wait for each other by spinning,
            # which counts as processor time.
            "--distributed-executor-backend", "uni",
            *self.options,
        ]  # fmt: skip
        environment = {
            **os.environ,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_USE_AOT_COMPILE": "0",  # as the harness does, and for its reason
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            **self.environment,
        }
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
                preexec_fn=lambda: os.sched_setaffinity(0, {self.core}),
            )

    async def wait(self, every_s: float = 0.5) -> None:
        """Until it answers."""
        deadline = time.monotonic() + START_LIMIT_S
        async with httpx.AsyncClient(base_url=self.url) as client:
            while True:
                assert self.process is not None
                if self.process.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"{self.name} did not start: see {self.log}")
                with suppress(httpx.TransportError):
                    if (await client.get(self.ready)).status_code == 200:
                        return
                await asyncio.sleep(every_s)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """End all its processes."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            try:
                self.process.wait(timeout=20)
            except subprocess.TimeoutExpired:  # one that is still starting hears no SIGTERM
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
            self.process = None

    def seconds(self) -> tuple[float, float]:
        """Processor time of its engine, and of its API server."""
        assert self.process is not None
        server = psutil.Process(self.process.pid)
        engines = [each.cpu_times() for each in server.children(recursive=True)]
        own = server.cpu_times()
        return sum(each.user + each.system for each in engines), own.user + own.system


async def samples(client: httpx.AsyncClient) -> dict[str, float]:
    """What `/metrics` shows, by name and labels."""
    lines = (await client.get("/metrics")).text.splitlines()
    found = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
    return {name: float(value) for name, value in found}


def total(shown: Mapping[str, float], name: str, *labels: str) -> float:
    """The sum of a metric's samples that have certain labels."""
    return sum(
        value
        for sample, value in shown.items()
        if sample.partition("{")[0] == name and all(label in sample for label in labels)
    )
