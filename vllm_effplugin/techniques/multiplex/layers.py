"""The multiplexer: `N` sequences into one composite, and back.

RevMUX (arXiv 2410.04519), section 3. Shapes: `N` sequences, `T` positions, `d` hidden size,
`w = d // N` the width of a slot; where `N` does not divide `d`, the last `d - N w` entries of a
composite are zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Mixing = Literal["reversible", "none", "released"]
"""How slots meet. `reversible` is the method. `none` is its baseline of plain adapters.
`released` is what the authors' code does for two sequences, whose way back is not the inverse of
the way in: channels are interleaved, and sliced as blocks, in reverse order."""

_TINY = 1e-6


class Coupling(nn.ModuleList):
    """`F_i`: `w -> d -> w`, with a ReLU behind each.

    Args:
        dropout: in training, behind the first.
    """

    def __init__(self, width: int, hidden_size: int, dropout: float = 0.1) -> None:
        super().__init__([nn.Linear(width, hidden_size), nn.Linear(hidden_size, width)])
        self._dropout = dropout

    def forward(self, z: Tensor) -> Tensor:
        """The same shape `[..., w]`."""
        inner, outer = self
        hidden = functional.dropout(inner(z).relu(), self._dropout, self.training)
        return outer(hidden).relu()


def mix(couplings: Sequence[nn.Module], z: Sequence[Tensor]) -> list[Tensor]:
    """`y_0 = z_{N-1} + F_0(z_{N-2})`, `y_i = z_{N-1-i} + F_i(y_{i-1})`.

    Args:
        z: `N` tensors `[..., w]`.
    """
    last = len(z) - 1
    y = [z[last] + couplings[0](z[last - 1])]
    for i in range(1, len(z)):
        y.append(z[last - i] + couplings[i](y[i - 1]))
    return y


def unmix(couplings: Sequence[nn.Module], o: Sequence[Tensor]) -> list[Tensor]:
    """The inverse: `z_{N-1-i} = o_i - F_i(o_{i-1})`, then `z_{N-1} = o_0 - F_0(z_{N-2})`.

    Args:
        o: `N` tensors `[..., w]`.
    """
    last = len(o) - 1
    z = [o[0]] * len(o)
    for i in range(1, len(o)):
        z[last - i] = o[i] - couplings[i](o[i - 1])
    z[last] = o[0] - couplings[0](z[last - 1])
    return z


class Multiplexer(nn.Module):
    """Merges `N` sequences, and gives each its own answer of what came out.

    Hidden states are normalised before they are projected down, and a composite gets the mean size
    of its members': sizes differ by orders of magnitude between positions, and frozen layers expect
    those that they were trained on. The paper does not say how it deals with that.

    Args:
        hidden_size: `d`.
        size: `N`.
        mixing: how slots meet.
    """

    def __init__(self, hidden_size: int, size: int, mixing: Mixing = "reversible") -> None:
        super().__init__()
        if mixing == "released" and size != 2:
            raise ValueError("the released layout is for two sequences")
        self.hidden_size, self.size, self.mixing = hidden_size, size, mixing
        self.width = hidden_size // size
        wide = 3 * hidden_size
        self.down = nn.Linear(hidden_size, self.width)
        self.couplings = nn.ModuleList(Coupling(self.width, hidden_size) for _ in range(size))
        self.up = nn.ModuleList(
            [nn.Linear(self.width, wide), nn.Linear(wide, wide), nn.Linear(wide, hidden_size)]
        )

    @torch.no_grad()
    def initialise(self) -> None:
        """Orthonormal rows on the way down, small couplings, and up again what came down."""
        nn.init.orthogonal_(self.down.weight)
        nn.init.zeros_(self.down.bias)
        for coupling in self.couplings:
            coupling[1].weight.mul_(0.1)

    def merge(self, members: Tensor, present: Tensor) -> Tensor:
        """Composites `[T, d]` of members `[N, T, d]`.

        Args:
            members: slot by slot; zeros where `present` is false.
            present: `[N, T]` whether a member reaches a position.
        """
        precise = torch.promote_types(members.dtype, torch.float32)
        sizes = torch.linalg.vector_norm(members, dim=-1, keepdim=True, dtype=precise)
        sizes = sizes * self.hidden_size**-0.5
        z = self.down(members / sizes.clamp_min(_TINY).to(members.dtype))
        count = present.sum(0).clamp_min(1)[:, None]
        scale = (sizes.sum(0) / count).to(members.dtype)
        return self._joined(z.unbind(0)) * scale

    def _joined(self, z: Sequence[Tensor]) -> Tensor:
        """`[..., d]` of `N` slots `[..., w]`."""
        if self.mixing == "none":
            whole = torch.cat(list(z), -1)
        elif self.mixing == "reversible":
            whole = torch.cat(mix(self.couplings, z), -1)
        else:
            whole = torch.stack(mix(self.couplings, z), -1).flatten(-2)
        return functional.pad(whole, (0, self.hidden_size - whole.shape[-1]))

    def split(self, outputs: Tensor) -> list[Tensor]:
        """What the slots hold, `N` times `[..., w]`, of `[..., d]` that the last layer gave."""
        o = list(outputs[..., : self.size * self.width].split(self.width, -1))
        if self.mixing == "none":
            return o
        z = unmix(self.couplings, o)
        return z if self.mixing == "reversible" else z[::-1]

    def lift(self, z: Tensor) -> Tensor:
        """`[..., d]` for the head, of slots `[..., w]`."""
        first, second, third = self.up
        return third(second(first(z).relu()).relu())

    def answers(self, outputs: Tensor) -> Tensor:
        """What each member's head reads, `[N, d]`, of the composite where that member is read.

        Args:
            outputs: `[N, d]` or, for several composites, `[G, N, d]`.
        """
        slots = self.split(outputs)
        own = [z[..., slot, :] for slot, z in enumerate(slots)]
        return self.lift(torch.stack(own, -2))


def multiplexers(
    hidden_size: int, sizes: Sequence[int], mixing: Mixing = "reversible"
) -> nn.ModuleDict:
    """One per number of sequences."""
    return nn.ModuleDict({str(size): Multiplexer(hidden_size, size, mixing) for size in sizes})
