"""`effplugin prepare edge-cloud`: two checkpoints that make up the model they are from."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.tiny import LAYERS
from vllm_effplugin.cli import main as cli
from vllm_effplugin.config.checkpoint import check_checkpoint
from vllm_effplugin.preparation.base import load_model
from vllm_effplugin.preparation.decoder import take_apart
from vllm_effplugin.techniques.edge_cloud import split
from vllm_effplugin.techniques.edge_cloud.config import CloudConfig, EdgeConfig

Run = Callable[..., int]


@pytest.fixture
def run(model: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command line as the console script does; returns its exit code."""

    def command(
        out: Path,
        *options: str,
        partition: str = "6",
        exits: str = "4,6",
        base: Path = model,
    ) -> int:
        arguments = ["prepare", "edge-cloud", str(base), str(out), "--sequence-length", "16"]
        arguments += ["--partition", partition, "--exits", exits, "--text", str(text)]
        arguments += ["--text-tokens", "384", "--held-out-tokens", "256", "--precision", "fp32"]
        arguments += ["--adapter-tokens", "2048"]
        monkeypatch.setattr(sys, "argv", ["effplugin", *arguments, *options])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0)

    return command


def test_the_parts_are_the_whole(
    run: Run, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split, "SHARD_BYTES", 1 << 19)  # several files
    out = tmp_path / "out"
    assert run(out, "--min-agreement", "0.2", "--transport", "int8") == 0
    edge, cloud = check_checkpoint(out / "edge"), check_checkpoint(out / "cloud")
    assert isinstance(edge.edge_cloud, EdgeConfig)
    assert isinstance(cloud.edge_cloud, CloudConfig)
    assert edge.edge_cloud.model == cloud.edge_cloud.model == split.model_name(model)
    assert (edge.edge_cloud.layers, edge.edge_cloud.transport) == (LAYERS, "int8")
    assert edge.early_exit is not None
    assert [point.depth for point in edge.early_exit.exits] == [4, 6]
    provenance = json.loads((out / "edge" / "provenance.json").read_text())
    assert provenance["promise"]["at_least"] >= 0.2
    asked = [point["asked"] for point in provenance["frontier"]]
    assert asked == sorted(asked, reverse=True)
    assert (out / "edge" / "efficiency" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(list((out / "edge").glob("*.safetensors"))) > 1

    # As stock checkpoints: the block is all that makes them parts.
    parts = []
    for part in ("edge", "cloud"):
        config = json.loads((out / part / "config.json").read_text())
        config["architectures"] = ["LlamaForCausalLM"]
        del config["efficiency"]
        (out / part / "config.json").unlink()
        (out / part / "config.json").write_text(json.dumps(config))
        parts.append(AutoModelForCausalLM.from_pretrained(out / part, dtype=torch.float32))
    ids = torch.arange(3, 40)[None]
    lower, upper = parts
    seen: list[torch.Tensor] = []
    lower.model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        lower(ids)
        whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids).logits
        torch.testing.assert_close(upper(inputs_embeds=seen[0]).logits, whole)
    tensors = load_file(out / "edge" / "efficiency" / "tensors.safetensors")
    assert {name.split(".")[2] for name in tensors} == {"0", "1"}


def test_the_parts_of_a_model_with_groups(
    run: Run, tmp_path: Path, model: Path, grouped: Path
) -> None:
    """Each has its own, with the weights that they were given."""
    out = tmp_path / "out"
    assert run(out, "--min-agreement", "0.2", base=grouped) == 0
    parts = [check_checkpoint(out / part) for part in ("edge", "cloud")]
    groups = [each.layer_parallel and each.layer_parallel.groups for each in parts]
    assert groups == [((1, 2), (4, 5)), ((2, 3, 4),)]
    names = {each.edge_cloud.model for each in parts if each.edge_cloud is not None}
    assert names == {split.model_name(grouped)}
    assert names != {split.model_name(model)}
    lower, upper = (take_apart(load_model(out / part)) for part in ("edge", "cloud"))
    whole = take_apart(load_model(grouped))
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        hidden, context = lower.embed(ids)
        hidden = upper.run_layers(range(6), lower.run_layers(range(6), hidden, context), context)
        expected = whole.run_layers(range(LAYERS), *whole.embed(ids))
        torch.testing.assert_close(upper.logits(hidden), whole.logits(expected))


def test_a_group_is_not_cut_in_two(
    run: Run, tmp_path: Path, grouped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "out", partition="9", exits="4,9", base=grouped) == 2
    assert "inside the group [8, 9, 10]" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_where_nothing_keeps_the_agreement_all_is_asked(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "out", "--min-agreement", "0.999") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "every token is asked" in shown
    assert "100.0%" in shown
    block = check_checkpoint(tmp_path / "out" / "edge").early_exit
    assert block is not None
    assert [point.threshold for point in block.exits] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"partition": "12"}, "--partition 12 is not inside the model, which has 12 layers"),
        ({"exits": "4,5"}, "the last exit has to be the partition, 6"),
        ({"exits": "6"}, "--exits"),
        ({"exits": "5,4,6"}, "increasing"),
    ],
)
def test_impossible_splits_are_refused(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict, named: str
) -> None:
    assert run(tmp_path / "out", **options) == 2
    assert named in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
