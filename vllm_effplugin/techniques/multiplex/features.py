"""What multiplexers are trained on: hidden states behind the layers that sequences run alone.

Shapes: `N` texts, `T` their tokens, `S` positions, `d` hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from vllm_effplugin.preparation.backbone import Backbone, padded
from vllm_effplugin.preparation.precision import Precision, autocast
from vllm_effplugin.preparation.states import length_batches


class Lower:
    """Hidden states of texts behind some layers.

    Args:
        states: `[T, d]`, text by text.
        lengths: `[N]`.
        depth: layers before them.
    """

    def __init__(self, states: Tensor, lengths: Tensor, depth: int) -> None:
        self.states, self.lengths, self.depth = states, lengths, depth
        self._starts = lengths.cumsum(0) - lengths

    def padded(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Those of some texts, `[..., S, d]` with zeros behind each, and their lengths.

        Args:
            rows: `[...]`.
        """
        lengths = self.lengths[rows]
        offsets = torch.arange(int(lengths.max()))
        inside = offsets < lengths[..., None]
        tokens = (self._starts[rows][..., None] + offsets).where(inside, 0)
        return self.states[tokens].masked_fill(~inside[..., None], 0), lengths


@torch.no_grad()
def capture_lower(
    backbone: Backbone,
    sequences: Sequence[Sequence[int]],
    depth: int,
    precision: Precision,
    label: str = "capturing",
) -> Lower:
    """The states of all texts, in bf16.

    Args:
        sequences: token ids.
        depth: layers that run.
        precision: of matrix products.
        label: of the progress bar.
    """
    device = backbone.model.device
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    starts = lengths.cumsum(0) - lengths
    states = torch.empty(int(lengths.sum()), backbone.hidden_size, dtype=torch.bfloat16)
    with tqdm(total=len(sequences), desc=label, unit="text") as bar:
        for rows in length_batches(sequences):
            ids, own = padded([sequences[row] for row in rows])
            with autocast(device, precision):
                hidden = backbone.below(ids.to(device), own.to(device), depth)
            for row, each in zip(rows, hidden.to("cpu", torch.bfloat16), strict=True):
                start, length = int(starts[row]), len(sequences[row])
                states[start : start + length] = each[:length]
            bar.update(len(rows))
    return Lower(states, lengths, depth)
