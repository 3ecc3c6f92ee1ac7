"""A stock classifier's checkpoint: the base model, and a head behind its last layer.

It is what a checkpoint with exits falls back to, and what stock vLLM serves as it is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vllm_effplugin.config import CLASSIFIERS
from vllm_effplugin.config.checkpoint import link, read_model_config, stored_tensors
from vllm_effplugin.errors import ConfigError
from vllm_effplugin.preparation.backbone import Backbone, load_backbone

INDEX = "model.safetensors.index.json"
BACKBONE_FILE = "backbone.safetensors"
HEAD_FILE = "score.safetensors"
_LANGUAGE_MODEL = ("ForCausalLM", "ForMaskedLM", "Model")
_LEFT_BEHIND = ("modules.json",)
"""Files that would make vLLM take the model for one of sentence embeddings."""


def classifier_architecture(config: dict[str, Any]) -> str:
    """The stock classifier that a model is or becomes.

    Raises:
        ConfigError: for a family that is not supported, naming those that are.
    """
    name = (config.get("architectures") or ["(none)"])[0]
    if name in CLASSIFIERS:
        return name
    for suffix in _LANGUAGE_MODEL:
        classifier = f"{name.removesuffix(suffix)}ForSequenceClassification"
        if name.endswith(suffix) and classifier in CLASSIFIERS:
            return classifier
    families = ", ".join(key.removesuffix("ForSequenceClassification") for key in CLASSIFIERS)
    raise ConfigError(f"architecture {name!r} cannot become a classifier; families are {families}")


def own_head(model: Path, config: dict[str, Any]) -> tuple[Tensor, Tensor | None] | None:
    """Weight `[C, d]` and bias `[C]` of the head that a checkpoint has already; None without."""
    if (config.get("architectures") or [""])[0] not in CLASSIFIERS:
        return None
    for file in sorted(model.glob("*.safetensors")):
        names = stored_tensors(file)
        for name in ("score", "classifier"):
            if f"{name}.weight" in names:
                tensors = load_file(file)
                return tensors[f"{name}.weight"].float(), _float(tensors.get(f"{name}.bias"))
    raise ConfigError(f"{model} calls itself a classifier and has no head")


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()


def classes_of(config: dict[str, Any]) -> tuple[str, ...] | None:
    """Names of the classes that a classifier has already."""
    if (config.get("architectures") or [""])[0] not in CLASSIFIERS or not config.get("id2label"):
        return None
    names = config["id2label"]
    return tuple(str(names[str(i)] if str(i) in names else names[i]) for i in range(len(names)))


def write_classifier(
    model: Path,
    out: Path,
    architecture: str,
    classes: Sequence[str],
    weight: Tensor,
    bias: Tensor | None,
    backbone: Backbone | None = None,
) -> None:
    """Write a stock classifier.

    Args:
        model: the base model's directory, whose weights are linked.
        out: an empty directory.
        weight, bias: of the head. `score` has no bias in Transformers.
        backbone: weights to write instead of the base model's.
    """
    for source in model.iterdir():
        if (
            source.is_file()
            and source.suffix != ".safetensors"
            and source.name
            not in (
                INDEX,
                *_LEFT_BEHIND,
            )
        ):
            link(source, out / source.name)
    _write_config(model, out, architecture, classes)
    if architecture.startswith("Bert"):
        _write_bert(
            out, weight, bias, backbone or load_backbone(model, architecture, torch.float32)
        )
        return
    files: dict[str, str] = {}
    if backbone is not None:
        tensors = _tensors(backbone)
        save_file(tensors, out / BACKBONE_FILE, {"format": "pt"})
        files = dict.fromkeys(tensors, BACKBONE_FILE)
    else:
        for file in sorted(model.glob("*.safetensors")):
            names = [n for n in stored_tensors(file) if not n.startswith(("lm_head.", "score."))]
            if names:
                # Not as `model.safetensors`, with which Transformers would ignore the index.
                target = BACKBONE_FILE if file.name == "model.safetensors" else file.name
                link(file, out / target)
                files |= dict.fromkeys(names, target)
    head = {"score.weight": weight.contiguous()}
    if bias is not None:
        head["score.bias"] = bias.contiguous()
    save_file(head, out / HEAD_FILE, {"format": "pt"})
    files |= dict.fromkeys(head, HEAD_FILE)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_config(model: Path, out: Path, architecture: str, classes: Sequence[str]) -> None:
    config = read_model_config(model)
    config["architectures"] = [architecture]
    config["id2label"] = {str(i): name for i, name in enumerate(classes)}
    config["label2id"] = {name: i for i, name in enumerate(classes)}
    config["problem_type"] = "single_label_classification"
    path = out / "config.json"
    path.unlink()
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_bert(out: Path, weight: Tensor, bias: Tensor | None, backbone: Backbone) -> None:
    tensors = _tensors(backbone)
    tensors["classifier.weight"] = weight.contiguous()
    tensors["classifier.bias"] = weight.new_zeros(len(weight)) if bias is None else bias
    save_file(tensors, out / "model.safetensors", {"format": "pt"})


def _tensors(backbone: Backbone) -> dict[str, Tensor]:
    """Of a backbone, named as in a classifier's checkpoint."""
    return {
        f"{backbone.prefix}{name}": tensor.contiguous()
        for name, tensor in backbone.model.state_dict().items()
    }
