"""Operating points of the exits, what they give on held-out states, and which to take.

Three methods share the captured states. `joint`: heads and gates learnt together, one per
`lambda`, each with a bias. `threshold`: heads that learnt alone, and one probability at which all
exits let go. `fixed`: the same heads, everything leaves at one depth.

Shapes: `E` exits, `N` sequences, `d` hidden size, `C` classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from vllm_effplugin.techniques.joint_exit.config import (
    HEADS,
    NEVER,
    JointExitConfig,
    SequenceExit,
)
from vllm_effplugin.techniques.joint_exit.distribution import exits_taken
from vllm_effplugin.techniques.joint_exit.training import Joint
from vllm_effplugin.techniques.joint_exit.uncertainty import (
    FEWEST,
    calibration_error,
    fit_temperature,
    paired_difference,
)

Method = Literal["joint", "threshold", "fixed"]

BIASES = (0.0, *(-0.25 * step for step in range(1, 25)), 0.25, 0.5, 1.0)
"""Tried with every `lambda`; 0 is the paper's rule."""

THRESHOLDS = (0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.875, 0.9, 0.925, 0.95, 0.97, 0.985)


@dataclass(frozen=True)
class Held:
    """Held-out sequences.

    Attributes:
        states: `[E + 1, N, d]` that heads read.
        labels: `[N]`.
        lengths: `[N]` in tokens.
    """

    states: Tensor
    labels: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class Answers:
    """What sequences get, and where.

    Attributes:
        probabilities: `[N, C]`.
        exits: `[N]`, `E` for the full model.
        right: `[N]` whether the most likely class is the true one.
    """

    probabilities: Tensor
    exits: Tensor
    right: Tensor

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return float(self.right.float().mean())

    def calibration_error(self, labels: Tensor) -> float:
        """Of these probabilities."""
        return calibration_error(self.probabilities.numpy(), labels.numpy())


@dataclass(frozen=True, eq=False)
class Candidate:
    """One operating point.

    Attributes:
        name: for people.
        config: exits and rule.
        heads: what they decide and answer with.
        answers: on the held-out sequences.
        layers: mean depth of a token there, the whole model being 1.
    """

    method: Method
    name: str
    config: JointExitConfig
    heads: Joint
    answers: Answers
    layers: float

    def tensors(self) -> dict[str, Tensor]:
        """As in a checkpoint; the full model's head is not among them."""
        found = {
            "weight": self.heads.weight[:-1],
            "bias": self.heads.bias[:-1],
        }
        if self.config.rule == "joint":
            found |= {"gate_weight": self.heads.gate_weight, "gate_bias": self.heads.gate_bias}
        return {f"{HEADS}.{name}": tensor.float().contiguous() for name, tensor in found.items()}

    def calibrated(self, labels: Tensor) -> Candidate:
        """The same with temperatures that fit those sequences which leave at each exit."""
        probabilities = self.answers.probabilities.clone()
        points = []
        for exit, point in enumerate(self.config.exits):
            here = self.answers.exits == exit
            temperature = 1.0
            if int(here.sum()) > FEWEST:
                own = probabilities[here]
                temperature = fit_temperature(own.numpy(), labels[here].numpy())
                probabilities[here] = (own.clamp_min(1e-12).log() / temperature).softmax(-1)
            points.append(point.model_copy(update={"temperature": temperature}))
        return replace(
            self,
            config=self.config.model_copy(update={"exits": tuple(points)}),
            answers=replace(self.answers, probabilities=probabilities),
        )

    def only_used(self) -> Candidate:
        """The same without exits whose threshold nothing reaches; gates need one another."""
        kept = [i for i, point in enumerate(self.config.exits) if point.threshold < NEVER]
        if self.config.rule == "joint" or len(kept) == len(self.config.exits):
            return self
        rows = [*kept, len(self.config.exits)]
        place = {old: new for new, old in enumerate(rows)}
        exits = torch.tensor([place[exit] for exit in self.answers.exits.tolist()])
        return replace(
            self,
            config=self.config.model_copy(
                update={"exits": tuple(self.config.exits[i] for i in kept)}
            ),
            heads=Joint(
                self.heads.weight[rows],
                self.heads.bias[rows],
                self.heads.gate_weight[kept],
                self.heads.gate_bias[kept],
            ),
            answers=replace(self.answers, exits=exits),
        )


def full_answers(heads: Joint, held: Held) -> Answers:
    """What the full model says."""
    probabilities = heads.logits(held.states.float())[-1].softmax(-1)
    exits = torch.full_like(held.labels, len(heads.gate_bias))
    return Answers(probabilities, exits, probabilities.argmax(-1) == held.labels)


def joint_candidates(
    heads: Joint,
    trade_off: float,
    depths: Sequence[int],
    num_layers: int,
    held: Held,
    biases: Iterable[float] = BIASES,
    suffix: str = "",
) -> Iterator[Candidate]:
    """Operating points of heads and gates that were trained for one `lambda`."""
    probabilities = heads.logits(held.states.float()).softmax(-1)
    gates = heads.gates(probabilities[:-1])
    for bias in biases:
        config = JointExitConfig(
            exits=tuple(SequenceExit(depth=depth) for depth in depths), bias=bias
        )
        exits = exits_taken((gates + bias).sigmoid())
        name = f"λ={trade_off:g} b={bias:g}{suffix}"
        yield _candidate("joint", name, config, heads, probabilities, exits, num_layers, held)


def threshold_candidates(
    heads: Joint, depths: Sequence[int], num_layers: int, held: Held
) -> Iterator[Candidate]:
    """One probability at which every exit lets go."""
    for threshold in THRESHOLDS:
        thresholds = [threshold] * len(depths)
        yield _by_confidence(
            "threshold", f"p={threshold:g}", heads, depths, thresholds, num_layers, held
        )


def fixed_candidates(
    heads: Joint, depths: Sequence[int], num_layers: int, held: Held
) -> Iterator[Candidate]:
    """Everything leaves at one depth."""
    for chosen in depths:
        thresholds = [0.0 if depth == chosen else NEVER for depth in depths]
        yield _by_confidence(
            "fixed", f"depth {chosen}", heads, depths, thresholds, num_layers, held
        )


def _by_confidence(
    method: Method,
    name: str,
    heads: Joint,
    depths: Sequence[int],
    thresholds: Sequence[float],
    num_layers: int,
    held: Held,
) -> Candidate:
    config = JointExitConfig(
        exits=tuple(
            SequenceExit(depth=depth, threshold=threshold)
            for depth, threshold in zip(depths, thresholds, strict=True)
        ),
        rule="confidence",
    )
    probabilities = heads.logits(held.states.float()).softmax(-1)
    limit = torch.tensor([math.inf if t >= NEVER else t for t in thresholds])
    leaves = probabilities[:-1].amax(-1) >= limit[:, None]
    exits = torch.where(leaves.any(0), leaves.int().argmax(0), len(depths))
    return _candidate(method, name, config, heads, probabilities, exits, num_layers, held)


def _candidate(
    method: Method,
    name: str,
    config: JointExitConfig,
    heads: Joint,
    probabilities: Tensor,
    exits: Tensor,
    num_layers: int,
    held: Held,
) -> Candidate:
    own = probabilities[exits, torch.arange(len(exits))]
    depths = torch.tensor([*config.depths, num_layers])[exits]
    layers = float((depths * held.lengths).sum() / held.lengths.sum()) / num_layers
    answers = Answers(own, exits, own.argmax(-1) == held.labels)
    return Candidate(method, name, config, heads, answers, layers)


def difference(one: Answers, other: Answers) -> tuple[float, float]:
    """Accuracy of one less the other's, on the same sequences, and its standard error."""
    return paired_difference(one.right.numpy(), other.right.numpy())


def frontier(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Those than which none has fewer layers and is as accurate, by increasing layers."""
    kept: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda each: (each.layers, -each.answers.accuracy)):
        if not kept or candidate.answers.accuracy > kept[-1].answers.accuracy:
            kept.append(candidate)
    return kept


def loses_little(candidate: Candidate, full: Answers, most_loss: float) -> bool:
    """Whether a loss of accuracy is small enough, a standard error added to it.

    The best of many on the same sequences looks better than it is.

    Args:
        most_loss: of accuracy, against the full model.
    """
    gained, error = difference(candidate.answers, full)
    return gained - error >= -most_loss


def promising(
    candidates: Iterable[Candidate], full: Answers, most_loss: float, most: int
) -> list[Candidate]:
    """Those to measure: the ones with the fewest layers that lose little, and a part of the
    frontier.

    Args:
        most: of each kind.
    """
    candidates = sorted(candidates, key=lambda each: each.layers)
    good = [each for each in candidates if loses_little(each, full, most_loss)][:most]
    others = [each for each in frontier(candidates) if each not in good]
    step = max(1, -(-len(others) // most))
    return sorted([*good, *others[::step]], key=lambda each: each.layers)
