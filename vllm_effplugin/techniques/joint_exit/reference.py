"""A classifier with exits in plain PyTorch: one sequence at a time, formula by formula.

JEI-DNN (arXiv 2310.09163), section 4. What vLLM computes is compared with this.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vllm_effplugin.preparation.backbone import Backbone
from vllm_effplugin.techniques.joint_exit.config import HEADS, NEVER, JointExitConfig


class ReferenceClassifier:
    """Classifies a sequence.

    Args:
        backbone: the Hugging Face model.
        final: weight `[C, d]` and bias `[C]` of the full model's head.
        config: exits and rule.
        tensors: of the exits, as in a checkpoint.
    """

    def __init__(
        self,
        backbone: Backbone,
        final: tuple[Tensor, Tensor | None],
        config: JointExitConfig,
        tensors: Mapping[str, Tensor],
    ) -> None:
        self._backbone, self._final, self._config = backbone, final, config
        self._tensors = {n.removeprefix(f"{HEADS}."): t.float() for n, t in tensors.items()}

    @torch.inference_mode()
    def __call__(
        self, ids: Sequence[int], *, exit: bool = True, bias: float | None = None
    ) -> tuple[list[float], int]:
        """Class probabilities, and how many layers gave them.

        Args:
            ids: the sequence.
            exit: whether it may leave.
            bias: of the gates, instead of the configuration's.
        """
        depths = self._config.depths
        states = self._backbone.states(torch.tensor([ids]), torch.tensor([len(ids)]), depths)
        bias = self._config.bias if bias is None else bias
        gates: list[float] = []
        stays = 1.0
        for index, depth in enumerate(depths if exit else ()):
            logits = self._tensors["weight"][index] @ states[index][0].float()
            logits = logits + self._tensors["bias"][index]
            p = logits.softmax(-1)
            if self._config.rule == "confidence":
                leaves = self._confident(index, float(p.max()), bias)
            else:
                gate = torch.sigmoid(
                    self._tensors["gate_weight"][index] @ torch.tensor(_measures(p.tolist()))
                    + self._tensors["gate_bias"][index]
                    + bias
                )
                probability = max(0.0, min(float(gate), 1.0 - sum(gates)))
                gates.append(float(gate))
                conditional = min(1.0, max(0.0, probability / max(stays, 1e-9)))
                stays *= 1.0 - conditional
                leaves = conditional >= 0.5
            if leaves:
                answer = logits / self._config.exits[index].temperature
                return answer.softmax(-1).tolist(), depth
        weight, final_bias = self._final
        logits = weight.float() @ states[-1][0].float()
        if final_bias is not None:
            logits = logits + final_bias.float()
        return logits.softmax(-1).tolist(), self._backbone.num_layers

    def _confident(self, index: int, p: float, bias: float) -> bool:
        threshold = self._config.exits[index].threshold
        if threshold >= NEVER:
            return False
        if threshold <= 0 or p >= 1:
            return True
        return math.log(p / (1 - p)) + bias >= math.log(threshold / (1 - threshold))


def _measures(p: Sequence[float]) -> list[float]:
    """What a gate sees: largest, entropy, distance of the two largest, entropy of the squares."""
    largest, second = sorted(p, reverse=True)[:2]
    squares = [each * each for each in p]
    q = [each / sum(squares) for each in squares]
    return [largest, _entropy(p), largest - second, _entropy(q)]


def _entropy(p: Sequence[float]) -> float:
    return -sum(each * math.log(each) for each in p if each > 0)
