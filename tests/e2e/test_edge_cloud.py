"""Edge and cloud as two `vllm serve` processes, as the page starts them."""

from __future__ import annotations

from collections import Counter

import httpx
import torch
from transformers import AutoModelForCausalLM

from tests.e2e.server import serving, shown
from tests.engine.test_edge import edge, rates
from tests.engine.test_edge_cloud import PARTITION
from tests.tiny import LAYERS, add_tokenizer, make_checkpoint
from vllm_effplugin.config import EfficiencyConfig
from vllm_effplugin.config.checkpoint import write_checkpoint
from vllm_effplugin.engine.settings import CLOUD_KEY, CLOUD_URL
from vllm_effplugin.techniques.edge_cloud.config import CloudConfig
from vllm_effplugin.techniques.edge_cloud.split import write_layers

WORDS = "Water boils at a hundred degrees, and freezes at "


def ask(client: httpx.Client, **fields: object) -> httpx.Response:
    body = {"model": "demo", "prompt": WORDS, "max_tokens": 16, "temperature": 0, **fields}
    body["return_token_ids"] = True
    return client.post("/v1/completions", json={**body, "ignore_eos": True})


def origins(answer: httpx.Response) -> dict[str, int]:
    found = answer.json()["kv_transfer_params"]["effplugin"]["tokens_by_origin"]
    return {name: count for name, count in found.items() if count}


def test_two_servers_give_the_whole_models_text(tmp_path, monkeypatch):
    whole = make_checkpoint(tmp_path / "whole")
    add_tokenizer(whole)
    for name, first, end in (("lower", 0, PARTITION), ("upper", PARTITION, LAYERS)):
        (tmp_path / name).mkdir()
        write_layers(whole, tmp_path / name, first, end)
    config = CloudConfig(role="cloud", model="tiny", partition=PARTITION)
    cloud = tmp_path / "cloud"
    write_checkpoint(tmp_path / "upper", cloud, EfficiencyConfig(edge_cloud=config), provenance={})
    fp32 = ("--dtype", "float32")
    for name in ("of-cloud", "of-edge"):
        (tmp_path / name).mkdir()

    monkeypatch.setenv("VLLM_PLUGINS", "effplugin")
    with serving(cloud, tmp_path / "of-cloud", *fp32, "--api-key", "secret") as (upper, _):
        monkeypatch.delenv("VLLM_PLUGINS")
        assert upper.get("/v1/edge_cloud").status_code == 401
        key = {"Authorization": "Bearer secret"}
        described = upper.get("/v1/edge_cloud", headers=key).json()
        assert (described["model"], described["partition"]) == ("tiny", PARTITION)
        text = upper.post("/v1/completions", headers=key, json={"model": "demo", "prompt": "Hello"})
        assert text.status_code == 400
        assert "ask its edge" in text.text

        monkeypatch.setenv(CLOUD_URL, str(upper.base_url))
        monkeypatch.setenv(CLOUD_KEY, "secret")
        below = edge(tmp_path, tmp_path / "edge", rates(0.6, 0.5))
        with serving(below, tmp_path / "of-edge", *fp32) as (lower, _):
            model = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
            ids = torch.tensor([[ord(letter) for letter in WORDS]])
            expected = model.generate(ids, max_new_tokens=16, min_new_tokens=16, do_sample=False)
            answer, mixed = ask(lower, vllm_xargs={"cloud_mode": "cloud"}), ask(lower)
            assert origins(answer) == {"cloud": 16}
            assert answer.json()["choices"][0]["token_ids"] == expected[0, len(WORDS) :].tolist()
            assert set(origins(mixed)) == {"edge", "cloud"}
            refused = ask(lower, repetition_penalty=1.3)
            assert refused.status_code == 400
            assert "repetition_penalty" in refused.text
            assert ask(lower, vllm_xargs={"cloud_mode": "never"}).status_code == 400
            alone = ask(lower, repetition_penalty=1.3, vllm_xargs={"cloud_mode": "standalone"})
            assert origins(alone) == {"edge": 16}
            check_metrics(lower, upper, [answer, mixed, alone])


def check_metrics(lower: httpx.Client, upper: httpx.Client, answers: list[httpx.Response]) -> None:
    """Both servers count what the responses say, and the same of each other."""
    below, above = shown(lower), shown(upper)

    def sample(name: str, **labels: str) -> float:
        labels |= {"engine": "0", "model_name": "demo"}
        names = ",".join(f'{name}="{value}"' for name, value in sorted(labels.items()))
        found = below if name.startswith("edge_") else above
        return found[f"effplugin_{name}{{{names}}}"]

    by_origin = sum((Counter(origins(answer)) for answer in answers), Counter())
    for origin, count in by_origin.items():
        assert sample("edge_tokens_total", origin=origin) == count
    assert by_origin["cloud"] == sample("edge_questions_total") == sample("cloud_tokens_total")
    for there, here in (("up", "in"), ("down", "out")):
        sent = sample("edge_bytes_total", direction=there)
        assert sent == sample("cloud_bytes_total", direction=here) > 0
    uploaded = sample("edge_positions_total", event="uploaded")
    assert uploaded == sample("cloud_positions_total", event="received") > 0
    waited, computed = (sample(f"edge_{name}_seconds_total") for name in ("waited", "computed"))
    assert waited > computed > 0
    assert computed <= sample("cloud_engine_seconds_total") + 1e-3
    assert (sample("edge_up"), sample("edge_waiting")) == (1, 0)
