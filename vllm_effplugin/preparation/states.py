"""What heads are trained on: the states that they read, captured in one pass over the texts.

Shapes: `E` exits, `N` sequences, `d` hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from vllm_effplugin.preparation.backbone import Backbone, padded

TOKENS = 2048
"""Of a batch, padding included."""


@torch.inference_mode()
def capture(
    backbone: Backbone,
    sequences: Sequence[Sequence[int]],
    depths: Sequence[int],
    label: str = "capturing",
) -> Tensor:
    """`[E + 1, N, d]`, in the backbone's precision: what heads read at each depth and at the end.

    Without autocast, whose norms and sums are fp32: an engine's are not, and where a state hardly
    varies from text to text, rounding is as large as what a head goes by.

    Args:
        sequences: token ids.
        depths: layers before each exit.
        label: of the progress bar.
    """
    device = backbone.model.device
    size = (len(depths) + 1, len(sequences), backbone.hidden_size)
    found = torch.empty(size, dtype=backbone.model.dtype)
    with tqdm(total=len(sequences), desc=label, unit="text") as bar:
        for rows in length_batches(sequences):
            ids, lengths = padded([sequences[row] for row in rows])
            states = backbone.states(ids.to(device), lengths.to(device), depths)
            for exit, state in enumerate(states):
                found[exit, rows] = state.cpu()
            bar.update(len(rows))
    return found


def length_batches(sequences: Sequence[Sequence[int]], tokens: int = TOKENS) -> list[list[int]]:
    """Indices of sequences of about one length, at most `tokens` in a batch after padding."""
    batches: list[list[int]] = []
    for row in sorted(range(len(sequences)), key=lambda row: len(sequences[row])):
        longest = len(sequences[row])  # they are sorted
        if not batches or (len(batches[-1]) + 1) * longest > tokens:
            batches.append([])
        batches[-1].append(row)
    return batches
