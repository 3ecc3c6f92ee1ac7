"""Sizes of a gate that keeps a state."""

from __future__ import annotations

from vllm_effplugin.preparation.mixer_shape import MixerShape

CONVOLUTION = 4
"""Positions that the convolution looks at."""

HEAD_SIZE = 32
STATE = 16
EXPANSION = 2


def gate_shape(width: int) -> MixerShape:
    """That of a gate of some channels."""
    return MixerShape(EXPANSION * width // HEAD_SIZE, HEAD_SIZE, 1, STATE)
