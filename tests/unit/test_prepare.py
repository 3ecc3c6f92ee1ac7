"""`effplugin prepare layer-parallel` and `effplugin eval` without an engine."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vllm_effplugin.cli import evaluate
from vllm_effplugin.cli import main as cli
from vllm_effplugin.cli.evaluate import Scores, summarise
from vllm_effplugin.config import parse_efficiency
from vllm_effplugin.config.checkpoint import check_checkpoint, read_efficiency
from vllm_effplugin.errors import CheckpointError
from vllm_effplugin.preparation import base
from vllm_effplugin.preparation import text as calibration
from vllm_effplugin.preparation.base import text_windows
from vllm_effplugin.preparation.text import TextShape
from vllm_effplugin.techniques.layer_parallel import prepare
from vllm_effplugin.techniques.layer_parallel.distill import Distiller

TRAINED = parse_efficiency({"layer_parallel": {"groups": [[4, 5]], "trained": True}})
DISTILL = ["--groups", "4,5;6,7,8", "--distill-tokens", "384", "--precision", "fp32"]


Run = Callable[..., int]


@pytest.fixture
def run(model: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command line as the console script does; returns its exit code."""

    def command(out: Path, *options: str, source: Path = model, no_text: bool = False) -> int:
        arguments = ["prepare", "layer-parallel", str(source), str(out), "--no-ray"]
        arguments += ["--sequence-length", "16", *options]
        arguments += [] if no_text or "--text" in options else ["--text", str(text)]
        monkeypatch.setattr(sys, "argv", ["effplugin", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0)

    return command


def test_search_writes_a_checkpoint_with_its_figures(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(out, "--target-depth", "10") == 0
    block = check_checkpoint(out).layer_parallel
    assert block is not None
    assert not block.trained
    assert len(block.resolve_groups(12)) == 2
    provenance = json.loads((out / "provenance.json").read_text())
    assert provenance["command"].startswith("effplugin prepare layer-parallel ")
    assert provenance["versions"]["torch"] == torch.__version__
    assert provenance["arguments"]["search"]["target_depth"] == 10
    quality, search = provenance["quality"], provenance["search"]
    assert quality["original"]["agreement"] == 1
    assert quality["original"]["kl"] == pytest.approx(0, abs=1e-6)
    assert quality["grouped"]["depth"] == 10
    assert quality["grouped"]["kl"] > 0
    assert search["best"]["kl"] <= min(i["kl"] for i in search["contiguous"] if i["depth"] == 10)
    assert (out / "efficiency" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "perplexity" in shown
    assert "cosine" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_distilled_checkpoint_is_better_and_complete(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(out, *DISTILL, "--bypass", "1", "--learning-rate", "3e-3") == 0
    block = check_checkpoint(out).layer_parallel  # every replaced tensor present, none besides
    assert block is not None
    assert block.trained
    assert block.bypass == 1
    assert block.groups == ((4, 5), (6, 7, 8))
    quality = json.loads((out / "provenance.json").read_text())["quality"]
    assert list(quality) == ["original", "grouped", "repaired", "distilled"]
    assert quality["repaired"]["kl"] < quality["grouped"]["kl"]
    assert quality["distilled"]["kl"] < quality["grouped"]["kl"]


def test_repair_alone_writes_a_trained_checkpoint(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(prepare, "HELD_OUT_SEQUENCES", 8)
    assert run(out, "--target-depth", "9", "--group-size", "3", "--repair") == 0
    block = check_checkpoint(out).layer_parallel
    assert block is not None
    assert block.trained
    provenance = json.loads((out / "provenance.json").read_text())
    assert provenance["distillation"] is None
    assert provenance["quality"]["repaired"]["kl"] < provenance["quality"]["grouped"]["kl"]


def test_distillation_can_do_without_repair(run: Run, tmp_path: Path) -> None:
    assert run(tmp_path / "out", *DISTILL, "--no-repair") == 0
    quality = json.loads((tmp_path / "out" / "provenance.json").read_text())["quality"]
    assert list(quality) == ["original", "grouped", "distilled"]


def test_interrupted_run_resumes_to_the_same_tensors(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "whole", *DISTILL) == 0
    out = tmp_path / "broken"
    train = Distiller.train

    def interrupted(self: Distiller, state: Path) -> None:
        train(self, state, stop_after=3)
        raise SystemExit(130)

    monkeypatch.setattr(Distiller, "train", interrupted)
    assert run(out, *DISTILL) == 130
    assert not out.exists()
    work = tmp_path / ".broken.work"
    assert (work / "distillation.json").exists()
    assert (work / "repair.safetensors").exists()
    monkeypatch.setattr(prepare, "_repair", None)  # is not run again

    steps: list[int] = []

    def counted(self: Distiller, state: Path) -> None:
        train(self, state)
        steps.append(self.step)

    optimise = Distiller._optimise
    trained: list[int] = []
    monkeypatch.setattr(Distiller, "train", counted)
    monkeypatch.setattr(
        Distiller, "_optimise", lambda self, batch: trained.append(1) or optimise(self, batch)
    )
    assert run(out, *DISTILL) == 0
    assert steps == [6]
    assert len(trained) == 3
    assert not work.exists()
    expected = load_file(tmp_path / "whole" / "efficiency" / "tensors.safetensors")
    for name, tensor in load_file(out / "efficiency" / "tensors.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-7, rtol=1e-6)


def test_trained_tensor_that_the_base_does_not_name_is_refused(model: Path) -> None:
    stray = {"model.layers.4.mlp.fused_proj.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="fused_proj"):
        prepare._as_stored(model, TRAINED, 12, stray)


def test_stored_tensors_have_the_dtypes_of_the_base(model: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(model, half)
    base.load_model(model, torch.bfloat16).save_pretrained(half)
    name = "model.layers.4.mlp.up_proj.weight"
    tensors = prepare._as_stored(half, TRAINED, 12, {name: torch.full((192, 128), 1 / 3)})
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert torch.equal(tensors[name], torch.full((192, 128), 1 / 3, dtype=torch.bfloat16))
    assert "model.layers.5.mlp.up_proj.weight" in tensors


def test_other_arguments_do_not_resume(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "out"
    write = prepare.write_checkpoint

    def stop(*arguments: Any, **options: Any) -> None:
        raise SystemExit(130)

    monkeypatch.setattr(prepare, "write_checkpoint", stop)
    assert run(out, "--target-depth", "11") == 130
    assert (tmp_path / ".out.work" / "search.json").exists()
    monkeypatch.setattr(prepare, "write_checkpoint", write)
    assert run(out, "--target-depth", "10") == 0
    assert "starting over" in caplog.text
    block = read_efficiency(out).layer_parallel
    assert block is not None
    assert len(block.resolve_groups(12)) == 2


def test_work_directory_with_other_files_is_left_alone(run: Run, tmp_path: Path) -> None:
    work = tmp_path / "mine"
    work.mkdir()
    (work / "thesis.tex").write_text("x")
    assert run(tmp_path / "out", "--target-depth", "11", "--work-dir", str(work)) == 2
    assert (work / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --target-depth, --max-kl or --groups"),
        (["--target-depth", "12"], "saves nothing"),
        (["--target-depth", "10", "--groups", "1,2"], "excludes"),
        (["--target-depth", "10", "--group-size", "5"], "group_size"),
        (["--target-depth", "10", "--bypass", "2"], "below the group size"),
        (["--groups", "1,2;x"], "not of the form"),
        (["--groups", "1,3"], "consecutive"),
        (["--groups", "1,2;2,3"], "overlaps"),
        (["--groups", "11,12"], "outside the model"),
        (["--groups", "1,2", "--schedule", "fused", "--bypass", "1"], "no meaning"),
        (["--target-depth", "10", "--text", "missing.txt"], "cannot be read"),
        (["--target-depth", "10", "--sequence-length", "40"], "too short"),
        (["--target-depth", "10", "--sequence-length", "4096"], "exceeds the model's 1024"),
    ],
)
def test_bad_input_ends_with_exit_code_2(
    run: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    assert run(tmp_path / "out", *options) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_bad_models_end_with_exit_code_2(
    run: Run, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def changed(**fields: Any) -> Path:
        copy = tmp_path / "-".join(fields)
        shutil.copytree(model, copy)
        config = json.loads((copy / "config.json").read_text()) | fields
        (copy / "config.json").write_text(json.dumps(config))
        return copy

    bare = tmp_path / "bare"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    cases = {
        "no config.json": tmp_path / "nothing",
        "'GPT2LMHeadModel' is not supported": changed(architectures=["GPT2LMHeadModel"]),
        "efficient checkpoint already": changed(efficiency={"version": 1}),
        "is quantised": changed(quantization_config={"quant_method": "awq"}),
        "attention window": changed(sliding_window=8),
        "tokenizer": bare,
    }
    for number, (message, source) in enumerate(cases.items()):
        out = tmp_path / f"out{number}"
        assert run(out, "--target-depth", "10", source=source) == 2, message
        assert message in " ".join(capsys.readouterr().err.split())
        assert not out.exists()


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("early-exit", ["--exits", "4,6"]),
        ("edge-cloud", ["--exits", "4,6", "--partition", "6"]),
        ("classify", ["--train", "texts.jsonl"]),
        ("multiplex", ["--train", "texts.jsonl"]),
    ],
)
def test_a_gpu_machine_is_refused_before_anything_is_read(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    options: list[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    arguments = ["effplugin", "prepare", command, str(model), str(tmp_path / "out"), *options]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    message = " ".join(capsys.readouterr().err.split())
    assert ended.value.code == 2, message
    assert "prepared on CPUs only so far: do it on a CPU machine" in message
    assert "set CUDA_VISIBLE_DEVICES=" in message
    assert not list(tmp_path.iterdir())


def test_full_output_directory_is_not_touched(run: Run, tmp_path: Path) -> None:
    (tmp_path / "keep.txt").write_text("x")
    assert run(tmp_path, "--target-depth", "10") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["keep.txt"]
    assert run(tmp_path, "--groups", "1,2", "--overwrite") == 0
    assert not (tmp_path / "keep.txt").exists()


def test_generated_text_starts_from_many_topics(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's own text, with the engine replaced by one that repeats the prompt."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    asked: list[list[int]] = []

    def engine(
        function: Any, path: str, prompts: list[list[int]], length: int, seed: int
    ) -> list[list[int]]:
        asked.extend(prompts)
        return [(prompt * length)[:length] for prompt in prompts]

    monkeypatch.setattr(calibration, "run_with_engine", engine)
    shape = TextShape(sequence_length=32, train=40, held_out=10, at_least=4)
    text = calibration.generated(model, tokenizer, shape, seed=5)
    assert text.train.shape == (40, 32)
    assert text.held_out.shape == (10, 32)
    assert all(0 < len(prompt) < 32 for prompt in asked)
    random_starts = [prompt[0] for prompt in asked[1::2]]
    assert len(set(random_starts)) > 15
    assert not {0, 1, 2} & set(random_starts)  # no special tokens
    assert all(prompt[0] == tokenizer.bos_token_id for prompt in asked[::2])
    again = calibration.generated(model, tokenizer, shape, seed=5)
    assert torch.equal(again.train, text.train)


def test_file_parts_are_disjoint(model: Path, text: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    shape = TextShape(sequence_length=16, train=100, held_out=10, at_least=4)
    parts = calibration.from_file(text, tokenizer, shape, seed=1)
    everything = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    assert len(parts.train) == 30
    assert sorted(torch.cat((parts.train, parts.held_out)).flatten().tolist()) == sorted(everything)
    lines = tmp_path / "text.jsonl"
    lines.write_text('{"text": "ab"}\n\n{"text": "c", "id": 1}\n')
    assert calibration.read_text(lines) == "ab\n\nc"


def test_summary_of_two_engines() -> None:
    base = Scores([-1.0, -2.0, -3.0, -2.0], [5, 6, 7, 8])
    ours = Scores([-1.0, -2.0, -3.0, -3.0], [5, 6, 0, 8])
    figures = summarise(base, ours, 512)
    assert figures["positions"] == 4
    assert figures["agreement"] == 0.75
    assert figures["base_perplexity"] == pytest.approx(7.389056)
    assert figures["perplexity_ratio"] == pytest.approx(1.284025)


def test_eval_cuts_contiguous_windows(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abcdefghijk")
    ids = [ord(letter) for letter in "abcdefghijk"]
    assert text_windows(model, text, 5, None) == [ids[:5], ids[5:10]]
    assert text_windows(model, text, 4, 6) == [ids[:4], ids[4:6]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --text FILE"),
        (["--text", "missing.txt"], "cannot be read"),
        (["--lm-eval", "sciq"], "install the extra `bench`"),
        (["--text", "empty.txt"], "shorter than two tokens"),
    ],
)
def test_eval_refuses_bad_input(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    (tmp_path / "empty.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["effplugin", "eval", str(model), *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
