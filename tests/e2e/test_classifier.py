"""Classifiers with exits from data to `/classify`: what a user does and sees."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from tests.dashboard import check
from tests.e2e.server import serving, shown
from tests.engine.test_joint_exit import JOINT, checkpoint
from tests.tiny import BERT, VOCAB, add_tokenizer, engine, make_checkpoint, make_classifier
from vllm_effplugin.config.checkpoint import check_checkpoint, read_model_config
from vllm_effplugin.offline import run_with_engine
from vllm_effplugin.preparation.labelled import Columns
from vllm_effplugin.techniques.joint_exit import evaluate as evaluating
from vllm_effplugin.techniques.joint_exit import prepare as preparing
from vllm_effplugin.techniques.joint_exit.evaluate import evaluate_classifier
from vllm_effplugin.techniques.joint_exit.prepare import ClassifyRequest, Outcome, prepare
from vllm_effplugin.techniques.joint_exit.request import exit_pooling_params
from vllm_effplugin.techniques.multiplex import prepare as preparing_multiplex

LAYERS = 6
"""Of models that `prepare` compiles."""


def measure_eagerly(monkeypatch):
    """`prepare` and `eval` measure without compiling: a minute less for each engine."""

    def run_eagerly(function, *arguments):
        return run_with_engine(partial(function, enforce_eager=True), *arguments)

    for module in (preparing, preparing_multiplex, evaluating):
        monkeypatch.setattr(module, "run_with_engine", run_eagerly)


@pytest.fixture
def eager(monkeypatch):
    measure_eagerly(monkeypatch)


def test_classify_and_pooling_over_http(tmp_path):
    """`/classify` as of the stock model; options and what they did through `/pooling`."""
    base = make_classifier(tmp_path / "base")
    add_tokenizer(base)
    texts = ["a good one", "bad", "neither, nor", "what?", "x" * 90]
    sets = [{"coverage": 0.9, "thresholds": [0.4, 0.4, 0.4, 0.2]}]
    exits = checkpoint(base, tmp_path / "exits", {**JOINT, "conformal": sets})
    with serving(exits, tmp_path) as (client, _):

        def classify() -> list[list[float]]:
            answer = client.post("/classify", json={"model": "demo", "input": texts})
            assert answer.status_code == 200, answer.text
            return [row["probs"] for row in answer.json()["data"]]

        def ask(**data: Any) -> httpx.Response:
            return client.post("/pooling", json={"model": "demo", "data": data})

        def rows(**data: Any) -> list[dict[str, Any]]:
            answer = ask(input=texts, **data)
            assert answer.status_code == 200, answer.text
            return answer.json()["data"]

        plain = classify()
        asked = rows()
        assert [row["probs"] for row in asked] == [pytest.approx(p, abs=1e-5) for p in plain]
        assert [row["label"] for row in asked] == [
            f"LABEL_{max(range(3), key=p.__getitem__)}" for p in plain
        ]
        assert min(row["layers"] for row in asked) < 12
        assert all(len(row["sets"]) == 1 for row in asked)
        for row in asked:
            threshold = 0.4 if row["layers"] < 12 else 0.2
            likely = {f"LABEL_{i}" for i, p in enumerate(row["probs"]) if p >= threshold}
            assert set(row["sets"][0]["labels"]) == likely
        # They hold for the checkpoint's own rule.
        assert all(row["sets"] == [] for row in rows(exit=False) + rows(exit_bias=0.0))
        assert {row["layers"] for row in rows(exit=False)} == {12}
        assert {row["layers"] for row in rows(exit_bias=50)} == {3}
        assert {row["layers"] for row in rows(exit_bias=-50)} == {12}
        # Each request's own options, however many arrive at once.
        with ThreadPoolExecutor(16) as many:
            biases = [50, -50] * 32
            answers = many.map(lambda bias: rows(exit_bias=bias), biases)
            for bias, answer in zip(biases, answers, strict=True):
                assert {row["layers"] for row in answer} == {3 if bias > 0 else 12}
        for wrong in (
            {"input": texts, "exit_bias": "much"},
            {"input": texts, "exit": 3},
            {"input": texts, "exit_tresh": 1},
            {"input": []},
            {},
        ):
            refused = ask(**wrong)
            assert refused.status_code == 400, refused.text
            assert "data" in refused.text
        assert classify() == [pytest.approx(p, abs=1e-5) for p in plain]
        samples = shown(client)
    labels = 'engine="0",model_name="demo"'
    check(samples, "classify")
    answered = {
        depth: samples[f'effplugin_classify_sequences_total{{depth="{depth}",{labels}}}']
        for depth in (3, 6, 9, 12)
    }
    assert sum(answered.values()) == (8 + 64) * len(texts)


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Texts whose last letter tells the class, in one of nine of ten cases."""
    chance = random.Random(seed)
    found = []
    for _ in range(count):
        label = chance.randrange(2)
        last = "ab"[label if chance.random() < 0.9 else 1 - label]
        letters = [chr(chance.randrange(32, 126)) for _ in range(chance.randrange(1, 30))]
        found.append({"text": "".join(letters) + last, "label": label})
    return found


def data(path: Path, count: int, seed: int = 0) -> str:
    lines = [json.dumps(row) + "\n" for row in rows(count, seed)]
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def request(folder: Path, **changes: Any) -> ClassifyRequest:
    folder.mkdir(exist_ok=True)
    train = data(folder / "train.jsonl", 1200)
    return ClassifyRequest.model_validate(
        {
            "data": {"train": train, "labels": ("a", "b")},
            "exits": (2, 5),
            "train": {"warm_up_epochs": 4, "epochs": 8, "phase": 10},
            "trade_offs": (0.1, 1.0),
            "most_loss": 0.02,
            "measured_rows": 32,
            **changes,
        }
    )


def run(base: Path, out: Path, request: ClassifyRequest, **options: Any) -> Outcome:
    return prepare(base, out, request, console=Console(quiet=True), **options)


def served(model: Path, texts: list[str], **wishes: Any) -> list[list[float]]:
    """Class probabilities in vLLM, in fp32."""
    with engine(model, skip_tokenizer_init=False) as llm:
        params = exit_pooling_params(**wishes) if wishes else None
        outputs = llm.classify(texts, pooling_params=params, use_tqdm=False)
    return [output.outputs.probs for output in outputs]


def accuracy(probabilities: list[list[float]], labelled: list[dict[str, Any]]) -> float:
    right = [
        (p[1] > p[0]) == bool(r["label"]) for p, r in zip(probabilities, labelled, strict=True)
    ]
    return sum(right) / len(right)


def test_from_a_language_model_to_a_classifier_with_exits(tmp_path, eager, caplog, monkeypatch):
    """One set of states, every method; each is what it says when vLLM serves it."""
    base = make_checkpoint(tmp_path / "base", num_hidden_layers=LAYERS)
    add_tokenizer(base)
    asked = request(tmp_path / "data", ablation=True)
    work = tmp_path / "work"
    options = {"work_dir": work, "keep": True}
    outcome = run(base, tmp_path / "joint", asked, **options)
    assert set(outcome.chosen) == {"joint", "threshold", "fixed"}
    assert {report.method for report in outcome.reports} == {*outcome.chosen, "final"}
    # In fp16, of texts that random weights leave undecided: one of 32 may differ.
    assert all(report.same > 0.95 and report.requests_s for report in outcome.reports)
    before = {file: file.stat().st_mtime_ns for file in work.rglob("*.safetensors")}
    plain = asked.model_copy(update={"ablation": False})
    again = run(base, tmp_path / "again", plain, **options)
    # Other heads from the same states; those that learn alone are the same.
    assert {file: file.stat().st_mtime_ns for file in before if "states" in file.name} == {
        file: at for file, at in before.items() if "states" in file.name
    }
    alone = ("final", "threshold", "fixed")
    first, second = (
        [(report.name, report.accuracy) for report in each.reports if report.method in alone]
        for each in (outcome, again)
    )
    assert first == second
    # Whatever vLLM agrees to, it is too little here.
    caplog.clear()
    with caplog.at_level("WARNING"), monkeypatch.context() as here:
        here.setattr(preparing, "SAME", 1.01)
        run(base, tmp_path / "fixed", asked, write="fixed", **options)
    warned = [record.args[0] for record in caplog.records if "replayed here" in record.msg]
    assert warned == ["the full model", outcome.chosen["fixed"].name]
    run(base, tmp_path / "final", asked, write="final", work_dir=work)
    assert not work.exists()
    assert before, "the states were not kept"

    joint = check_checkpoint(tmp_path / "joint").joint_exit
    assert joint is not None
    assert joint.depths == (2, 5)
    assert [level.coverage for level in joint.conformal] == [0.9, 0.95]
    fixed = check_checkpoint(tmp_path / "fixed").joint_exit
    assert fixed is not None
    assert len(fixed.exits) == 1
    assert read_model_config(tmp_path / "final")["architectures"] == [
        "LlamaForSequenceClassification"
    ]
    provenance = json.loads((tmp_path / "joint" / "provenance.json").read_text())
    assert len(provenance["detached_or_not"]) == 4
    assert provenance["classes"] == ["a", "b"]
    assert (tmp_path / "joint" / "efficiency" / "frontier.png").stat().st_size > 1000

    fresh = rows(300, seed=9)
    texts = [row["text"] for row in fresh]
    stock = served(tmp_path / "final", texts)
    assert accuracy(stock, fresh) > 0.6  # the backbone is random
    # The same without exits, in Transformers as well: a stock classifier.
    assert served(tmp_path / "joint", texts, exit=False) == stock
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "final")
    with torch.inference_mode():
        theirs = [
            loaded(torch.tensor([tokenizer(text)["input_ids"]])).logits[0].softmax(-1).tolist()
            for text in texts[:20]
        ]
    for ours, other in zip(stock, theirs, strict=False):
        assert ours == pytest.approx(other, abs=1e-4)
    found = evaluate_classifier(
        tmp_path / "joint", data(tmp_path / "fresh.jsonl", 300, 9), Columns()
    )
    # In vLLM's own choice of precision; `served` is fp32, and a few texts are close calls.
    early = accuracy(served(tmp_path / "joint", texts), fresh)
    assert found["accuracy"] == pytest.approx(early, abs=0.01)
    full = found["accuracy"] - found["difference"]
    assert full == pytest.approx(accuracy(stock, fresh), abs=0.01)
    assert 2 <= found["mean_depth"] < LAYERS
    assert found["speed_ratio"] > 0
    for method in ("joint", "fixed"):
        early = served(tmp_path / method, texts)
        assert early != stock
        expected = outcome.chosen[method].answers.accuracy
        assert accuracy(early, fresh) == pytest.approx(expected, abs=0.08)


def test_what_is_stored_in_fp32_is_captured_as_bf16_gives_it_too(tmp_path, eager):
    """vLLM serves it in fp16, a user perhaps in bf16: heads learn from both."""
    base = make_checkpoint(tmp_path / "base", num_hidden_layers=LAYERS)
    add_tokenizer(base)
    asked = request(tmp_path / "data", precision="bf16", trade_offs=(1.0,))
    work = tmp_path / "work"
    run(base, tmp_path / "final", asked, write="final", work_dir=work, keep=True)
    states = load_file(work / "states.safetensors")
    exact, coarse = states["train"].chunk(2, dim=1)
    assert (coarse == coarse.bfloat16()).all()
    length = torch.linalg.vector_norm
    assert 0 < length(coarse - exact) < 0.05 * length(exact)


@pytest.mark.parametrize("family", ["Llama", "Bert"])
def test_a_classifier_keeps_its_head(tmp_path, monkeypatch, family):
    """Exits beside a head that somebody has trained; labels are the model's."""
    if family == "Bert":
        measure_eagerly(monkeypatch)
    base = make_classifier(
        tmp_path / "base",
        family,
        num_labels=2,
        id2label={0: "a", 1: "b"},
        num_hidden_layers=LAYERS,
    )
    add_tokenizer(base)
    found = run(base, tmp_path / "out", request(tmp_path / "data", most_loss=0.9))
    assert found.chosen["joint"]
    texts = [row["text"] for row in rows(40, seed=3)]
    assert served(tmp_path / "out", texts, exit=False) == served(base, texts)
    assert served(tmp_path / "out", texts) != served(base, texts)


@pytest.mark.parametrize("family", ["Llama", "Bert"])
def test_lora_teaches_the_backbone(tmp_path, eager, family):
    """Early layers learn what random ones do not show; the stock classifier has them, too."""
    if family == "Bert":
        import transformers

        base = tmp_path / "base"
        torch.manual_seed(0)
        config = transformers.BertConfig(**{**BERT, "num_hidden_layers": LAYERS})
        transformers.BertModel(config).save_pretrained(base)
    else:
        base = make_checkpoint(tmp_path / "base", num_hidden_layers=LAYERS)
    add_tokenizer(base)
    tune = {"epochs": 4, "learning_rate": 3e-3, "batch": 16}
    asked = request(tmp_path / "data", tune=tune)
    outcome = run(base, tmp_path / "out", asked, work_dir=tmp_path / "work", keep=True)
    run(base, tmp_path / "final", asked, write="final", work_dir=tmp_path / "work")
    [full] = [report for report in outcome.reports if report.method == "final"]
    assert full.accuracy > 0.8
    assert outcome.chosen["joint"].layers < 0.8
    fresh = rows(300, seed=9)
    texts = [row["text"] for row in fresh]
    stock = served(tmp_path / "final", texts)
    assert served(tmp_path / "out", texts, exit=False) == stock
    assert accuracy(stock, fresh) > 0.8
    assert accuracy(served(tmp_path / "out", texts), fresh) > 0.8
    assert read_model_config(tmp_path / "out")["vocab_size"] == VOCAB
