"""`effplugin prepare early-exit` without an engine: what an engine measures is given."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.tiny import LAYERS
from vllm_effplugin.cli import main as cli
from vllm_effplugin.config.checkpoint import check_checkpoint
from vllm_effplugin.plan import build_plan
from vllm_effplugin.preparation.base import load_model
from vllm_effplugin.techniques.early_exit import prepare
from vllm_effplugin.techniques.early_exit.features import capture
from vllm_effplugin.techniques.layer_parallel.reference import ReferenceDecoder

EXITS = 3
SIZES = [1, 8, 64]

Run = Callable[..., int]


def machine(segment_seconds: float, whole_seconds: float) -> dict[str, Any]:
    """Costs that do not depend on the number of tokens."""
    return {
        "sizes": SIZES,
        "plain": [whole_seconds] * len(SIZES),
        "whole": [whole_seconds] * len(SIZES),
        "head": [0.0] * len(SIZES),
        "segments": [[segment_seconds] * len(SIZES)] * (EXITS + 1),
        "overhead": 0.0,
        "fill": None,
        "steps": dict.fromkeys((1, 8, 32), 1.2 * whole_seconds),
        "block_size": 32,
        "num_layers": LAYERS,
        "depths": [4, 8, 11],
        "blocks": [False] * EXITS,
    }


@pytest.fixture
def run(model: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command line as the console script does; returns its exit code."""

    def command(
        out: Path, *options: str, measured: dict[str, Any] | None = None, base: Path = model
    ) -> int:
        def engine(function: Any, checkpoint: str, batches: Any) -> dict[str, Any]:
            candidate = check_checkpoint(Path(checkpoint)).early_exit
            assert candidate is not None
            assert len(candidate.exits) == EXITS
            return measured or machine(segment_seconds=0.25, whole_seconds=1.0)

        monkeypatch.setattr(prepare, "run_with_engine", engine)
        arguments = ["prepare", "early-exit", str(base), str(out), "--sequence-length", "16"]
        arguments += ["--exits", "4,8,11", "--text", str(text), "--held-out-tokens", "256"]
        arguments += ["--text-tokens", "384", "--adapter-tokens", "2048", "--precision", "fp32"]
        monkeypatch.setattr(sys, "argv", ["effplugin", *arguments, *options])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0)

    return command


@pytest.mark.parametrize(
    ("gate", "adapter"),
    [
        ("linear", "linear"),
        ("mlp", "none"),
        ("mamba", "none"),
        ("softmax", "linear"),
        ("linear", "block"),
    ],
)
def test_a_checkpoint_with_exits_and_its_figures(
    run: Run, tmp_path: Path, gate: str, adapter: str
) -> None:
    out = tmp_path / "out"
    options = ["--gate", gate, "--adapter", adapter, "--min-agreement", "0.3"]
    if adapter == "block":  # a copy of the last layer of a random model needs some training
        options += ["--adapter-tokens", "8192"]
    assert run(out, *options) == 0
    block = check_checkpoint(out).early_exit
    assert block is not None
    assert block.exits
    assert {(point.gate, point.adapter) for point in block.exits} == {(gate, adapter)}
    assert all(0 <= point.threshold < 1 for point in block.exits)
    provenance = json.loads((out / "provenance.json").read_text())
    promise = provenance["promise"]
    assert promise["at_least"] >= 0.3
    assert promise["agreement"] >= promise["at_least"]
    leaves = sum(exit["leaves"] for exit in provenance["exits"])
    assert 0 < leaves <= 1
    assert [item["batch"] for item in provenance["forecasts"]] == [1, 8, 32]
    assert provenance["forecasts"][0]["speed"] > 1
    assert (out / "efficiency" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("backbone", ["lora", "full"])
def test_a_tuned_backbone_comes_with_the_checkpoint(
    run: Run,
    tmp_path: Path,
    model: Path,
    backbone: str,
) -> None:
    out = tmp_path / "out"
    options = ["--tune-backbone", backbone, "--tune-tokens", "512", "--tune-rate", "1e-3"]
    assert run(out, *options, "--min-agreement", "0.2") == 0
    assert check_checkpoint(out).early_exit is not None
    ours, base = load_file(out / "model.safetensors"), load_file(model / "model.safetensors")
    assert ours.keys() == base.keys()
    assert {name: value.dtype for name, value in ours.items()} == {
        name: value.dtype for name, value in base.items()
    }
    changed = {name for name in base if not base[name].equal(ours[name])}
    assert any(".q_proj." in name for name in changed)
    assert all(".layers." in name for name in changed)
    assert (out / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    tuning = json.loads((out / "provenance.json").read_text())["tuning"]
    assert 0.1 < tuning["agreement"] < 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_exits_on_a_model_with_groups(run: Run, tmp_path: Path, grouped: Path) -> None:
    """Trained on what its groups compute; the checkpoint has both techniques, and their tensors."""
    out = tmp_path / "out"
    assert run(out, "--min-agreement", "0.3", base=grouped) == 0
    efficiency, base = check_checkpoint(out), check_checkpoint(grouped)
    assert efficiency.techniques == ("layer_parallel", "early_exit")
    assert efficiency.layer_parallel == base.layer_parallel
    ours, theirs = (
        load_file(folder / "efficiency" / "tensors.safetensors") for folder in (out, grouped)
    )
    assert all(theirs[name].equal(ours[name]) for name in theirs)
    added = ours.keys() - theirs.keys()
    assert added
    assert all(name.startswith("model.exits.") for name in added)
    # Nothing of what has to be, need be given.
    assert run(tmp_path / "none", base=grouped, measured=machine(1.0, 1.0)) == 0
    assert check_checkpoint(tmp_path / "none").layer_parallel == base.layer_parallel


def test_features_of_a_model_with_groups(grouped: Path) -> None:
    """What the reference of groups computes, with the weights that they were given."""
    model, efficiency = load_model(grouped), check_checkpoint(grouped)
    tokens = torch.randint(3, 250, (2, 16))
    found = capture(model, tokens, torch.zeros(2, 16, dtype=torch.bool), [4, 8], "fp32")
    decoder, units = ReferenceDecoder(model), build_plan(efficiency, LAYERS).units
    hidden, context = decoder.embed(tokens)
    for depth, state in ((4, found.exits[0]), (8, found.exits[1]), (LAYERS, found.final)):
        expected = decoder.run(
            [unit for unit in units if unit.first < depth],
            hidden,
            context,
            efficiency.layer_parallel,
        )
        torch.testing.assert_close(state, expected.bfloat16())
    stock = AutoModelForCausalLM.from_pretrained(grouped, dtype=torch.float32)
    assert not torch.equal(
        stock.model.layers[5].mlp.up_proj.weight, model.model.layers[5].mlp.up_proj.weight
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--exits", "5,8"], r"inside the group [4, 5]"),
        (["--cache", "propagate"], "'propagate' is not supported with efficiency.layer_parallel"),
        (["--gate", "mamba"], "gates `mamba`"),
        (["--tune-backbone", "lora"], "--tune-backbone is not supported"),
    ],
)
def test_what_groups_do_not_support_is_refused(
    run: Run,
    tmp_path: Path,
    grouped: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    assert run(tmp_path / "out", *options, base=grouped) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_no_exit_is_written_where_none_pays(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    slow = machine(segment_seconds=1.0, whole_seconds=1.0)
    assert run(out, "--min-agreement", "0.3", measured=slow) == 0
    assert "No gain" in capsys.readouterr().out
    block = check_checkpoint(out).early_exit
    assert block is not None
    assert not block.exits
    assert not (out / "efficiency" / "tensors.safetensors").exists()


def test_an_agreement_that_cannot_be_shown_is_not_promised(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """256 held-out tokens cannot show 0.999, whatever the exits do."""
    out = tmp_path / "out"
    assert run(out, "--min-agreement", "0.999") == 0
    assert "no exit keeps the agreement" in capsys.readouterr().out
    assert json.loads((out / "provenance.json").read_text())["promise"] is None


def test_an_interrupted_run_resumes_to_the_same_tensors(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--min-agreement", "0.3", "--gate", "mlp")
    assert run(tmp_path / "whole", *options) == 0
    out = tmp_path / "out"
    with monkeypatch.context() as patch:

        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(prepare, "_choose", interrupted)
        assert run(out, *options) != 0
    assert (tmp_path / ".out.work" / "machine.json").exists()
    monkeypatch.setattr(prepare, "capture", lambda *_: pytest.fail("captured again"))
    assert run(out, *options) == 0
    tensors = [load_file(tmp_path / d / "efficiency/tensors.safetensors") for d in ("whole", "out")]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--exits", "4,12,13"], "not inside"),
        (["--exits", "8,4"], "increasing depths"),
        (["--exits", "4;8"], "--exits"),
        (["--min-agreement", "1.5"], "--min-agreement"),
        (["--batches", "one"], "--batches"),
        (["--batches", "8,0"], "--batches"),
        (["--exits", "0,4"], "--exits"),
        (["--top-k", "0"], "--top-k"),
    ],
)
def test_impossible_wishes_are_refused(
    run: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    assert run(tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
