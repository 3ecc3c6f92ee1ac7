"""What a multiplexed classifier says, and how far that depends on the company. Replayed in PyTorch.

Shapes: `N` texts, `C` classes, `K` groupings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from vllm_effplugin.preparation.backbone import Backbone
from vllm_effplugin.preparation.precision import Precision, autocast
from vllm_effplugin.techniques.multiplex.features import Lower
from vllm_effplugin.techniques.multiplex.layers import Multiplexer
from vllm_effplugin.techniques.multiplex.training import composite_states

GROUPINGS = 10
WINDOW = 64
"""Texts that are in the queue at once: partners are the most similar in length among them."""

TOKENS = 4096
"""Of a batch, padding included."""


@dataclass(frozen=True)
class Company:
    """Accuracy over groupings.

    Attributes:
        accuracy: mean over the groupings.
        spread: standard deviation over them.
        flips: how often two groupings give a text different classes.
        difference: accuracy less that of the sequences running alone, paired over the texts.
        difference_se: its standard error over texts.
    """

    accuracy: float
    spread: float
    flips: float
    difference: float
    difference_se: float


def company(answers: np.ndarray, alone: np.ndarray, labels: np.ndarray) -> Company:
    """What groupings give.

    Args:
        answers: `[K, N]` classes under each grouping.
        alone: `[N]` classes of the sequences running alone.
        labels: `[N]`.
    """
    right = answers == labels
    paired = right.mean(0) - (alone == labels)
    counts = np.stack([(answers == c).sum(0) for c in range(int(answers.max()) + 1)])
    k = len(answers)
    same = (counts * (counts - 1)).sum(0) / (k * (k - 1))
    return Company(
        accuracy=float(right.mean()),
        spread=float(right.mean(1).std(ddof=1)),
        flips=float(1 - same.mean()),
        difference=float(paired.mean()),
        difference_se=float(paired.std(ddof=1) / np.sqrt(len(paired))),
    )


def random_groups(lengths: Tensor, size: int, seed: int) -> Tensor:
    """`[G, N]` a random grouping of nearly all texts, partners similar in length.

    Args:
        lengths: `[N]`.
        size: of a group.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(lengths), generator=generator)
    window = WINDOW // size * size
    groups = []
    for part in order.split(window):
        part = part[: len(part) // size * size]
        part = part[lengths[part].argsort(stable=True)].view(-1, size)
        groups.append(part.gather(1, torch.rand(part.shape, generator=generator).argsort(-1)))
    return torch.cat(groups)


@torch.inference_mode()
def grouped_probabilities(
    backbone: Backbone,
    layer: Multiplexer,
    lower: Lower,
    groups: Tensor,
    head: tuple[Tensor, Tensor | None],
    precision: Precision,
) -> Tensor:
    """`[N, C]` what texts get in a grouping; NaN for those in no group.

    Args:
        groups: `[G, N]`.
        head: weight and bias of the classifier.
    """
    device = backbone.model.device
    weight, bias = head
    found = torch.full((len(lower.lengths), len(weight)), torch.nan)
    longest = lower.lengths[groups].amax(1)
    for part in _batches(longest.tolist()):
        members = groups[part]
        hidden, lengths = lower.padded(members)
        with autocast(device, precision):
            states = composite_states(
                backbone, layer, hidden.to(device), lengths.to(device), lower.depth
            )
            read = backbone.pooled(states.to(backbone.model.dtype))
        logits = torch.nn.functional.linear(
            read.float(), weight.float().to(device), None if bias is None else bias.float()
        )
        found[members] = logits.softmax(-1).cpu()
    return found


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not batches or (len(batches[-1]) + 1) * lengths[row] > TOKENS:
            batches.append([])
        batches[-1].append(row)
    return batches


def in_company(
    backbone: Backbone,
    layer: Multiplexer,
    lower: Lower,
    labels: Tensor,
    alone: Tensor,
    head: tuple[Tensor, Tensor | None],
    precision: Precision,
    groupings: int = GROUPINGS,
) -> Company:
    """Accuracy over random groupings of the same texts.

    Args:
        labels: `[N]`.
        alone: `[N, C]` probabilities of the texts running alone, which those left over keep.
    """
    answers = []
    for seed in tqdm(range(groupings), desc=f"groupings of {layer.size}", leave=False):
        groups = random_groups(lower.lengths, layer.size, seed)
        p = grouped_probabilities(backbone, layer, lower, groups, head, precision)
        answers.append(torch.where(p.isnan(), alone, p).argmax(-1).numpy())
    return company(np.stack(answers), alone.argmax(-1).numpy(), labels.numpy())
