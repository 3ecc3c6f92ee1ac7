"""Attention of packed documents by xformers, which computes no score across documents.

Used where xformers and a GPU are there; elsewhere PyTorch's attention gets a mask that says the
same (`decoder.py`).

Shapes: `B` sequences, `S` positions, `h` heads of size `s`.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PretrainedConfig

XFORMERS = "effplugin_xformers"
"""Its name among Transformers' kinds of attention."""


def available(config: PretrainedConfig) -> bool:
    """Whether xformers can run a model's attention here: its kernels take 16 bits only."""
    if not (torch.is_autocast_enabled("cuda") and torch.cuda.is_available() and _has_kernels()):
        return False
    kinds = set(getattr(config, "layer_types", None) or ())
    return kinds <= {"full_attention"} if kinds else not getattr(config, "sliding_window", None)


@cache
def _has_kernels() -> bool:
    """Whether xformers runs: installed for another PyTorch, it imports and has no kernel."""
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError:
        return False
    probe = torch.zeros(1, 8, 1, 32, dtype=torch.bfloat16, device="cuda")
    try:
        memory_efficient_attention(probe, probe, probe)
    except NotImplementedError as error:
        warnings.warn(
            f"xformers is installed but has no kernel here ({str(error).splitlines()[0]}): "
            "PyTorch's attention is used, which is slower",
            stacklevel=2,
        )
        return False
    return True


def document_lengths(starts: Tensor) -> list[int]:
    """Lengths of the documents of `[B, S]` packed sequences, one after another.

    Args:
        starts: where a document starts; each sequence starts one.
    """
    begins = starts.cpu().clone()
    begins[:, 0] = True
    edges = torch.cat([begins.flatten().nonzero().flatten(), torch.tensor([begins.numel()])])
    return edges.diff().tolist()


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    lengths: list[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within documents, as Transformers calls it.

    Args:
        query, key, value: `[B, heads, S, s]`; key and value may have fewer heads.
        lengths: of `document_lengths`; without, a sequence is one document.

    Returns:
        `[B, S, h, s]`.
    """
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

    batch, heads, length, _ = query.shape
    groups = heads // key.shape[1]
    device = query.device.type
    # Rotary embeddings have turned queries and keys back to fp32.
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype

    def flat(states: Tensor, repeat: int) -> Tensor:
        """`[1, B S, h, s]`."""
        states = states.to(dtype)
        states = states.repeat_interleave(repeat, 1) if repeat > 1 else states
        return states.transpose(1, 2).flatten(0, 1)[None]

    bias = BlockDiagonalCausalMask.from_seqlens(lengths or [length] * batch)
    output = memory_efficient_attention(
        flat(query, 1),
        flat(key, groups),
        flat(value, groups),
        attn_bias=bias,
        p=dropout,
        scale=scaling,
    )
    return output[0].unflatten(0, (batch, length)), None


AttentionInterface.register(XFORMERS, attend)
