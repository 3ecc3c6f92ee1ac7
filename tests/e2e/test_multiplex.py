"""Classifiers that merge sequences, from data to `/classify`: what a user does and sees."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console

from tests.dashboard import check
from tests.e2e.server import serving, shown
from tests.e2e.test_classifier import LAYERS, data, measure_eagerly
from tests.engine.test_joint_exit import JOINT, tensors
from tests.engine.test_multiplex import trained
from tests.tiny import BERT, add_tokenizer, make_checkpoint, make_classifier
from vllm_effplugin.config import EfficiencyConfig
from vllm_effplugin.config.checkpoint import check_checkpoint, read_efficiency, write_checkpoint
from vllm_effplugin.techniques.multiplex.prepare import Outcome, PrepareRequest, prepare


def test_over_http(tmp_path: Path) -> None:
    """`/classify` as of the stock model; company, and who refuses it, through `/pooling`."""
    base = make_classifier(tmp_path / "base")
    add_tokenizer(base)
    block = {"multiplex": {"depth": 9, "sizes": [2], "max_wait_ms": 0}, "joint_exit": JOINT}
    efficiency = EfficiencyConfig.model_validate(block)
    assert efficiency.joint_exit is not None
    extra = trained((2,)) | tensors(efficiency.joint_exit)
    write_checkpoint(base, tmp_path / "mux", efficiency, tensors=extra, provenance={})
    texts = ["a good one", "bad", "neither, nor", "what?", "x" * 90]
    with serving(tmp_path / "mux", tmp_path) as (client, _):

        def ask(**asked: Any) -> httpx.Response:
            return client.post("/pooling", json={"model": "demo", "data": asked})

        def rows(**asked: Any) -> list[dict[str, Any]]:
            answer = ask(input=texts, **asked)
            assert answer.status_code == 200, answer.text
            return answer.json()["data"]

        alone = rows(mux=False, exit=False)
        assert {row["merged"] for row in alone} == {1}
        assert max(row["merged"] for row in rows(exit=False)) == 2
        for row in rows():
            # Prediction sets are calibrated on texts that run alone.
            assert row["merged"] == 1 or row["sets"] == []
        # Many tenants at once, each of which never meets another: five texts, one is left over.
        with ThreadPoolExecutor(8) as many:
            answers = many.map(lambda i: rows(exit=False, mux_group=f"tenant {i}"), range(24))
            for answer in answers:
                assert [row["merged"] for row in answer].count(1) % 2 == 1
        answer = client.post("/classify", json={"model": "demo", "input": texts})
        assert answer.status_code == 200, answer.text
        for wrong in ({"mux": "maybe"}, {"mux_group": ""}, {"mux_group": 3}, {"mux_grp": "a"}):
            refused = ask(input=texts, **wrong)
            assert refused.status_code == 400, refused.text
            assert "data" in refused.text
        for row, before in zip(rows(mux=False, exit=False), alone, strict=True):
            assert row["probs"] == pytest.approx(before["probs"], abs=1e-5)
        samples = shown(client)
    labels = 'engine="0",model_name="demo"'
    check(samples, "classify", "multiplex")
    sequences = {
        size: samples[f'effplugin_multiplex_sequences_total{{{labels},size="{size}"}}']
        for size in (1, 2)
    }
    assert min(sequences.values()) > 0
    room, used = (
        samples[f"effplugin_multiplex_{name}_tokens_total{{{labels}}}"]
        for name in ("slot", "member")
    )
    assert 0 < used < room
    for name in ("passed_over_requests", "held_requests", "held_seconds"):
        assert samples[f"effplugin_multiplex_{name}_total{{{labels}}}"] >= 0


def made(base: Path, out: Path, train: str, work: Path, **changes: Any) -> Outcome:
    request = PrepareRequest.model_validate(
        {
            "data": {"train": train},
            "sizes": (2, 3),
            "depths": (2, 4),
            "train": {"epochs": 3, "batch": 24, "learning_rate": 2e-3},
            "head": {"warm_up_epochs": 4},
            "groupings": 3,
            "measured_rows": 64,
            "most_loss": 0.5,
            **changes,
        }
    )
    return prepare(base, out, request, work_dir=work, keep=True, console=Console(quiet=True))


def test_prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a model without a head to a checkpoint with figures and a plot; then without a gain."""
    measure_eagerly(monkeypatch)
    base = make_checkpoint(tmp_path / "base", num_hidden_layers=LAYERS)
    add_tokenizer(base)
    train = data(tmp_path / "train.jsonl", 600)
    outcome = made(base, tmp_path / "out", train, tmp_path / "work", ablation=True)
    assert outcome.config is not None
    efficiency = check_checkpoint(tmp_path / "out")
    assert efficiency.multiplex == outcome.config
    provenance = json.loads((tmp_path / "out" / "provenance.json").read_text())
    points = {(point["depth"], point["size"]) for point in provenance["points"]}
    assert points == {(0, 1), (2, 2), (2, 3), (4, 2), (4, 3)}
    assert all(point["ratio"] > 0 for point in provenance["points"])
    mixing = [(p["mixing"], p["depth"], p["size"]) for p in provenance["ablation"]]
    assert ("released", 2, 2) in mixing
    assert ("none", 4, 3) in mixing
    assert (tmp_path / "out" / "efficiency" / "multiplex.png").read_bytes()[1:4] == b"PNG"
    # What was measured is kept; now nothing is fast enough.
    outcome = made(base, tmp_path / "none", train, tmp_path / "work", ablation=True, least_gain=1e3)
    assert outcome.config is None
    assert read_efficiency(tmp_path / "none") == EfficiencyConfig()


def test_prepare_an_encoder(tmp_path: Path) -> None:
    base = make_classifier(
        tmp_path / "base", "Bert", **{**BERT, "num_labels": 2, "num_hidden_layers": LAYERS}
    )
    add_tokenizer(base)
    train = data(tmp_path / "train.jsonl", 300)
    outcome = made(base, tmp_path / "out", train, tmp_path / "work", sizes=(4,), depths=(1,))
    assert outcome.config is not None
    assert check_checkpoint(tmp_path / "out").multiplex == outcome.config
