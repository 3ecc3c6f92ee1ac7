"""Teaching the backbone the task, so that early layers know it: LoRA under all heads at once.

The loss is that of JEI-DNN's warm-up, `CE_final + sum_l (E + 1 - l) CE_l`, normalised: the earlier
an exit, the heavier. The heads learn along; gates come later, on the tuned model's states.

Shapes: `B` sequences, `d` hidden size, `C` classes, `E` exits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from vllm_effplugin.preparation.backbone import Backbone, padded
from vllm_effplugin.preparation.lora import add_lora
from vllm_effplugin.preparation.precision import autocast
from vllm_effplugin.preparation.trainer import Trainer, TrainerSettings
from vllm_effplugin.techniques.joint_exit.training import head_logits, importance

SORTED_BATCHES = 50
"""Batches over which sequences are sorted by length, so that little is padded."""


class FineTuneSettings(TrainerSettings):
    """How to fine-tune."""

    epochs: float = Field(2.0, gt=0, description="Passes over the training data.")
    learning_rate: float = Field(5e-4, gt=0)
    batch: int = Field(32, ge=1)


class FineTuner(Trainer):
    """Fine-tunes a backbone in place.

    Args:
        backbone: its model gets LoRA adapters.
        depths: layers before each exit.
        sequences: token ids of the training texts.
        labels: `[N]`.
        classes: `C`.
        settings: how to train.
    """

    def __init__(
        self,
        backbone: Backbone,
        depths: Sequence[int],
        sequences: Sequence[Sequence[int]],
        labels: Tensor,
        classes: int,
        settings: FineTuneSettings,
    ) -> None:
        steps = math.ceil(settings.epochs * len(sequences) / settings.batch)
        super().__init__(settings, len(sequences), steps, "fine-tuning", "text")
        self._backbone, self._depths = backbone, tuple(depths)
        self._sequences, self._labels = sequences, labels
        self._lengths = torch.tensor([len(sequence) for sequence in sequences])
        torch.manual_seed(settings.seed)
        compute = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        self._peft: Any = add_lora(
            backbone.model.to(compute), targets=backbone.lora_targets, task=None
        )
        heads = len(self._depths) + 1
        device = backbone.model.device
        self.weight = nn.Parameter(torch.zeros(heads, classes, backbone.hidden_size, device=device))
        self.bias = nn.Parameter(torch.zeros(heads, classes, device=device))
        self._importance = importance(heads).to(device)
        self.optimise(
            {n: value for n, value in backbone.model.named_parameters() if value.requires_grad}
            | {"head.weight": self.weight, "head.bias": self.bias}
        )

    def objective(self, rows: Tensor) -> tuple[Tensor, float]:
        """The weighted loss, and the last head's share of it in nats."""
        device = self.weight.device
        ids, lengths = padded([self._sequences[row] for row in rows.tolist()])
        with autocast(device, self._training.precision):
            states = self._backbone.states(ids.to(device), lengths.to(device), self._depths)
        logits = head_logits(self.weight, self.bias, torch.stack(states).float())
        labels = self._labels[rows].to(device)
        losses = torch.stack([functional.cross_entropy(part, labels) for part in logits])
        return (self._importance * losses).sum(), float(losses[-1].detach())

    def _order(self, generator: torch.Generator) -> Tensor:
        """Batches of texts of about one length, in random order."""
        order, size = super()._order(generator), self._training.batch
        parts = [
            part[self._lengths[part].argsort(stable=True)]
            for part in order.split(size * SORTED_BATCHES)
        ]
        whole = torch.cat(parts)
        batches = list(whole[: len(whole) // size * size].split(size))
        mixed = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        return torch.cat([*mixed, whole[len(whole) // size * size :]])

    def finish(self) -> Backbone:
        """The tuned backbone, adapters merged. To be called once."""
        self._peft.merge_and_unload()
        return self._backbone
