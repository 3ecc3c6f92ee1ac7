"""LoRA on a model's layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LORA_RANK = 32
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def add_lora(
    model: Any,
    layers: Sequence[int] | None = None,
    targets: Sequence[str] | None = None,
    task: str | None = "CAUSAL_LM",
) -> Any:
    """The PEFT model around a Hugging Face model; its LoRA weights are fp32 also on a bf16 one.

    Args:
        layers: which layers get adapters; all of them by default.
        targets: names of their linear modules; a decoder's by default.
        task: PEFT's name of what the model does.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=LORA_RANK,
        lora_alpha=LORA_RANK,
        lora_dropout=0.0,
        target_modules=list(targets or LORA_TARGETS),
        layers_to_transform=None if layers is None else list(layers),
        layers_pattern=None if layers is None else "layers",
        task_type=task,
    )
    return get_peft_model(model, config)
