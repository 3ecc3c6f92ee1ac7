"""Recurrent states in plain PyTorch, one token after another.

Shapes: `S` positions, `C` channels of the convolution, `K` positions that it looks at, `H` heads of
`P` channels, `N` coordinates of the state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vllm_effplugin.preparation.mixer_shape import MixerShape
from vllm_effplugin.preparation.state_space import split_mixed


class MixerTrace:
    """What a mixer's state was behind every position of a sequence.

    Args:
        mixer: has `conv_weight` `[C, K]`, `conv_bias`, `log_a`, `D`, `dt_bias`.
        shape: its own by default.
    """

    def __init__(self, mixer: Any, shape: MixerShape | None = None) -> None:
        self._mixer = mixer
        self._shape = shape = shape or mixer.shape
        channels, taps = mixer.conv_weight.shape
        window = torch.zeros(taps - 1, channels)
        state = torch.zeros(shape.heads, shape.head_size, shape.state)
        self._behind = [(window, state)]  # behind no token, behind one, ...

    def take(self, start: int, mixed: Tensor, dt: Tensor) -> Tensor:
        """Tokens from a position on, whatever was there before.

        Args:
            mixed, dt: `[S, C]` and `[S, H]`.

        Returns:
            `[S, H * P]`.
        """
        del self._behind[start + 1 :]
        assert len(self._behind) == start + 1, "a position was left out"
        return torch.stack(list(map(self._step, mixed, dt)))

    def skip(self, position: int) -> None:
        """A token that leaves the state as it is."""
        del self._behind[position + 1 :]
        self._behind.append(self._behind[position])

    def _step(self, mixed: Tensor, dt: Tensor) -> Tensor:
        mixer, shape = self._mixer, self._shape
        window, state = self._behind[-1]
        window = torch.cat([window, mixed[None]])
        mixed = (window * mixer.conv_weight.T).sum(0)
        if mixer.conv_bias is not None:
            mixed = mixed + mixer.conv_bias
        x, b, c = split_mixed(shape, functional.silu(mixed))
        dt = functional.softplus(dt + mixer.dt_bias)
        repeat = shape.heads // shape.groups
        b, c = b.repeat_interleave(repeat, 0), c.repeat_interleave(repeat, 0)  # [H, N]
        state = (
            state * (-dt * mixer.log_a.exp()).exp()[:, None, None]
            + (dt[:, None] * x)[:, :, None] * b[:, None]
        )
        y = (state * c[:, None]).sum(-1) + mixer.D[:, None] * x
        self._behind.append((window[1:], state))
        return y.flatten()
