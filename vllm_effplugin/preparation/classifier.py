"""A stock classifier's checkpoint: the base model, and a head behind its last layer.

It is what a checkpoint with exits falls back to, and what stock vLLM serves as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vllm_effplugin.config import CLASSIFIERS, EfficiencyConfig, parse_efficiency
from vllm_effplugin.config.checkpoint import (
    EXTRA_FILE,
    EXTRA_FOLDER,
    PROVENANCE,
    is_classifier,
    link,
    read_model_config,
    staged_directory,
    stock_architecture,
    stored_tensors,
)
from vllm_effplugin.errors import CheckpointError, ConfigError, UnsupportedError
from vllm_effplugin.offline import require_vllm
from vllm_effplugin.preparation.backbone import Backbone, load_backbone
from vllm_effplugin.preparation.base import check_on_cpu, check_unprepared, stored_dtype

INDEX = "model.safetensors.index.json"
BACKBONE_FILE = "backbone.safetensors"
HEAD_FILE = "score.safetensors"
_LANGUAGE_MODEL = ("ForCausalLM", "ForMaskedLM", "Model")
_LEFT_BEHIND = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")
"""Files that would make vLLM take the model for one of sentence embeddings."""

_PREFIX = "model."
_HEADS = ("lm_head.", "score.")


def classifier_architecture(config: dict[str, Any]) -> str:
    """The stock classifier that a model is or becomes.

    Raises:
        ConfigError: for a family that is not supported, naming those that are.
    """
    name = (config.get("architectures") or ["(none)"])[0]
    if is_classifier(config):
        return stock_architecture(config)
    for suffix in _LANGUAGE_MODEL:
        classifier = f"{name.removesuffix(suffix)}ForSequenceClassification"
        if name.endswith(suffix) and classifier in CLASSIFIERS:
            return classifier
    families = ", ".join(key.removesuffix("ForSequenceClassification") for key in CLASSIFIERS)
    raise ConfigError(f"architecture {name!r} cannot become a classifier; families are {families}")


def check_classifiable(
    model: Path, config: Mapping[str, Any], max_length: int, *, with_exits: bool = False
) -> None:
    """Refuse what cannot become an efficient classifier, or not here.

    Args:
        max_length: of a text, in tokens.
        with_exits: whether `prepare classify` may have made it.

    Raises:
        ConfigError: an efficient checkpoint, or texts that are too long.
        CheckpointError: no model at `model`.
        UnsupportedError: vLLM is missing, or a model that exits and merging do not support.
    """
    require_vllm()
    given = dict(config)
    efficiency = parse_efficiency(given.get("efficiency"))
    if with_exits and efficiency == EfficiencyConfig(joint_exit=efficiency.joint_exit):
        given.pop("efficiency", None)
    check_unprepared(model, given, "--max-length", max_length)
    if config.get("is_causal") is False and config["model_type"] != "bert":
        raise UnsupportedError(
            f"{model} attends both ways (`is_causal`: false), which is not supported of a decoder"
        )
    if len(set(config.get("layer_types") or ())) > 1:
        raise UnsupportedError(
            f"{model} mixes kinds of attention layers, which exits and merging do not support"
        )
    check_on_cpu("exits and merging are prepared", "its speed decides what pays")


def own_head(model: Path, config: dict[str, Any]) -> tuple[Tensor, Tensor | None] | None:
    """Weight `[C, d]` and bias `[C]` of the head that a checkpoint has already; None without.

    Raises:
        CheckpointError: a classifier whose head is not there.
    """
    if not is_classifier(config):
        return None
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names = set(tensors.keys())
            for name in ("score", "classifier"):
                if f"{name}.weight" in names:
                    bias = f"{name}.bias"
                    return (
                        tensors.get_tensor(f"{name}.weight").float(),
                        tensors.get_tensor(bias).float() if bias in names else None,
                    )
    raise CheckpointError(f"{model} calls itself a classifier and has no head")


def has_softmax(config: dict[str, Any]) -> bool:
    """Whether a classifier's answers are a softmax over its classes, as vLLM serves it."""
    kind = config.get("problem_type")
    if kind is not None:
        return bool(kind == "single_label_classification")
    function = (config.get("sentence_transformers") or {}).get("activation_fn")
    function = function or config.get("sbert_ce_default_activation_function")
    # vLLM takes a sigmoid over several classes for a softmax.
    return function is None or function.rpartition(".")[2] in ("Sigmoid", "Softmax")


def classes_of(config: dict[str, Any]) -> tuple[str, ...]:
    """Names of a classifier's classes; Transformers leaves out the names of two unnamed ones."""
    names = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    return tuple(str(names[str(place)]) for place in range(len(names)))


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
    if backbone is None and not _has_prefix(model):
        dtype = stored_dtype(read_model_config(model))
        backbone = load_backbone(model, architecture, dtype)
    files: dict[str, str] = {}
    if backbone is not None:
        tensors = _tensors(backbone)
        save_file(tensors, out / BACKBONE_FILE, {"format": "pt"})
        files = dict.fromkeys(tensors, BACKBONE_FILE)
    else:
        for file in _weight_files(model):
            names = [name for name in stored_tensors(file) if not name.startswith(_HEADS)]
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


def write_stock(
    stock: Path,
    out: Path,
    provenance: Mapping[str, Any],
    files: Mapping[str, bytes],
    passing: Path,
    *,
    overwrite: bool,
) -> None:
    """Write a classifier as it is, where a technique would give nothing.

    Args:
        files: of the `efficiency` folder, such as plots.
        passing: a folder that will not last.
    """
    with staged_directory(out, overwrite=overwrite) as staging:
        for source in stock.iterdir():
            if source.is_file() and source.name != PROVENANCE:
                link(source, staging / source.name, passing)
        (staging / EXTRA_FOLDER).mkdir()
        tensors = stock / EXTRA_FOLDER / EXTRA_FILE  # of another technique that it has
        if tensors.is_file():
            link(tensors, staging / EXTRA_FOLDER / EXTRA_FILE, passing)
        for name, content in files.items():
            (staging / EXTRA_FOLDER / name).write_bytes(content)
        text = json.dumps(provenance, indent=2) + "\n"
        (staging / PROVENANCE).write_text(text, encoding="utf-8")


def _weight_files(model: Path) -> list[Path]:
    """Those that hold the model: of its index if there is one, and no copy in another form."""
    index = model / INDEX
    if index.is_file():
        return [
            model / name
            for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))
        ]
    return [f for f in sorted(model.glob("*.safetensors")) if not f.name.startswith("consolidated")]


def _has_prefix(model: Path) -> bool:
    """Whether tensors are named as beside a head; models that were saved without one have none."""
    names = [name for file in _weight_files(model) for name in stored_tensors(file)]
    return all(name.startswith((_PREFIX, *_HEADS)) for name in names)


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
