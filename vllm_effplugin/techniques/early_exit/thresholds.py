"""Thresholds that keep a promise: agreement with the full model, with a stated confidence.

All gates together follow one number, a price: how likely a token may be wrong per share of the
layers that it saves. At a price `p`, a token leaves at an exit that saves a share `s` of the layers
when its estimated probability of being wrong is at most `p * s`. The estimate comes from text apart
(logistic regression of being right on the gate's logit, Platt scaling), and so does the first price
worth trying. Prices are tried from there upwards on held-out text, each as a hypothesis "agreement
is too low"; the last one that is rejected before the first that is not gives the thresholds. Such
fixed-sequence testing keeps the confidence of a single test, however many prices there are (Learn
then Test, arXiv 2110.01052, section 4.2).

A test is the exact binomial bound of Clopper and Pearson. Tokens of a sequence are alike, so it
counts as many tokens as the sequences' scatter says they are worth (Korn and Graubard 1998).

Shapes: `M` sequences, `S` positions, `E` exits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special, stats

from vllm_effplugin.techniques.early_exit.config import NEVER
from vllm_effplugin.techniques.early_exit.passage import STAYS

PRICES = np.geomspace(0.02, 20.0, 121)
"""From almost nothing to any token that is not certainly wrong."""

START = 0.1
"""Share of the wrong tokens allowed from which prices are tried: below, nothing is at stake."""

HIGHEST = 1 - 1e-6
"""Of a threshold that tokens may reach; thresholds are stored in single precision."""


@dataclass(frozen=True)
class Sample:
    """What gates and exits said of some text.

    Attributes:
        confidence: `[E, M, S]`, the gates' confidence.
        agrees: `[E, M, S]`, whether the exit's token is the full model's.
    """

    confidence: np.ndarray
    agrees: np.ndarray

    def only(self, exits: Sequence[int]) -> Sample:
        """The sample of some of the exits."""
        return Sample(self.confidence[list(exits)], self.agrees[list(exits)])

    def fires(self, thresholds: Sequence[float]) -> np.ndarray:
        """`[M, S]`: the first exit whose threshold is reached; -1 for none."""
        fires = np.full(self.agrees.shape[1:], STAYS)
        for exit in reversed(range(len(thresholds))):
            if thresholds[exit] < NEVER:
                fires[self.confidence[exit] >= thresholds[exit]] = exit
        return fires

    def wrong(self, fires: np.ndarray) -> np.ndarray:
        """`[M, S]`: tokens that leave with another token than the full model's."""
        wrong = np.zeros(fires.shape, dtype=bool)
        for exit, agrees in enumerate(self.agrees):
            wrong |= (fires == exit) & ~agrees
        return wrong


def auroc(sample: Sample) -> list[float]:
    """For each exit, how often a right token has a higher confidence than a wrong one.

    0.5 is chance, 1 a gate that knows; NaN where all tokens are right, or none.
    """
    found = []
    for confidence, agrees in zip(sample.confidence, sample.agrees, strict=True):
        right, ranks = agrees.ravel(), stats.rankdata(confidence.ravel())
        count, others = int(right.sum()), int((~right).sum())
        above = float(ranks[right].sum()) - count * (count + 1) / 2
        found.append(above / (count * others) if count and others else float("nan"))
    return found


def disagreement_bound(wrong: np.ndarray, confidence: float) -> float:
    """Upper confidence bound of the share of wrong tokens, from `[M, S]` sequences.

    Args:
        confidence: one-sided, such as 0.95.
    """
    sequences, count = len(wrong), wrong.size
    share = float(wrong.mean())
    effective = float(count)
    if 0 < share < 1 and sequences > 1:
        variance = float(np.var(wrong.mean(1), ddof=1)) / sequences
        if variance > 0:
            worth = share * (1 - share) / variance
            # The variance itself is an estimate from few sequences.
            ratio = stats.t.ppf(confidence, count - 1) / stats.t.ppf(confidence, sequences - 1)
            effective = min(effective, worth * ratio**2)
    hits = share * effective
    return float(stats.beta.ppf(confidence, hits + 1, effective - hits)) if share < 1 else 1.0


class Path:
    """Thresholds by price, learnt from text apart.

    Args:
        sample: of that text.
        savings: `[E]`, the share of layers that an exit saves.
    """

    def __init__(self, sample: Sample, savings: Sequence[float]) -> None:
        self._sample, self._savings = sample, savings
        self._scales = [
            _platt(confidence.ravel(), agrees.ravel())
            for confidence, agrees in zip(sample.confidence, sample.agrees, strict=True)
        ]

    def thresholds(self, price: float) -> list[float]:
        """The confidence at which tokens leave, per exit."""
        return [
            self._threshold(scale, 1 - price * saving)
            for scale, saving in zip(self._scales, self._savings, strict=True)
        ]

    @staticmethod
    def _threshold(scale: tuple[float, float], right: float) -> float:
        """Where tokens are right with a probability."""
        slope, offset = scale
        if right <= 0:
            return 0.0
        if slope <= 0:
            return NEVER  # the gate knows nothing
        return min(float(special.expit((special.logit(right) - offset) / slope)), HIGHEST)

    def first_price(self, disagreement: float) -> float:
        """The first at which as many tokens are wrong; the last if none is so bad."""
        for price in PRICES.tolist():
            fires = self._sample.fires(self.thresholds(price))
            if self._sample.wrong(fires).mean() >= disagreement:
                return price
        return float(PRICES[-1])

    def last_price(self, disagreement: float) -> float:
        """The last before more tokens than that are wrong; the first if that is too many."""
        best = float(PRICES[0])
        for price in PRICES.tolist():
            fires = self._sample.fires(self.thresholds(price))
            if self._sample.wrong(fires).mean() > disagreement:
                break
            best = price
        return best


def _platt(confidence: np.ndarray, agrees: np.ndarray) -> tuple[float, float]:
    """Slope and offset of the logit of being right, over the logit of the confidence."""
    logit = special.logit(np.clip(confidence.astype(np.float64), 1e-6, 1 - 1e-6))
    sign = np.where(agrees, 1.0, -1.0)

    def loss(scale: np.ndarray) -> tuple[float, np.ndarray]:
        margin = sign * (scale[0] * logit + scale[1])
        slack = -sign * special.expit(-margin)
        return float(np.logaddexp(0, -margin).mean()), np.array(
            [(slack * logit).mean(), slack.mean()]
        )

    slope, offset = optimize.minimize(loss, np.array([1.0, 0.0]), jac=True).x
    return float(slope), float(offset)


@dataclass(frozen=True)
class Promise:
    """Thresholds, and what they were found to keep on held-out text.

    Attributes:
        price: their place on the path.
        thresholds: one per exit.
        agreement: share of held-out tokens that are the full model's.
        at_least: lower confidence bound of the agreement.
    """

    price: float
    thresholds: list[float]
    agreement: float
    at_least: float


def certify(
    path: Path, held_out: Sample, min_agreement: float, confidence: float
) -> Promise | None:
    """The farthest point of the path that keeps the agreement; None if the first does not.

    Args:
        min_agreement: share of tokens that have to be the full model's.
        confidence: with which they are, on text like the held-out one.
    """
    kept: Promise | None = None
    first = path.first_price(START * (1 - min_agreement))
    for price in PRICES[first <= PRICES].tolist():
        thresholds = path.thresholds(price)
        wrong = held_out.wrong(held_out.fires(thresholds))
        at_least = 1 - disagreement_bound(wrong, confidence)
        if at_least < min_agreement:
            break
        kept = Promise(price, thresholds, 1 - float(wrong.mean()), at_least)
    return kept
