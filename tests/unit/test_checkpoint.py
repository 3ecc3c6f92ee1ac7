"""Efficient checkpoints: whole or absent, linked, checked before they are served."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import make_checkpoint
from vllm_effplugin.config import parse_efficiency
from vllm_effplugin.config.checkpoint import (
    base_tensors,
    check_checkpoint,
    replaced_tensor_names,
    write_checkpoint,
)
from vllm_effplugin.errors import CheckpointError, ConfigError

TRAINED = parse_efficiency({"layer_parallel": {"groups": [[2, 3]], "trained": True}})
UNTRAINED = parse_efficiency({"layer_parallel": {"groups": [[2, 3]]}})


def replacements(base):
    wanted = replaced_tensor_names(TRAINED, 12, base_tensors(base))
    stored = load_file(base / "model.safetensors")
    return {name: stored[name] + 1 for name in wanted}


@pytest.fixture
def written(tiny, tmp_path):
    write_checkpoint(
        tiny(),
        tmp_path / "out",
        TRAINED,
        tensors=replacements(tiny()),
        provenance={"command": "test"},
        files={"plot.png": b"png"},
    )
    return tmp_path / "out"


def test_layout(tiny, written):
    config = json.loads((written / "config.json").read_text())
    assert config["architectures"] == ["EfficientLlamaForCausalLM"]
    assert config["efficiency"] == {
        "version": 1,
        "layer_parallel": {"groups": [[2, 3]], "trained": True},
    }
    assert json.loads((written / "provenance.json").read_text()) == {"command": "test"}
    assert os.path.samefile(written / "model.safetensors", tiny() / "model.safetensors")
    assert (written / "efficiency" / "plot.png").read_bytes() == b"png"
    assert check_checkpoint(written) == TRAINED
    assert [path.name for path in written.parent.iterdir()] == ["out"], "staging was left behind"


def test_without_the_block_it_is_the_stock_model(tiny, written):
    config = json.loads((written / "config.json").read_text())
    del config["efficiency"]
    stock = json.loads((tiny() / "config.json").read_text())
    assert {**config, "architectures": stock["architectures"]} == stock
    assert base_tensors(written) == base_tensors(tiny())


def edit_tensors(written, change):
    from safetensors.torch import save_file

    path = written / "efficiency" / "tensors.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_missing_surplus_and_misshapen_tensors_are_named(written):
    name = "model.layers.3.mlp.up_proj.weight"
    edit_tensors(written, lambda tensors: tensors.update({name: torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=f"misshapes tensors: {name}"):
        check_checkpoint(written)
    edit_tensors(written, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"lacks tensors: {name}"):
        check_checkpoint(written)
    edit_tensors(written, lambda tensors: tensors.update({"model.layers.4.x": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=r"lacks|has surplus tensors: model\.layers\.4\.x"):
        check_checkpoint(written)


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_a_truncated_file_is_named(written, keep):
    path = written / "efficiency" / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"tensors\.safetensors"):
        check_checkpoint(written)


def test_surplus_extra_file(tiny, written):
    config = json.loads((written / "config.json").read_text())
    config["efficiency"]["layer_parallel"].pop("trained")
    (written / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="surplus"):
        check_checkpoint(written)


def test_an_absent_extra_file_is_named(written):
    (written / "efficiency" / "tensors.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"tensors\.safetensors is missing"):
        check_checkpoint(written)


def test_nothing_is_overwritten(tiny, written):
    with pytest.raises(CheckpointError, match="not empty"):
        write_checkpoint(tiny(), written, UNTRAINED, provenance={})
    assert check_checkpoint(written) == TRAINED
    write_checkpoint(tiny(), written, UNTRAINED, provenance={}, overwrite=True)
    assert check_checkpoint(written) == UNTRAINED


def test_a_failure_leaves_nothing_behind(tiny, tmp_path):
    wrong = {"model.layers.2.mlp.up_proj.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError):
        write_checkpoint(tiny(), tmp_path / "out", TRAINED, tensors=wrong, provenance={})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_place_is_refused(tiny, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_checkpoint(tiny(), tmp_path / "out", UNTRAINED, provenance={})


def test_a_file_in_the_way_is_refused(tiny, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(CheckpointError, match="not a directory"):
        write_checkpoint(tiny(), tmp_path / "out", UNTRAINED, provenance={})
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_checkpoint(tiny(), tmp_path / "out" / "deeper", UNTRAINED, provenance={})


def test_an_unknown_architecture_is_refused(tmp_path, tiny):
    base = make_checkpoint(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "architectures": ["OPTForCausalLM"]}))
    with pytest.raises(ConfigError, match="OPTForCausalLM"):
        write_checkpoint(base, tmp_path / "out", UNTRAINED, provenance={})
