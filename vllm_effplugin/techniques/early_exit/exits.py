"""The trained parts of an exit: gate and adapter.

Shapes: `T` tokens, `d` hidden size. Hidden states are the residual stream behind a layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vllm_effplugin.techniques.early_exit.config import NEVER, EarlyExitConfig, ExitPoint
from vllm_effplugin.techniques.early_exit.gates import MambaGate, MambaGates, new_gate


class LinearAdapter(nn.Module):
    """A linear map, added to the hidden state, that makes up for the layers not run."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.correction = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[T, d]` -> `[T, d]`."""
        return hidden + self.correction(hidden)


class Exit(nn.Module):
    """Gate and adapter of one exit point; `gate` is None where it is not a trained one.

    Args:
        point: what the exit is.
        config: of all exits.
        hidden_size: `d`.
        block: the adapter `block`: a decoder layer of vLLM in the engine, else of Transformers.
    """

    def __init__(
        self,
        point: ExitPoint,
        config: EarlyExitConfig,
        hidden_size: int,
        block: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.point = point
        self.gate = new_gate(point.gate, hidden_size, config.gate_width)
        self.adapter: nn.Module | None = None
        if point.adapter == "linear":
            self.adapter = LinearAdapter(hidden_size)
        elif point.adapter == "block":
            assert block is not None
            self.adapter = block

    @property
    def block(self) -> nn.Module | None:
        """The exit's own layer, if that is its adapter."""
        return self.adapter if self.point.adapter == "block" else None

    @property
    def finishes_in_graph(self) -> bool:
        """Whether the final norm's output is computed for all tokens, with the layers before.

        In a segment, behind which tokens are likely to leave, it costs next to nothing without an
        adapter; and a block has to run for every token, since later ones attend to its entries. A
        linear map is for those that leave.
        """
        return self.point.adapter != "linear"

    def comparable(self, threshold: float) -> float:
        """A threshold in the unit of what the gate gives: a logit if trained, else a share."""
        if threshold >= NEVER:
            return math.inf
        if self.gate is None:
            return threshold
        return math.log(threshold / (1 - threshold)) if threshold > 0 else -math.inf

    def adapt(self, hidden: Tensor) -> Tensor:
        """What the final norm reads, `[T, d]`, from the exit's hidden states.

        A block is no function of one token, so it is not applied here.
        """
        return hidden if self.adapter is None or self.block is not None else self.adapter(hidden)


@dataclass
class Tail:
    """What the stack gives at an exit, per token of the batch.

    Attributes:
        hidden, residual: `[T, d]`; their sum is the exit's hidden state. Without a residual,
            `hidden` is.
        finished: `[T, d]` the final norm's output, where the graph computed it.
        gate: `[T]` logits of a trained gate.
    """

    hidden: Tensor
    residual: Tensor | None
    finished: Tensor | None
    gate: Tensor | None

    def at(self, index: Tensor | slice) -> Tensor:
        """Hidden states of some tokens, `[n, d]`."""
        hidden = self.hidden[index]
        return hidden if self.residual is None else hidden + self.residual[index]


def tail_of_segment(exit: Exit, tensors: Sequence[Tensor]) -> Tail:
    """What the part of the stack that ends at an exit returned."""
    hidden, residual, *others = tensors
    return Tail(
        hidden,
        residual,
        others[0] if exit.finishes_in_graph else None,
        others[-1] if exit.gate is not None else None,
    )


class AllGates(nn.Module):
    """The trained gates of all exits, for the graph that has all exits in it.

    Args:
        exits: of the model, those without trained gates included.
        pages: that hold the states of gates which have some.
    """

    def __init__(self, exits: Sequence[Exit], pages: Any = None) -> None:
        super().__init__()
        # Not registered once more.
        self._gates = tuple(exit.gate for exit in exits if exit.gate is not None)
        with_states = [gate for gate in self._gates if isinstance(gate, MambaGate)]
        self.merged: MambaGates | None = None
        if len(with_states) > 1:
            self.merged = MambaGates(with_states)
            self.merged.states = pages.part(0, len(with_states))

    def prepare(self) -> None:
        """The gates' weights are loaded."""
        if self.merged is not None:
            self.merged.prepare()

    def forward(self, hidden: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Logits, `[E, T]`, and each gate's largest, `[E]`; nothing where there are no gates.

        Args:
            hidden: what each gate reads, `[T, d]`.
        """
        if not self._gates:
            return ()
        pairs = list(zip(self._gates, hidden, strict=True))
        if self.merged is None:
            return together([gate(states) for gate, states in pairs])
        read = [states for gate, states in pairs if isinstance(gate, MambaGate)]
        merged = iter(self.merged(read).unbind())
        return together(
            [next(merged) if isinstance(gate, MambaGate) else gate(h) for gate, h in pairs]
        )


def together(gates: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Logits of all gates, `[E, T]`, and each one's largest, `[E]`, NaN left out; or nothing."""
    if not gates:
        return ()
    logits = torch.stack(list(gates))
    return logits, torch.where(logits.isnan(), -torch.inf, logits).amax(1)


def take_tail(exit: Exit, tensors: list[Tensor]) -> Tail:
    """An exit's part of what the whole stack returned; removes it from the list's front.

    The gates' logits are not part of it: they stand together.
    """
    hidden = tensors.pop(0)
    return Tail(hidden, None, tensors.pop(0) if exit.block is not None else None, None)
