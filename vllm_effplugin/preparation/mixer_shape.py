"""Sizes of a Mamba-2 mixer. Apart from what computes with them, so that checks need no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MixerShape:
    """Sizes of a mixer.

    Attributes:
        heads, head_size: `H` heads of `P` channels.
        groups: `G` groups of heads, each of which shares `b` and `c`.
        state: `N` coordinates of the state per channel.
    """

    heads: int
    head_size: int
    groups: int
    state: int

    @property
    def inner(self) -> int:
        """Channels of all heads, `H * P`."""
        return self.heads * self.head_size

    @property
    def channels(self) -> int:
        """Of the convolution, `C`: those of `x`, `b` and `c` together."""
        return self.inner + 2 * self.groups * self.state
