"""From gate values to where a sequence leaves: JEI-DNN (arXiv 2310.09163, section 4).

Shapes: `E` exits, `B` sequences, `C` classes. The last head is that of the full model; it has no
gate.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAVES = 0.5
"""Conditional probability of leaving from which a sequence leaves."""

_TINY = 1e-9


def measures(probabilities: Tensor) -> Tensor:
    """What a gate sees: `[..., C]` class probabilities to `[..., 4]` numbers.

    The largest, the entropy in nats, the distance between the two largest, and the entropy of the
    squared probabilities, renormalised.
    """
    top = probabilities.topk(2, dim=-1).values
    squared = probabilities.square()
    squared = squared / squared.sum(-1, keepdim=True)
    return torch.stack(
        [top[..., 0], entropy(probabilities), top[..., 0] - top[..., 1], entropy(squared)], dim=-1
    )


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy in nats over the last dimension."""
    return -(probabilities * probabilities.clamp_min(_TINY).log()).sum(-1)


def exit_distribution(gates: Tensor) -> Tensor:
    """The probability of each exit, `[E + 1, B]`, from gate values in `[0, 1]`, `[E, B]`.

    `P_l = max(0, min(g_l, 1 - sum_{j<l} g_j))`; what remains goes to the full model.
    """
    before = gates.cumsum(0) - gates
    taken = torch.minimum(gates, 1 - before).clamp_min(0)
    return torch.cat([taken, (1 - taken.sum(0, keepdim=True)).clamp_min(0)])


class Inference:
    """Decides for a batch of sequences, exit after exit, where they leave.

    `c_l = clip(P_l / prod_{j<l} (1 - c_j), 0, 1)`, and a sequence leaves at the first exit with
    `c_l >= 0.5`. Until then `prod (1 - c_j)` is `1 - sum g_j`, so that where `P_l` would be cut
    below `g_l`, `c_l` is 1 either way: `g_l` serves for `P_l`. The state is that of the sequences
    which are still there.

    Args:
        count: `B`.
        like: a tensor whose type and device the state has.
    """

    def __init__(self, count: int, like: Tensor) -> None:
        self._stays = like.new_ones(count)

    def leaves(self, gates: Tensor, asked: Tensor | slice = slice(None)) -> Tensor:
        """Whether each sequence leaves at the next exit.

        Args:
            gates: `[n]` gate values of that exit.
            asked: indices of their sequences; the others stay.
        """
        stays = self._stays[asked]
        conditional = (gates / stays.clamp_min(_TINY)).clamp(0, 1)
        self._stays[asked] = stays * (1 - conditional)
        return conditional >= LEAVES


def exits_taken(gates: Tensor) -> Tensor:
    """`[B]` the exit at which each sequence leaves, `E` for none; from `[E, B]` gate values."""
    inference = Inference(gates.shape[1], gates)
    leaves = torch.stack([inference.leaves(gate) for gate in gates])
    first = leaves.int().argmax(0)
    return torch.where(leaves.any(0), first, len(gates))
