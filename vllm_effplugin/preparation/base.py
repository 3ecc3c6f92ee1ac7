"""The base model of a `prepare`: what is refused, loading it, text for it, its fingerprint."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import torch

from vllm_effplugin.config.checkpoint import base_tensors, read_model_config, stock_architecture
from vllm_effplugin.errors import CheckpointError, ConfigError, UnsupportedError
from vllm_effplugin.preparation import text as calibration
from vllm_effplugin.preparation.text import Calibration, TextShape

logger = logging.getLogger(__name__)


def check_base(model: Path, sequence_length: int) -> int:
    """Refuse what cannot be prepared; the number of layers otherwise.

    Raises:
        ConfigError: an efficient checkpoint, an unknown family, or sequences that are too long.
        CheckpointError: no model at `model`.
        UnsupportedError: quantised weights, or a window that the reference does not model.
    """
    config = read_model_config(model)
    stock_architecture(config)
    base_tensors(model)
    if config.get("efficiency") is not None:
        raise ConfigError(f"{model} is an efficient checkpoint already; prepare its base model")
    if config.get("quantization_config") is not None:
        raise UnsupportedError(f"{model} is quantised; prepare the unquantised model")
    limit = int(config.get("max_position_embeddings") or sequence_length)
    if sequence_length > limit:
        raise ConfigError(f"--sequence-length {sequence_length} exceeds the model's {limit}")
    # Qwen2 carries a window that only counts with `use_sliding_window`.
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if window is not None and window < sequence_length:
        raise UnsupportedError(
            f"--sequence-length {sequence_length} exceeds the model's attention window "
            f"of {window}, which the reference does not model"
        )
    return int(config["num_hidden_layers"])


def load_model(model: Path, dtype: torch.dtype | str = torch.float32) -> Any:
    """The checkpoint as a Hugging Face model; `auto` keeps its own dtype."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval().requires_grad_(False)


def fingerprint(model: Path, text: Path | None, request: dict[str, Any]) -> dict[str, Any]:
    """What a work directory's content depends on: arguments, model and text."""
    files = [*sorted(model.glob("*.safetensors")), model / "config.json"]
    stats = {file.name: (file.stat().st_size, file.stat().st_mtime_ns) for file in files}
    digest = None
    if text is not None and text.is_file():
        digest = hashlib.sha256(text.read_bytes()).hexdigest()
    return {"model": str(model.resolve()), "files": stats, "text": digest, "request": request}


def find_text(model: Path, text: Path | None, shape: TextShape, seed: int) -> Calibration:
    """Sequences of a file, or else written by the model.

    Raises:
        ConfigError: a text that is missing, malformed or too short.
        CheckpointError: a model without a tokenizer.
        UnsupportedError: when vLLM is missing or cannot run the model.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{model} has no usable tokenizer: {error}") from None
    if text is not None:
        return calibration.from_file(text, tokenizer, shape, seed)
    logger.warning(
        "generating %d tokens of text with the model",
        (shape.train + shape.held_out) * shape.sequence_length,
    )
    return calibration.generated(model, tokenizer, shape, seed)
