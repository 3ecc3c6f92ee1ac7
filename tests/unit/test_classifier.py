"""Stock classifiers out of base models of every form."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel, LlamaModel

from tests.tiny import BERT, make_checkpoint, make_classifier
from vllm_effplugin.config.checkpoint import base_tensors, link, read_model_config
from vllm_effplugin.errors import CheckpointError, ConfigError
from vllm_effplugin.preparation.backbone import load_backbone, padded
from vllm_effplugin.preparation.classifier import (
    classes_of,
    classifier_architecture,
    has_softmax,
    own_head,
    write_classifier,
)

SEQUENCES = [[5, 9, 77], [3, 200, 41, 8, 100], [7]]


def written(base: Path, out: Path) -> Path:
    out.mkdir()
    architecture = classifier_architecture(read_model_config(base))
    torch.manual_seed(0)
    weight = 0.1 * torch.randn(2, 128)
    bias = torch.tensor([0.5, -0.5]) if architecture.startswith("Bert") else None
    write_classifier(base, out, architecture, ("no", "yes"), weight, bias)
    return out


def check_as_in_transformers(base: Path, out: Path) -> None:
    """The written classifier reads the states that heads are trained on."""
    config = read_model_config(out)
    backbone = load_backbone(base, config["architectures"][0], torch.float32)
    loaded = AutoModelForSequenceClassification.from_pretrained(out).eval()
    head = own_head(out, config)
    assert head is not None
    weight, bias = head
    with torch.inference_mode():
        states = backbone.states(*padded(SEQUENCES), (2, 5))[-1]
        ours = states @ weight.T + (0 if bias is None else bias)
        theirs = torch.cat([loaded(torch.tensor([ids])).logits for ids in SEQUENCES])
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert loaded.config.id2label == {0: "no", 1: "yes"}
    assert classes_of(config) == ("no", "yes")


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_a_language_model(tmp_path: Path, family: str) -> None:
    base = make_checkpoint(tmp_path / "base", family)
    out = written(base, tmp_path / "out")
    check_as_in_transformers(base, out)
    assert (out / "backbone.safetensors").samefile(base / "model.safetensors")
    names = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert "lm_head.weight" not in names


def test_a_model_that_was_saved_without_a_head(tmp_path: Path) -> None:
    """Names have no prefix there; beside a head they need one."""
    whole = make_checkpoint(tmp_path / "whole")
    base = tmp_path / "base"
    LlamaModel.from_pretrained(whole).save_pretrained(base)
    (base / "modules.json").write_text("[]")
    assert all(not name.startswith("model.") for name in base_tensors(base))
    out = written(base, tmp_path / "out")
    check_as_in_transformers(base, out)
    assert not (out / "modules.json").exists(), "vLLM would take it for sentence embeddings"


def test_a_second_copy_in_another_form_is_left_behind(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", "Mistral")
    save_file({"layers.0.other": torch.zeros(1)}, base / "consolidated.safetensors")
    out = written(base, tmp_path / "out")
    check_as_in_transformers(base, out)
    assert not (out / "consolidated.safetensors").exists()


def test_bert(tmp_path: Path) -> None:
    base = tmp_path / "base"
    torch.manual_seed(0)
    BertModel(BertConfig(**BERT)).save_pretrained(base)
    check_as_in_transformers(base, written(base, tmp_path / "out"))


def test_bert_without_a_pooler_gets_the_same_one_every_time(tmp_path: Path) -> None:
    base = tmp_path / "base"
    BertModel(BertConfig(**BERT), add_pooling_layer=False).save_pretrained(base)
    check_as_in_transformers(base, written(base, tmp_path / "out"))


def test_heads_that_are_there(tmp_path: Path) -> None:
    base = make_classifier(tmp_path / "base", num_labels=2)
    config = read_model_config(base)
    head = own_head(base, config)
    assert head is not None
    torch.testing.assert_close(head[0], load_file(base / "model.safetensors")["score.weight"])
    assert head[1] is None
    assert "id2label" not in config, "Transformers leaves the default out"
    assert classes_of(config) == ("LABEL_0", "LABEL_1")
    assert (
        own_head(make_checkpoint(tmp_path / "language"), {"architectures": ["LlamaForCausalLM"]})
        is None
    )
    with pytest.raises(CheckpointError, match="calls itself a classifier and has no head"):
        own_head(tmp_path / "language", config)


@pytest.mark.parametrize(
    ("config", "softmax"),
    [
        ({}, True),
        ({"problem_type": "single_label_classification"}, True),
        ({"problem_type": "multi_label_classification"}, False),
        ({"problem_type": "regression"}, False),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, False),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}, False),
        (
            {"sbert_ce_default_activation_function": "torch.nn.modules.activation.Sigmoid"},
            True,
        ),
    ],
)
def test_answers_that_are_a_softmax(config: dict[str, Any], softmax: bool) -> None:
    """As vLLM itself has it."""
    activations = pytest.importorskip("vllm.model_executor.layers.pooler.activations")
    assert has_softmax(config) is softmax
    theirs = activations.get_act_fn(BertConfig(**config), static_num_labels=False)
    assert isinstance(theirs, activations.PoolerClassify) is softmax


def test_weights_that_are_missing(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    del weights["model.layers.3.mlp.up_proj.weight"]
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks layers\.3\.mlp\.up_proj\.weight"):
        load_backbone(base, "LlamaForSequenceClassification", torch.float32)


def test_a_family_that_is_not_supported() -> None:
    with pytest.raises(ConfigError, match=r"'OPTForCausalLM' cannot become a classifier.*Bert"):
        classifier_architecture({"architectures": ["OPTForCausalLM"]})


def test_what_lies_in_a_passing_folder_is_never_linked_symbolically(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passing, lasting = tmp_path / "work", tmp_path / "base"
    for folder in (passing, lasting):
        folder.mkdir()
        (folder / "file").write_text(folder.name)

    def no_hard_links(*_: object) -> None:
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_hard_links)
    link(passing / "file", tmp_path / "one", passing)
    link(lasting / "file", tmp_path / "other", passing)
    assert not (tmp_path / "one").is_symlink()
    assert (tmp_path / "other").is_symlink()
    (passing / "file").unlink()
    assert (tmp_path / "one").read_text() == "work"
