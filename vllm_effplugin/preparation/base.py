"""The base model of a `prepare`: what is refused, loading it, text for it, its fingerprint."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vllm_effplugin.config.checkpoint import (
    base_tensors,
    check_checkpoint,
    extra_tensors,
    is_classifier,
    read_model_config,
    stock_architecture,
)
from vllm_effplugin.errors import CheckpointError, ConfigError, UnsupportedError
from vllm_effplugin.preparation import text as calibration
from vllm_effplugin.preparation.text import Calibration, TextShape
from vllm_effplugin.preparation.workdir import WorkDirectory

logger = logging.getLogger(__name__)

WORK_LAYOUT = 3
"""Of the files in a work directory; one of another layout is not resumed."""


def check_base(model: Path, sequence_length: int, beneath: Sequence[str] = ()) -> int:
    """Refuse what cannot be prepared; the number of layers otherwise.

    Args:
        beneath: techniques that the checkpoint may have already.

    Raises:
        ConfigError: an efficient checkpoint, an unknown family, or sequences that are too long.
        CheckpointError: no model at `model`.
        UnsupportedError: quantised weights, or a window that the reference does not model.
    """
    config = read_model_config(model)
    stock_architecture(config)
    if is_classifier(config):
        raise ConfigError(
            f"{model} is a classifier, which `effplugin prepare classify` is for; this needs a "
            "language model"
        )
    check_unprepared(model, config, "--sequence-length", sequence_length, beneath)
    return int(config["num_hidden_layers"])


def check_unprepared(
    model: Path,
    config: Mapping[str, Any],
    option: str,
    length: int,
    beneath: Sequence[str] = (),
) -> None:
    """Refuse what no preparation takes.

    Args:
        option: that sets the length of sequences, for messages.
        length: of sequences.
        beneath: techniques that the checkpoint may have already.

    Raises:
        ConfigError: an efficient checkpoint, or sequences that are too long.
        CheckpointError: no model at `model`.
        UnsupportedError: quantised weights, or a window that the reference does not model.
    """
    base_tensors(model)
    if config.get("efficiency") is not None:
        others = [name for name in check_checkpoint(model).techniques if name not in beneath]
        if others or not beneath:
            raise ConfigError(
                f"{model} is an efficient checkpoint already ({', '.join(others) or 'no technique'}"
                "); prepare its base model"
            )
    if config.get("quantization_config") is not None:
        raise UnsupportedError(f"{model} is quantised; prepare the unquantised model")
    limit = int(config.get("max_position_embeddings") or length)
    if length > limit:
        raise ConfigError(f"{option} {length} exceeds the model's {limit}")
    # Qwen2 carries a window that only counts with `use_sliding_window`.
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if window is not None and window < length:
        raise UnsupportedError(
            f"{option} {length} exceeds the model's attention window of {window}, which the "
            "reference does not model"
        )


def check_on_cpu(preparing: str, reason: str) -> None:
    """Refuse a machine where torch sees a GPU.

    Args:
        preparing: what is prepared; a clause's start, such as "an edge is prepared".
        reason: why the CPU matters; one clause.

    Raises:
        UnsupportedError: saying what to do instead.
    """
    if torch.cuda.is_available():
        raise UnsupportedError(
            f"{preparing} on CPUs only so far: do it on a CPU machine ({reason}), or, if vLLM here "
            "is its CPU build, set CUDA_VISIBLE_DEVICES="
        )


def stored_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """What a model's `config.json` says its weights are stored as."""
    return getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"))


def load_model(model: Path, dtype: torch.dtype | str = torch.float32) -> Any:
    """The checkpoint as a Hugging Face model; `auto` keeps its own dtype.

    With the tensors that a technique gave its layers; `take_apart` runs them as the technique says.
    """
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval().requires_grad_(False)
    own = loaded.state_dict()
    for name, tensor in extra_tensors(model).items():
        if name in own:  # else it is a part of the technique's
            own[name].copy_(tensor)
    return loaded


def fingerprint(model: Path, text: Path | None, request: dict[str, Any]) -> dict[str, Any]:
    """What a work directory's content depends on: arguments, model and text."""
    files = [
        *sorted(model.glob("*.safetensors")),
        model / "config.json",
        *sorted(model.glob("tokenizer*")),
        *sorted(model.glob("vocab*")),
    ]
    stats = {file.name: (file.stat().st_size, file.stat().st_mtime_ns) for file in files}
    digest = None
    if text is not None and text.is_file():
        digest = hashlib.sha256(text.read_bytes()).hexdigest()
    return {
        "layout": WORK_LAYOUT,
        "model": str(model.resolve()),
        "files": stats,
        "text": digest,
        "request": request,
    }


def load_tokenizer(model: Path) -> Any:
    """The checkpoint's tokenizer.

    Raises:
        CheckpointError: when there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{model} has no usable tokenizer: {error}") from None


def text_windows(
    model: Path, text: Path, length: int, max_tokens: int | None = None
) -> list[list[int]]:
    """Token ids of a text, cut into windows; a last window of a single token is dropped.

    Args:
        length: tokens per window.
        max_tokens: use the first so many tokens of the text.

    Raises:
        ConfigError: a text that cannot be read or is too short, or windows that are too long.
        CheckpointError: a model without a tokenizer.
    """
    content = calibration.read_text(text)
    limit = read_model_config(model).get("max_position_embeddings")
    if limit is not None and length > limit:
        raise ConfigError(f"windows of {length} tokens exceed the model's {limit}")
    tokenizer = load_tokenizer(model)
    ids = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"][:max_tokens]
    windows = [ids[start : start + length] for start in range(0, len(ids), length)]
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise ConfigError(f"--text {text} is shorter than two tokens")
    return windows


def find_text(
    model: Path, text: Path | None, shape: TextShape, seed: int, work: WorkDirectory
) -> Calibration:
    """Sequences of a file, or else written by the model; kept in the work directory.

    Raises:
        ConfigError: a text that is missing, malformed or too short.
        CheckpointError: a model without a tokenizer.
        UnsupportedError: when vLLM is missing or cannot run the model.
    """
    kept = work.tensors("text")
    if kept is not None:
        return Calibration(**kept)
    tokenizer = load_tokenizer(model)
    if text is not None:
        found = calibration.from_file(text, tokenizer, shape, seed)
    else:
        logger.warning(
            "generating %d tokens of text with the model",
            (shape.train + shape.held_out) * shape.sequence_length,
        )
        found = calibration.generated(model, tokenizer, shape, seed)
    work.save_tensors("text", vars(found))
    return found
