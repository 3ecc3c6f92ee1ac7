"""The exits' heads and gates, as the engine runs them.

Shapes: `E` exits, `n` sequences, `d` hidden size, `C` classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from vllm_effplugin.techniques.joint_exit.config import MEASURES, NEVER, JointExitConfig
from vllm_effplugin.techniques.joint_exit.distribution import Inference, measures


class ExitHeads(nn.Module):
    """A head and a gate per exit, in fp32.

    Args:
        config: the exits.
        hidden_size: `d`.
        classes: `C`.
    """

    def __init__(self, config: JointExitConfig, hidden_size: int, classes: int) -> None:
        super().__init__()
        self.config = config

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, dtype=torch.float32), requires_grad=False)

        heads = len(config.exits)
        self.weight = parameter(heads, classes, hidden_size)
        self.bias = parameter(heads, classes)
        if config.rule == "joint":
            self.gate_weight = parameter(heads, MEASURES)
            self.gate_bias = parameter(heads)

    def logits(self, exit: int, states: Tensor) -> Tensor:
        """`[n, C]` class logits in fp32 from `[n, d]` outputs of the final norm."""
        return functional.linear(states.float(), self.weight[exit], self.bias[exit])

    def gate(self, exit: int, probabilities: Tensor) -> Tensor:
        """`[n]` logits of a gate from `[n, C]` class probabilities."""
        return measures(probabilities) @ self.gate_weight[exit] + self.gate_bias[exit]


class Decision:
    """Where the sequences of one step leave.

    Args:
        heads: of the exits.
        bias: per sequence, added to its gates.
    """

    def __init__(self, heads: ExitHeads, bias: Tensor) -> None:
        self._heads, self._bias = heads, bias
        self._inference = Inference(len(bias), bias)

    def leaves(self, exit: int, probabilities: Tensor, asked: Tensor) -> Tensor:
        """`[n]` whether sequences leave at an exit.

        Args:
            probabilities: `[n, C]`.
            asked: `[n]` their indices.
        """
        bias = self._bias[asked]
        config = self._heads.config
        if config.rule == "joint":
            gates = (self._heads.gate(exit, probabilities) + bias).sigmoid()
            return self._inference.leaves(gates, asked)
        threshold = config.exits[exit].threshold
        if threshold >= NEVER:
            return torch.zeros_like(asked, dtype=torch.bool)
        confident = torch.logit(probabilities.amax(-1)) + bias
        return confident >= torch.logit(confident.new_tensor(threshold))
