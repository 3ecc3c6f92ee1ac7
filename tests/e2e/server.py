"""`vllm serve` as a user starts it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port


@contextmanager
def serving(
    checkpoint: Path, folder: Path, *options: str, port: int | None = None, killed: bool = False
) -> Iterator[tuple[httpx.Client, Path]]:
    """`vllm serve` under the name `demo`: a client of it, and its log.

    Args:
        killed: its processes end without a word, not as a user ends them.
    """
    port = port or free_port()
    vllm = Path(sys.executable).with_name("vllm")
    log = folder / "server.log"
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    command = [str(vllm), "serve", str(checkpoint), "--port", str(port), "--host", "127.0.0.1"]
    command += ["--enforce-eager", "--max-model-len", "512", "--served-model-name", "demo"]
    with log.open("w") as file:
        server = subprocess.Popen(
            [*command, *options], stdout=file, stderr=file, env=environment, start_new_session=True
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            _wait_until_healthy(client, server, log)
            yield client, log
    finally:
        if killed:
            os.killpg(server.pid, signal.SIGKILL)
        else:
            server.terminate()
        server.wait(timeout=60)


def shown(client: httpx.Client) -> dict[str, float]:
    """Every sample at `/metrics`, by name and labels."""
    lines = client.get("/metrics").text.splitlines()
    samples = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in samples}


def _wait_until_healthy(client: httpx.Client, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise AssertionError(f"not healthy in time:\n{log.read_text()[-3000:]}")
