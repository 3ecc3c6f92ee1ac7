"""Training multiplexers under a frozen classifier.

`CE + lambda InfoNCE + L_cos` (RevMUX, arXiv 2410.04519, section 3.4) on what each member's head
reads: InfoNCE pulls it to what the head reads of the same sequence when that runs alone, among
those of the batch; `L_cos` pulls to the same and pushes away from those of the partners with other
labels, which the paper leaves open.

Shapes: `B` sequences of a step, `N` of a composite, `G = B / N` composites, `S` positions, `d`
hidden size, `C` classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from vllm_effplugin.preparation.backbone import Backbone
from vllm_effplugin.preparation.precision import autocast
from vllm_effplugin.preparation.trainer import Trainer, TrainerSettings
from vllm_effplugin.techniques.multiplex.features import Lower
from vllm_effplugin.techniques.multiplex.layers import Multiplexer

SORTED = 8
"""Batches over which sequences are sorted by length, so that partners have similar ones, as the
scheduler sees to."""


class MultiplexSettings(TrainerSettings):
    """How to train. The paper's rate, 2e-5, is for many more steps."""

    epochs: float = Field(4.0, gt=0, description="Passes over the training texts.")
    learning_rate: float = Field(1e-3, gt=0)
    batch: int = Field(32, ge=2, description="Sequences per step.")
    contrast: float = Field(0.5, ge=0, description="Weight of InfoNCE.")
    cosine: float = Field(1.0, ge=0, description="Weight of the cosine loss.")
    temperature: float = Field(0.05, gt=0, description="Of InfoNCE.")


def info_nce(states: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of finding one's own teacher among those of the batch, by cosine.

    Args:
        states, teacher: `[B, d]`.
    """
    similarity = functional.normalize(states, dim=-1) @ functional.normalize(teacher, dim=-1).T
    return functional.cross_entropy(
        similarity / temperature, torch.arange(len(states), device=states.device)
    )


def cosine_loss(states: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """`1 - cos` to one's own teacher, and `max(0, cos)` to partners' with another label.

    Args:
        states, teacher: `[G, N, d]`.
        labels: `[G, N]`.
    """
    cosine = functional.normalize(states, dim=-1) @ functional.normalize(teacher, dim=-1).mT
    own = torch.eye(labels.shape[1], dtype=torch.bool, device=labels.device)
    foreign = labels[:, :, None] != labels[:, None, :]
    pushed = torch.where(foreign, cosine.clamp_min(0), 0.0).sum() / foreign.sum().clamp_min(1)
    return (1 - cosine[:, own]).mean() + pushed


def composite_states(
    backbone: Backbone, layer: Multiplexer, hidden: Tensor, lengths: Tensor, depth: int
) -> Tensor:
    """What each member's head would read but for the pooler, `[G, N, d]`.

    Args:
        hidden: `[G, N, S, d]` behind `depth` layers, zeros where a member has ended.
        lengths: `[G, N]`.
    """
    groups, size, positions, _ = hidden.shape
    present = torch.arange(positions, device=hidden.device) < lengths[..., None]
    merged = layer.merge(
        hidden.float().transpose(0, 1).flatten(1, 2), present.transpose(0, 1).flatten(1, 2)
    ).unflatten(0, (groups, positions))
    # The multiplexers are trained in fp32, the backbone is what it is.
    states = backbone.above(merged.to(backbone.model.dtype), lengths.amax(1), depth)
    rows = torch.arange(groups, device=hidden.device)[:, None].expand(groups, size)
    return layer.answers(states[rows, backbone.places(lengths)].float())


class MultiplexTrainer(Trainer):
    """Trains multiplexers of one depth, of several sizes in turn.

    Args:
        backbone: frozen.
        layers: to train, one per size.
        lower: the training texts' hidden states behind the layers that each runs alone.
        teacher: `[N, d]` what the head reads of each text alone.
        labels: `[N]`.
        head: weight `[C, d]` and bias `[C]` of the classifier.
        settings: how to train.
    """

    def __init__(
        self,
        backbone: Backbone,
        layers: Sequence[Multiplexer],
        lower: Lower,
        teacher: Tensor,
        labels: Tensor,
        head: tuple[Tensor, Tensor | None],
        settings: MultiplexSettings,
        label: str = "multiplexers",
    ) -> None:
        steps = math.ceil(settings.epochs * len(labels) / settings.batch)
        super().__init__(settings, len(labels), steps, label, "text")
        self._settings, self._backbone, self._layers = settings, backbone, list(layers)
        self._lower, self._teacher, self._labels = lower, teacher, labels
        device = backbone.model.device
        weight, bias = head
        self._weight = weight.float().to(device)
        self._bias = None if bias is None else bias.float().to(device)
        torch.manual_seed(settings.seed)
        for layer in self._layers:
            layer.float().to(device).train()
        self.optimise(
            {
                f"{layer.size}.{name}": value
                for layer in self._layers
                for name, value in layer.named_parameters()
            }
        )

    def objective(self, rows: Tensor) -> tuple[Tensor, float]:
        """The loss of one size, and the share of it that is cross-entropy, in nats."""
        settings, device = self._settings, self._weight.device
        # Drawn anew, and the same when training goes on from here.
        torch.manual_seed(settings.seed + self.step)
        layer = self._layers[self.step % len(self._layers)]
        if len(rows) < layer.size:  # the last batch
            rows = torch.arange(len(self._labels))
        count = min(len(rows), self._training.batch) // layer.size * layer.size
        members = rows[torch.randperm(len(rows))[:count]]
        members = members[self._lower.lengths[members].argsort(stable=True)].view(-1, layer.size)
        slots = torch.rand(members.shape).argsort(-1)
        members = members.gather(1, slots)
        hidden, lengths = self._lower.padded(members)
        with autocast(device, settings.precision):
            states = composite_states(
                self._backbone, layer, hidden.to(device), lengths.to(device), self._lower.depth
            )
            read = self._backbone.pooled(states.to(self._backbone.model.dtype)).float()
        labels = self._labels[members].to(device)
        teacher = self._teacher[members].to(device).float()
        logits = functional.linear(read, self._weight, self._bias)
        entropy = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss = entropy + settings.contrast * info_nce(
            read.flatten(0, 1), teacher.flatten(0, 1), settings.temperature
        )
        loss = loss + settings.cosine * cosine_loss(read, teacher, labels)
        return loss, float(entropy.detach())

    def _order(self, generator: torch.Generator) -> Tensor:
        """Batches of texts of about one length, in random order."""
        order, size = super()._order(generator), self._training.batch
        parts = [
            part[self._lower.lengths[part].argsort(stable=True)]
            for part in order.split(size * SORTED)
        ]
        whole = torch.cat(parts)
        batches = list(whole[: len(whole) // size * size].split(size))
        mixed = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        return torch.cat([*mixed, whole[len(whole) // size * size :]])

    def finish(self) -> nn.ModuleDict:
        """The trained multiplexers, by size."""
        return nn.ModuleDict({str(layer.size): layer.eval() for layer in self._layers})
