"""Edge and cloud as two `vllm serve` processes, as the page starts them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.dashboard import check
from tests.e2e.server import free_port, serving, shown
from tests.engine.test_edge import edge, rates
from tests.engine.test_edge_cloud import PARTITION
from tests.tiny import LAYERS, add_tokenizer, make_checkpoint
from tests.unit.test_edge_link import until
from vllm_effplugin.config import EfficiencyConfig
from vllm_effplugin.engine.settings import CLOUD_KEY, CLOUD_URL
from vllm_effplugin.techniques.edge_cloud.config import CloudConfig
from vllm_effplugin.techniques.edge_cloud.split import write_layers, write_part

FP32 = ("--dtype", "float32")
WORDS = "Water boils at a hundred degrees, and freezes at "


def ask(client: httpx.Client, **fields: object) -> httpx.Response:
    body = {"model": "demo", "prompt": WORDS, "max_tokens": 16, "temperature": 0, **fields}
    body["return_token_ids"] = True
    return client.post("/v1/completions", json={**body, "ignore_eos": True})


def origins(answer: httpx.Response) -> dict[str, int]:
    found = answer.json()["kv_transfer_params"]["effplugin"]["tokens_by_origin"]
    return {name: count for name, count in found.items() if count}


def split(folder: Path) -> tuple[Path, Path]:
    """A model and its cloud; beside them, in `lower`, the layers that an edge needs."""
    whole = make_checkpoint(folder / "whole")
    add_tokenizer(whole)
    (folder / "lower").mkdir()
    write_layers(whole, folder / "lower", 0, PARTITION)
    config = CloudConfig(role="cloud", model="tiny", partition=PARTITION)
    cloud, efficiency = folder / "cloud", EfficiencyConfig(edge_cloud=config)
    write_part(whole, cloud, PARTITION, LAYERS, efficiency, work=folder, provenance={})
    return whole, cloud


@pytest.mark.works("edge", "cloud")
@pytest.mark.works("edge", "streaming")
def test_two_servers_give_the_whole_models_text(tmp_path, monkeypatch):
    whole, cloud = split(tmp_path)
    for name in ("of-cloud", "of-edge", "again"):
        (tmp_path / name).mkdir()
    port, key = free_port(), {"Authorization": "Bearer secret"}
    guarded = (*FP32, "--api-key", "secret")
    monkeypatch.setenv(CLOUD_URL, f"http://127.0.0.1:{port}")
    monkeypatch.setenv(CLOUD_KEY, "secret")
    below = edge(tmp_path, tmp_path / "edge", rates(0.6, 0.5))
    always = {"cloud_mode": "cloud"}
    with serving(below, tmp_path / "of-edge", *FP32) as (lower, _):
        monkeypatch.setenv("VLLM_PLUGINS", "effplugin")
        # Nobody is there yet.
        assert origins(ask(lower, vllm_xargs=always)) == {"link": 16}
        with serving(cloud, tmp_path / "of-cloud", *guarded, port=port, killed=True) as (upper, _):
            assert upper.get("/v1/edge_cloud").status_code == 401
            described = upper.get("/v1/edge_cloud", headers=key).json()
            assert (described["model"], described["partition"]) == ("tiny", PARTITION)
            told = {"model": "demo", "prompt": "Hello"}
            text = upper.post("/v1/completions", headers=key, json=told)
            assert text.status_code == 400
            assert "ask its edge" in text.text
            check_answers(lower, upper, whole)
        assert origins(ask(lower, vllm_xargs=always)).keys() == {"link"}
        with serving(cloud, tmp_path / "again", *guarded, port=port):
            until(lambda: origins(ask(lower, vllm_xargs=always)) == {"cloud": 16}, 90)


def check_answers(lower: httpx.Client, upper: httpx.Client, whole: Path) -> None:
    """Tokens, refusals and metrics while both are there."""
    until(lambda: sample(shown(lower), "edge_up") == 1, 90)
    model = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
    ids = torch.tensor([[ord(letter) for letter in WORDS]])
    expected = model.generate(ids, max_new_tokens=16, min_new_tokens=16, do_sample=False)
    before = shown(lower)
    answer, mixed = ask(lower, vllm_xargs={"cloud_mode": "cloud"}), ask(lower)
    assert origins(answer) == {"cloud": 16}
    assert answer.json()["choices"][0]["token_ids"] == expected[0, len(WORDS) :].tolist()
    assert set(origins(mixed)) == {"edge", "cloud"}
    plain = ask(lower, stream=True, vllm_xargs={"cloud_mode": "cloud"})
    events = [line[6:] for line in plain.text.splitlines() if line.startswith("data: {")]
    streamed = [choice for event in events for choice in json.loads(event)["choices"]]
    together = [token for choice in streamed for token in choice["token_ids"] or ()]
    assert together == answer.json()["choices"][0]["token_ids"]
    refused = ask(lower, repetition_penalty=1.3)
    assert refused.status_code == 400
    assert "repetition_penalty" in refused.text
    for fields in ({"logprobs": 0}, {"logprob_token_ids": [3]}):
        assert ask(lower, **fields).status_code == 400, fields
    assert ask(lower, vllm_xargs={"cloud_mode": "never"}).status_code == 400
    alone = ask(lower, repetition_penalty=1.3, vllm_xargs={"cloud_mode": "standalone"})
    assert origins(alone) == {"edge": 16}

    # Both servers count what the responses say, and the same of each other.
    below, above = shown(lower), shown(upper)
    check(below, "exit", "edge")
    check(above, "cloud")
    by_origin = sum((Counter(origins(each)) for each in (answer, mixed, alone)), Counter())
    by_origin["cloud"] += len(together)
    for origin, count in by_origin.items():
        told = [sample(each, "edge_tokens_total", origin=origin) for each in (before, below)]
        assert told[1] - told[0] == count
    assert by_origin["cloud"] == sample(above, "cloud_tokens_total")
    for there, here in (("up", "in"), ("down", "out")):
        sent = sample(below, "edge_bytes_total", direction=there)
        assert sent == sample(above, "cloud_bytes_total", direction=here) > 0
    uploaded = sample(below, "edge_positions_total", event="uploaded")
    assert uploaded == sample(above, "cloud_positions_total", event="received") > 0
    waited = sample(below, "edge_waited_seconds_total")
    computed = sample(below, "edge_computed_seconds_total")
    assert waited > computed > 0
    assert computed <= sample(above, "cloud_engine_seconds_total") + 1e-3
    assert sample(below, "edge_waiting_questions") == 0


def sample(found: dict[str, float], name: str, **labels: str) -> float:
    """One of ours at `/metrics`."""
    labels |= {"engine": "0", "model_name": "demo"}
    names = ",".join(f'{label}="{value}"' for label, value in sorted(labels.items()))
    return found[f"effplugin_{name}{{{names}}}"]
