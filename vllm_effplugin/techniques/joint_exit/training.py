"""Training heads and gates together on captured states: JEI-DNN (arXiv 2310.09163).

The bi-level objective: gates minimise `E sum_l P_l (CE_l + lambda IC_l)`, subject to heads that
minimise `E sum_l P_l CE_l`. `IC_l` is the share of the model that has run at exit `l`. The full
model's head learns in the warm-up only: without exits, a checkpoint answers as the stock
classifier, whatever its trade-off.

Heads are trained on standardised states of one length, which makes one learning rate fit every
depth and width, and folded back.

Shapes: `E` exits, `N` sequences, `d` hidden size, `C` classes; index `E` is the full model's head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from vllm_effplugin.preparation.trainer import cosine_decay
from vllm_effplugin.techniques.joint_exit.config import MEASURES
from vllm_effplugin.techniques.joint_exit.distribution import exit_distribution, measures

MOST_POSITIVE_WEIGHT = 5.0
"""Of the rarer "leave" in a gate's loss."""


FEWEST_PHASES = 8
"""However few the batches are, so that heads see what gates have learnt."""

REFERENCE_WIDTH = 576
"""Hidden size for which the learning rates are meant."""

ROUNDING = 2.0**-5
"""What 16 bits are expected to do to a state, as a share of it: eight steps of bf16.

States that were captured in fp32 show little of it, and where one hardly varies from text to text
(the first token's, in early layers of an encoder) a head would go by differences that no 16-bit
engine computes.
"""

_TINY = 1e-9
"""Below it, nobody leaves where there is anything to learn."""


class TrainSettings(BaseModel):
    """How to train; the defaults are the paper's where it states one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    warm_up_epochs: int = Field(8, ge=1, description="Passes in which all heads learn alone.")
    epochs: int = Field(16, ge=1, description="Passes in which gates and heads take turns.")
    phase: int = Field(200, ge=1, description="Batches of a turn.")
    batch: int = Field(64, ge=1, description="Sequences per step.")
    rate: float = Field(0.01, gt=0, description="Learning rate of the heads.")
    gate_rate: float = Field(0.3, gt=0, description="Learning rate of the gates.")
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(1e-3, ge=0, description="Of the heads.")
    seed: int = 0


@dataclass
class Joint:
    """Heads and gates, on the states that the final norm gives.

    Attributes:
        weight, bias: `[E + 1, C, d]` and `[E + 1, C]` of the heads.
        gate_weight, gate_bias: `[E, 4]` and `[E]`.
    """

    weight: Tensor
    bias: Tensor
    gate_weight: Tensor
    gate_bias: Tensor

    def logits(self, states: Tensor) -> Tensor:
        """`[E + 1, N, C]` class logits from `[E + 1, N, d]` states."""
        return head_logits(self.weight, self.bias, states)

    def gates(self, probabilities: Tensor) -> Tensor:
        """`[E, N]` logits of the gates from `[E, N, C]` class probabilities."""
        return gate_logits(self.gate_weight, self.gate_bias, probabilities)


def importance(heads: int) -> Tensor:
    """`[E + 1]` weights of the heads' losses in the warm-up: `CE_final + sum_l (E + 1 - l) CE_l`.

    Normalised to a sum of 1.
    """
    weights = torch.arange(heads - 1, -1, -1, dtype=torch.float32)
    weights[-1] = 1.0
    return weights / weights.sum()


def head_logits(weight: Tensor, bias: Tensor, states: Tensor) -> Tensor:
    """`[E + 1, N, C]`: each head on the states of its depth, `[E + 1, N, d]`."""
    return torch.baddbmm(bias[:, None], states, weight.transpose(1, 2))


def gate_logits(weight: Tensor, bias: Tensor, probabilities: Tensor) -> Tensor:
    """`[E, N]`, before the sigmoid."""
    return (measures(probabilities) * weight[:, None]).sum(-1) + bias[:, None]


def head_loss(cross_entropy: Tensor, probability: Tensor, *, detach: bool = True) -> Tensor:
    """`mean(P * CE * r)` with `r = sum CE / sum(P CE)`.

    Args:
        cross_entropy: `[E + 1, B]`.
        probability: `[E + 1, B]` of leaving there.
        detach: whether `r` is a constant. If not, the whole is just `mean(CE)`.
    """
    weighted = (probability * cross_entropy).sum()
    ratio = cross_entropy.sum() / weighted.clamp_min(_TINY)
    if detach:
        ratio = ratio.detach()
    return (probability * cross_entropy * ratio).mean()


def gate_loss(logits: Tensor, cross_entropy: Tensor, cost: Tensor, trade_off: float) -> Tensor:
    """Binary cross-entropy of each gate against "the best exit is here or was before".

    Args:
        logits: `[E, B]` of the gates.
        cross_entropy: `[E + 1, B]` of the heads.
        cost: `[E + 1]`, `IC`.
        trade_off: `lambda`.
    """
    best = (cross_entropy + trade_off * cost[:, None]).argmin(0)
    exits = torch.arange(len(logits), device=logits.device)
    target = (exits[:, None] >= best).to(logits.dtype)
    positive = target.sum(1)
    weight = ((target.shape[1] - positive) / positive.clamp_min(1)).clamp(1, MOST_POSITIVE_WEIGHT)
    return functional.binary_cross_entropy_with_logits(logits, target, pos_weight=weight[:, None])


class JointTrainer:
    """Trains heads and gates on the same states, for any number of trade-offs.

    Args:
        states: `[E + 1, N, d]` of the training sequences.
        labels: `[N]`.
        classes: `C`.
        cost: `[E + 1]`, `IC`, 1 at the end.
        settings: how to train.
        final: weight `[C, d]` and bias `[C]` of a head that the full model has already, and keeps.
        final_bias: whether the full model's head has a bias, if it is trained.
    """

    def __init__(
        self,
        states: Tensor,
        labels: Tensor,
        classes: int,
        cost: Sequence[float],
        settings: TrainSettings,
        final: tuple[Tensor, Tensor | None] | None = None,
        final_bias: bool = True,
    ) -> None:
        self._settings, self._labels, self._classes = settings, labels, classes
        self._cost = torch.tensor(cost, device=states.device)
        stacked = states.float()
        self._mean = stacked.mean(1, keepdim=True)
        self._has_bias = torch.ones(len(states), 1, device=states.device)
        if not final_bias and final is None:
            self._mean[-1], self._has_bias[-1] = 0.0, 0.0
        centred = stacked - self._mean
        # A step of gradient descent moves a logit by the squared length of the states.
        longer = math.sqrt(stacked.shape[-1] / REFERENCE_WIDTH)
        variance = centred.square().mean(1, keepdim=True)
        if states.dtype == torch.float32:
            variance = variance + ROUNDING**2 * stacked.square().mean(1, keepdim=True)
        self._scale = longer * variance.sqrt().clamp_min(1e-4)
        self._states = centred / self._scale
        self._fixed: tuple[Tensor, Tensor] | None = None
        if final is not None:
            weight, bias = final
            bias = weight.new_zeros(len(weight)) if bias is None else bias
            self._fixed = weight * self._scale[-1], bias + weight @ self._mean[-1, 0]
        self._warm: tuple[Tensor, Tensor] | None = None

    @property
    def exits(self) -> int:
        """`E`."""
        return len(self._states) - 1

    def warm_up(self) -> Joint:
        """Heads that learnt alone; no gate leaves."""
        weight, bias = self._warmed()
        none = self._states.new_zeros(self.exits, MEASURES)
        return self._folded(weight, bias, none, none[:, 0] - math.inf)

    def train(self, trade_off: float, *, detach: bool = True) -> Joint:
        """Heads and gates for one `lambda`, from the heads that learnt alone.

        Args:
            detach: whether the normalisation of the heads' loss passes no gradient. Without, as in
                the authors' released code, that gradient is that of plain cross-entropy, and gates
                do not influence heads.
        """
        settings = self._settings
        weight, bias = (nn.Parameter(part.clone()) for part in self._warmed())
        gate_weight = nn.Parameter(self._states.new_zeros(self.exits, MEASURES))
        gate_bias = nn.Parameter(self._states.new_zeros(self.exits))
        heads = self._optimizer([weight, bias], settings.weight_decay)
        gates = self._optimizer([gate_weight, gate_bias], 0.0)
        steps = settings.epochs * self._per_epoch
        phase = min(settings.phase, max(1, steps // FEWEST_PHASES))
        for step, rows in enumerate(self._batches(steps, f"lambda {trade_off:g}")):
            slower = cosine_decay(step / steps)
            cross_entropy, probabilities = self._losses(weight, bias, rows)
            logits = gate_logits(gate_weight, gate_bias, probabilities[:-1].detach())
            if step // phase % 2 == 0:
                loss = gate_loss(logits, cross_entropy.detach(), self._cost, trade_off)
                self._step(gates, loss, settings.gate_rate * slower)
            else:
                probability = exit_distribution(logits.detach().sigmoid())
                loss = head_loss(cross_entropy, probability, detach=detach)
                self._step(heads, loss, settings.rate * slower)
        return self._folded(weight, bias, gate_weight, gate_bias)

    # --- Parts -----------------------------------------------------------------------------------

    @property
    def _per_epoch(self) -> int:
        return max(1, len(self._labels) // self._settings.batch)

    def _warmed(self) -> tuple[Tensor, Tensor]:
        """`[E, C, d]` and `[E, C]` of the exits' heads."""
        if self._warm is None:
            settings = self._settings
            size = self._states.shape[-1]
            heads = self.exits + (self._fixed is None)
            weight = nn.Parameter(self._states.new_zeros(heads, self._classes, size))
            bias = nn.Parameter(self._states.new_zeros(heads, self._classes))
            optimizer = self._optimizer([weight, bias], settings.weight_decay)
            # Their sum is normalised, and no head shares anything with another: what remains of
            # the weights is the rate of a head's steps, which need not differ.
            steps = settings.warm_up_epochs * self._per_epoch
            for step, rows in enumerate(self._batches(steps, "warm-up")):
                cross_entropy, _ = self._losses(weight, bias, rows)
                loss = cross_entropy.mean(1).sum()
                self._step(optimizer, loss, settings.rate * cosine_decay(step / steps))
            weights, biases = self._all_heads(weight.detach(), bias.detach())
            # The full model's head is the stock classifier's from here on, for all trade-offs.
            self._fixed = weights[-1], biases[-1]
            self._warm = weights[:-1], biases[:-1]
        return self._warm

    def _losses(self, weight: Tensor, bias: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """`[E + 1, B]` cross-entropies and `[E + 1, B, C]` probabilities of some sequences."""
        weight, bias = self._all_heads(weight, bias)
        log_p = head_logits(weight, bias, self._states[:, rows]).log_softmax(-1)
        labels = self._labels[rows].expand(len(log_p), -1)[..., None]
        return -log_p.gather(-1, labels).squeeze(-1), log_p.exp()

    def _all_heads(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """`[E + 1, C, d]` and `[E + 1, C]`: with the full model's head, where it is not trained."""
        if self._fixed is not None:
            weight = torch.cat([weight, self._fixed[0][None]])
            bias = torch.cat([bias, self._fixed[1][None]])
            return weight, bias
        return weight, bias * self._has_bias

    def _optimizer(self, parameters: list[nn.Parameter], decay: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            parameters, lr=self._settings.rate, momentum=self._settings.momentum, weight_decay=decay
        )

    @staticmethod
    def _step(optimizer: torch.optim.Optimizer, loss: Tensor, rate: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def _batches(self, steps: int, label: str) -> Iterator[Tensor]:
        """Row indices of each step; shuffled anew in every pass."""
        count, size = len(self._labels), min(self._settings.batch, len(self._labels))
        generator = torch.Generator().manual_seed(self._settings.seed)
        order = torch.empty(0, dtype=torch.int64)
        for _ in tqdm(range(steps), desc=label, leave=False):
            if len(order) < size:
                order = torch.randperm(count, generator=generator)
            rows, order = order[:size], order[size:]
            yield rows.to(self._labels.device)

    def _folded(self, weight: Tensor, bias: Tensor, *gates: Tensor) -> Joint:
        """The same heads on states that are not standardised."""
        weight, bias = self._all_heads(weight.detach(), bias.detach())
        weight = weight / self._scale
        bias = bias - (weight @ self._mean.transpose(1, 2)).squeeze(-1)
        return Joint(weight, bias, *(gate.detach() for gate in gates))
