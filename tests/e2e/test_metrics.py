"""`/metrics` of real servers, however many processes are behind it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.e2e.server import serving, shown
from tests.tiny import LAYERS, add_tokenizer, make_checkpoint
from tests.unit.test_edge_link import until
from vllm_effplugin.config import parse_efficiency
from vllm_effplugin.config.checkpoint import write_checkpoint

DEPTH = 6
TOKENS = 5
ASKED = 8
SMALL = ("--dtype", "float32", "--max-num-seqs", "4", "--max-num-batched-tokens", "512")
PROCESSES = {
    "ranks": ("--tensor-parallel-size", "2"),
    "servers": ("--api-server-count", "2", "--data-parallel-size", "2"),
}


def make_exits(folder: Path) -> Path:
    """A checkpoint of which half of the layers run, whoever asks."""
    base = make_checkpoint(folder / "base")
    add_tokenizer(base)
    exits = [{"depth": DEPTH, "gate": "softmax", "threshold": 0.0}]
    efficiency = parse_efficiency(
        {"early_exit": {"exits": exits, "shadow": 0.2, "compaction": "always"}}
    )
    write_checkpoint(base, folder / "exits", efficiency, provenance={})
    return folder / "exits"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_exits(tmp_path_factory.mktemp("exits"))


@pytest.mark.works("early_exit", "data parallelism, several API servers", "tensor parallelism")
@pytest.mark.parametrize("processes", PROCESSES)
def test_each_token_is_counted_once(checkpoint, tmp_path, monkeypatch, processes):
    """By one of the tensor-parallel ranks, and whichever API server is asked."""
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    with serving(checkpoint, tmp_path, *SMALL, *PROCESSES[processes]) as (client, _):
        url = str(client.base_url)
        body = {"model": "demo", "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        with _many_connections(url) as many:
            for i, each in enumerate(many):
                prompt = "Water boils at a hundred degrees"[: 8 + i]
                engine = {"X-data-parallel-rank": str(i % 2)} if processes == "servers" else {}
                asked = {**body, "prompt": prompt}
                answer = each.post("/v1/completions", json=asked, headers=engine)
                assert answer.status_code == 200, answer.text
            # A prompt's last position gives the first token, and cannot leave.
            decoded = ASKED * (TOKENS - 1)
            until(lambda: total(shown(client), "exit_decode_tokens_total") == decoded, 10)
            for each in many:  # whoever answers
                found = shown(each)
                assert total(found, "exit_decode_tokens_total") == decoded
                assert total(found, "exit_tokens_total") == decoded
                compared = total(found, "exit_shadow_tokens_total")
                assert 0 <= total(found, "exit_shadow_agreed_tokens_total") <= compared < decoded
                left = total(found, "exit_compacted_tokens_total")
                assert left == decoded - compared > 0
                full = LAYERS * (decoded + sum(8 + i for i in range(ASKED)))
                assert total(found, "exit_full_layer_tokens_total") == full
                assert total(found, "layers") == LAYERS
                assert sum(name.startswith("effplugin_info") for name in found) == 1
    engines = {name.split('engine="')[1][0] for name in found if "exit_decode" in name}
    assert engines == ({"0", "1"} if processes == "servers" else {"0"})


@contextmanager
def _many_connections(url: str) -> Iterator[list[httpx.Client]]:
    """The kernel spreads them over the API servers."""
    clients = [httpx.Client(base_url=url, timeout=120) for _ in range(ASKED)]
    yield clients
    for client in clients:
        client.close()


def total(found: dict[str, float], name: str) -> float:
    """All samples of one of ours."""
    return sum(value for key, value in found.items() if key.startswith(f"effplugin_{name}{{"))
