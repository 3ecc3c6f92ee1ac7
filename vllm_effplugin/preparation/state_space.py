"""Mamba-2 in plain PyTorch: convolution, scan, and a Hugging Face model taken apart.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t,    y_t = C_t h_t + D x_t

State space duality (arXiv 2405.21060, section 6): within chunks the recurrence is a masked matrix
product, and only one state per chunk is handed on.

Shapes: `B` sequences, `S` positions, `d` hidden size, `H` heads of `P` channels, `G` groups of
heads that share `N` state coordinates, `C` channels of the convolution, `Q` positions of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vllm_effplugin.preparation.mixer_shape import MixerShape

CHUNK = 64
"""Positions of a chunk of the scan."""

FORGET = -60.0
"""Logarithm of what is left of a state where another document starts."""


def causal_conv(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor | None = None
) -> Tensor:
    """Depthwise convolution over `[B, S, C]`, each position and those before it.

    Args:
        weight: `[C, K]`, the last column for the position itself.
        starts: `[B, S]`, where a document starts; what lies before it counts as zero.
    """
    kernel = weight.shape[1]
    output = inputs * weight[:, -1]
    document = None if starts is None or not starts[:, 1:].any() else starts.cumsum(1)
    for back in range(1, min(kernel, inputs.shape[1])):
        earlier = inputs[:, :-back]
        if document is not None:
            same = document[:, back:] == document[:, :-back]
            earlier = earlier * same[..., None].to(inputs.device)
        output = output + functional.pad(earlier * weight[:, -1 - back], (0, 0, back, 0))
    return output if bias is None else output + bias


def scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, starts: Tensor | None = None
) -> Tensor:
    """The recurrence from a state of zeros, without the term of `D`: `[B, S, H, P]`.

    Args:
        x: `[B, S, H, P]`.
        dt: `[B, S, H]`, positive.
        a: `[H]`, negative.
        b, c: `[B, S, G, N]`.
        starts: `[B, S]`, where a document starts; the state starts anew there.
    """
    length, heads = x.shape[1], x.shape[2]
    decay = dt * a
    if starts is not None and starts[:, 1:].any():
        decay = decay + FORGET * starts[..., None].to(decay.device)
    fill = -length % CHUNK

    def chunked(tensor: Tensor) -> Tensor:
        padded = functional.pad(tensor, (*(0, 0) * (tensor.dim() - 2), 0, fill))
        return padded.unflatten(1, (-1, CHUNK))

    x, dt, decay, b, c = map(chunked, (x, dt, decay, b, c))
    repeat = heads // b.shape[3]
    total = decay.cumsum(2)  # [B, chunks, Q, H]
    gap = (total[:, :, :, None] - total[:, :, None]).permute(0, 1, 4, 2, 3)  # [.., H, Q, Q]
    lower = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=x.device).tril()
    kept = gap.masked_fill(~lower, -torch.inf).exp()
    scores = torch.einsum("zsqgn,zskgn->zsgqk", c, b).repeat_interleave(repeat, 2)
    weighted = x * dt[..., None]
    within = torch.einsum("zshqk,zskhp->zsqhp", scores * kept, weighted)
    b, c = b.repeat_interleave(repeat, 3), c.repeat_interleave(repeat, 3)
    to_end = (total[:, :, -1:] - total).exp()
    gained = torch.einsum("zsqhn,zsqhp->zshpn", b, weighted * to_end[..., None])
    whole = total[:, :, -1].exp()[..., None, None]
    state = torch.zeros_like(gained[:, 0])
    before = []
    for chunk in range(gained.shape[1]):
        before.append(state)
        state = state * whole[:, chunk] + gained[:, chunk]
    handed_on = torch.einsum("zsqhn,zshpn->zsqhp", c, torch.stack(before, 1))
    return (within + handed_on * total.exp()[..., None]).flatten(1, 2)[:, :length]


def gated_norm(y: Tensor, gate: Tensor, weight: Tensor, epsilon: float, groups: int = 1) -> Tensor:
    """RMS norm of `y * silu(gate)`, `[..., H * P]` in fp32, each group of heads by itself.

    As in the authors' code and in vLLM; Transformers norms all groups together.
    """
    y = (y * functional.silu(gate.float())).unflatten(-1, (groups, -1))
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + epsilon)
    return y.flatten(-2) * weight


def split_mixed(shape: MixerShape, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`x`, `b` and `c` from `[..., C]` outputs of the convolution."""
    wide = shape.groups * shape.state
    x, b, c = mixed.split([shape.inner, wide, wide], -1)
    return (
        x.unflatten(-1, (shape.heads, shape.head_size)),
        b.unflatten(-1, (shape.groups, shape.state)),
        c.unflatten(-1, (shape.groups, shape.state)),
    )


def shape_of(mixer: Any) -> MixerShape:
    """That of a mixer of Transformers."""
    return MixerShape(mixer.num_heads, mixer.head_dim, mixer.n_groups, mixer.ssm_state_size)


def run_mixer(mixer: Any, hidden: Tensor, starts: Tensor | None = None) -> Tensor:
    """A mixer of Transformers on whole sequences, `[B, S, d]` -> `[B, S, d]`.

    Matrix products may run in bf16 (autocast); convolution and scan run in fp32.
    """
    shape = shape_of(mixer)
    sizes = [shape.inner, shape.channels, shape.heads]
    gate, mixed, dt = mixer.in_proj(hidden).split(sizes, -1)
    with torch.autocast(hidden.device.type, enabled=False):
        bias = mixer.conv1d.bias
        weight = mixer.conv1d.weight.squeeze(1).float()
        mixed = causal_conv(mixed.float(), weight, None if bias is None else bias.float(), starts)
        x, b, c = split_mixed(shape, functional.silu(mixed))
        dt = functional.softplus(dt.float() + mixer.dt_bias.float())
        y = scan(x, dt, -mixer.A_log.float().exp(), b, c, starts)
        y = (y + x * mixer.D.float()[:, None]).flatten(-2)
        epsilon = mixer.norm.variance_epsilon
        y = gated_norm(y, gate, mixer.norm.weight.float(), epsilon, shape.groups)
    return mixer.out_proj(y.to(mixer.out_proj.weight.dtype))


class StateSpaceDecoder:
    """Runs the layers of a Hugging Face Mamba-2 model, as `Decoder` does those of others.

    A sequence's documents share its state: that is how such a model reads packed text.

    Args:
        model: a `Mamba2ForCausalLM`.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.decoder = model.backbone
        self.layers: nn.ModuleList = self.decoder.layers
        self.norm: nn.Module = self.decoder.norm_f

    def embed(
        self, input_ids: Tensor, starts: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Hidden states `[B, S, d]` of `[B, S]` token ids, and nothing that layers need besides."""
        return self.decoder.embeddings(input_ids), {}

    def context(self, hidden: Tensor, starts: Tensor | None = None) -> dict[str, Any]:
        """Nothing."""
        return {}

    @contextmanager
    def fastest_attention(self) -> Iterator[None]:
        """There is none."""
        yield

    def run_layers(self, indices: Iterable[int], hidden: Tensor, context: dict[str, Any]) -> Tensor:
        """Run layers one after another on `[B, S, d]` hidden states."""
        for index in indices:
            layer: Any = self.layers[index]
            hidden = hidden + run_mixer(layer.mixer, layer.norm(hidden))
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and language model head: `[B, S, d]` -> `[B, S, V]`."""
        return self.model.lm_head(self.norm(hidden))
