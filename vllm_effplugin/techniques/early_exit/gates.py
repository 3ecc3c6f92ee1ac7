"""Gates: the confidence, as a logit, that a token's prediction would not change any more.

Shapes: `T` tokens, `B` sequences, `S` positions, `d` hidden size, `w` channels of a gate, `C`
channels of its convolution, `H` heads of its mixer; `E` gates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vllm_effplugin.preparation.state_space import causal_conv, gated_norm, scan, split_mixed
from vllm_effplugin.techniques.early_exit.shapes import CONVOLUTION, gate_shape

EPSILON = 1e-6
STEPS = (1e-3, 1e-1)
"""Smallest and largest time step of the heads before training, as in Mamba-2."""


def new_gate(kind: str, hidden_size: int, width: int) -> Gate | MambaGate | None:
    """A gate of a kind, untrained; None for kinds that nothing is trained of.

    Args:
        hidden_size: `d`.
        width: hidden units of `mlp`, channels of `mamba`.
    """
    if kind == "mamba":
        return MambaGate(hidden_size, width)
    return Gate(kind, hidden_size, width) if kind in ("linear", "mlp") else None


class Gate(nn.Module):
    """Goes by a token's own hidden state: `linear` is one layer (CALM); `mlp` two (DYNAMAX)."""

    def __init__(self, kind: str, hidden_size: int, width: int) -> None:
        super().__init__()
        if kind == "linear":
            self.layers = nn.Sequential(nn.Linear(hidden_size, 1, dtype=torch.float32))
        else:
            self.layers = nn.Sequential(
                nn.Linear(hidden_size, width, dtype=torch.float32),
                nn.SiLU(),
                nn.Linear(width, 1, dtype=torch.float32),
            )

    @property
    def bias(self) -> nn.Parameter:
        """Of the logit."""
        return self.layers[-1].bias

    def forward(self, hidden: Tensor) -> Tensor:
        """`[T]` logits in fp32 for `[T, d]` hidden states."""
        *before, last = self.layers
        hidden = _unit(hidden)
        for layer in before:
            hidden = layer(hidden)
        return _dot(hidden, last)

    def of_sequences(self, hidden: Tensor, starts: Tensor | None = None) -> Tensor:
        """`[B, S]` logits for `[B, S, d]` hidden states."""
        return self(hidden)


class MambaGate(nn.Module):
    """Goes by the tokens before as well: a Mamba-2 mixer between a linear map down and the logit.

        u = W rms(h) + b,    z, m, dt = P u,    y = mixer(m, dt),    logit = v [u; norm(y silu(z))]

    A mixer's output projection would be followed by `v` and nothing else, so the two are one.
    """

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.shape = shape = gate_shape(width)
        self._sizes = [shape.inner, shape.channels, shape.heads]
        wide = {"dtype": torch.float32}
        self.reduce = nn.Linear(hidden_size, width, **wide)
        self.project = nn.Linear(width, sum(self._sizes), bias=False, **wide)
        bound = 1 / math.sqrt(CONVOLUTION)
        weight = torch.empty(shape.channels, CONVOLUTION, **wide).uniform_(-bound, bound)
        self.conv_weight = nn.Parameter(weight)
        self.conv_bias = nn.Parameter(torch.zeros(shape.channels, **wide))
        low, high = map(math.log, STEPS)
        dt = torch.linspace(low, high, shape.heads, **wide).exp()
        self.log_a = nn.Parameter(torch.arange(1, shape.heads + 1, **wide).log())
        self.D = nn.Parameter(torch.ones(shape.heads, **wide))
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus gives `dt`
        self.norm_weight = nn.Parameter(torch.ones(shape.inner, **wide))
        self.logit = nn.Linear(width + shape.inner, 1, **wide)
        self.states: Callable[[Tensor, Tensor], Tensor] | None = None

    @property
    def bias(self) -> nn.Parameter:
        """Of the logit."""
        return self.logit.bias

    def forward(self, hidden: Tensor) -> Tensor:
        """`[T]` logits in fp32 for `[T, d]` hidden states of a batch.

        `states` has to be set: it advances the states of the batch's requests.
        """
        assert self.states is not None
        reduced, gate, mixed, dt = self._driven(hidden)
        return self._logit(reduced, gate, self.states(mixed, dt))

    def of_sequences(self, hidden: Tensor, starts: Tensor | None = None) -> Tensor:
        """`[B, S]` logits for `[B, S, d]` hidden states of whole sequences.

        Args:
            starts: `[B, S]`, where a document starts, and with it a state of zeros.
        """
        reduced, gate, mixed, dt = self._driven(hidden)
        mixed = functional.silu(causal_conv(mixed, self.conv_weight, self.conv_bias, starts))
        x, b, c = split_mixed(self.shape, mixed)
        dt = functional.softplus(dt + self.dt_bias)
        y = scan(x, dt, -self.log_a.exp(), b, c, starts) + x * self.D[:, None]
        return self._logit(reduced, gate, y.flatten(-2))

    def _driven(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """`u`, `z`, and what drives the state: `m` `[..., C]` and `dt` `[..., H]`."""
        reduced = self.reduce(_unit(hidden))
        return reduced, *self.project(reduced).split(self._sizes, -1)

    def _logit(self, reduced: Tensor, gate: Tensor, y: Tensor) -> Tensor:
        y = gated_norm(y, gate, self.norm_weight, EPSILON)
        return _dot(torch.cat([reduced, y], -1), self.logit)


class MambaGates(nn.Module):
    """Several of them at once, in half as many calls: for one token, those are what they cost.

    Args:
        gates: of one width.
    """

    def __init__(self, gates: Sequence[MambaGate]) -> None:
        super().__init__()
        self._gates = tuple(gates)
        self.shape = gates[0].shape
        self.states: Callable[[Tensor, Tensor], Tensor] | None = None
        for name, value in self._stacked().items():
            self.register_buffer(name, torch.empty_like(value), persistent=False)

    def _stacked(self) -> dict[str, Tensor]:
        """Their parameters, the gates along the first dimension."""
        ones = [[gate.reduce, gate.project, gate.logit, gate.norm_weight] for gate in self._gates]
        reduce, project, logit, norm = zip(*ones, strict=True)
        return {
            "reduce": torch.stack([layer.weight.detach().T for layer in reduce]),
            "reduce_bias": torch.stack([layer.bias.detach()[None] for layer in reduce]),
            "project": torch.stack([layer.weight.detach().T for layer in project]),
            "norm_weight": torch.stack([weight.detach()[None] for weight in norm]),
            "logit": torch.stack([layer.weight.detach() for layer in logit]),
            "logit_bias": torch.stack([layer.bias.detach() for layer in logit]),
        }

    def prepare(self) -> None:
        """The gates' weights are loaded."""
        for name, value in self._stacked().items():
            getattr(self, name).copy_(value)

    def forward(self, hidden: Sequence[Tensor]) -> Tensor:
        """`[E, T]` logits for the gates' `[T, d]` hidden states."""
        assert self.states is not None
        shape, count = self.shape, len(hidden)
        states = torch.stack([_unit(each) for each in hidden])
        reduced = torch.baddbmm(self.reduce_bias, states, self.reduce)
        projected = torch.bmm(reduced, self.project)
        gate, mixed, dt = projected.split([shape.inner, shape.channels, shape.heads], -1)
        y = self.states(*(part.transpose(0, 1).flatten(1) for part in (mixed, dt)))
        y = y.unflatten(1, (count, shape.inner)).transpose(0, 1)
        y = gated_norm(y, gate, self.norm_weight, EPSILON)
        return (torch.cat([reduced, y], -1) * self.logit).sum(-1) + self.logit_bias


def _dot(hidden: Tensor, layer: Any) -> Tensor:
    """A linear layer of one output, `[...]`, as what a compiler fuses with what is around it.

    A call of a matrix library for it costs a gate's worth of time when one token decodes.
    """
    return (hidden * layer.weight[0]).sum(-1) + layer.bias


def _unit(hidden: Tensor) -> Tensor:
    """Hidden states divided by their root mean square: one threshold fits tokens of any norm."""
    hidden = hidden.float()
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + EPSILON)
