"""How far probabilities can be trusted: calibration error, and conformal prediction sets.

JEI-DNN (arXiv 2310.09163) measures both where each sequence got its answer. Shapes: `N` sequences,
`C` classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]

BINS = 15
RESAMPLES = 500
"""Of the bootstrap."""

FEWEST = 20
"""Sequences up to which an exit shares its threshold with the others."""

TEMPERATURES = np.exp(np.linspace(-1.5, 1.5, 121))
_TINY = 1e-12


def calibration_error(probabilities: Floats, labels: Ints, bins: int = BINS) -> float:
    """Expected calibration error of `[N, C]` probabilities, over bins of equal width.

    The mean distance between the probability of the most likely class and how often it is right.
    """
    place, gap = _gaps(probabilities, labels, bins)
    return float(np.abs(np.bincount(place, gap, bins)).sum()) / max(1, len(labels))


def _gaps(probabilities: Floats, labels: Ints, bins: int) -> tuple[Ints, Floats]:
    """`[N]` bin of each sequence, and how much surer of its answer it is than right (0 or 1)."""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    return np.minimum((confidence * bins).astype(int), bins - 1), confidence - right


def calibration_difference(
    probabilities: Floats, others: Floats, labels: Ints, bins: int = BINS
) -> tuple[float, float]:
    """Calibration error less that of other probabilities of the same sequences; standard error.

    The error is a bootstrap's: both are taken of the same resampled sequences.
    """
    pairs = [_gaps(p, labels, bins) for p in (probabilities, others)]
    generator = np.random.default_rng(0)
    count = len(labels)
    found = []
    for _ in range(RESAMPLES):
        drawn = np.bincount(generator.integers(count, size=count), minlength=count)
        one, other = (np.abs(np.bincount(b, drawn * gap, bins)).sum() / count for b, gap in pairs)
        found.append(one - other)
    difference = calibration_error(probabilities, labels, bins)
    difference -= calibration_error(others, labels, bins)
    return difference, float(np.std(found, ddof=1))


def paired_difference(right: NDArray[np.bool_], others: NDArray[np.bool_]) -> tuple[float, float]:
    """Accuracy less that of other answers to the same sequences, and its standard error.

    The error counts one sequence more as different than there are: with none it would be 0, however
    few the sequences.

    Args:
        right, others: `[N]` whether answers are right.
    """
    changes = right.astype(float) - others
    spread = (np.square(changes).sum() + 1) / len(changes) - changes.mean() ** 2
    return float(changes.mean()), math.sqrt(max(spread, 0.0) / len(changes))


def fit_temperature(probabilities: Floats, labels: Ints) -> float:
    """What divides the logits of `[N, C]` probabilities for the smallest mean cross-entropy.

    Labels count as wrong once in `N + 2` (Platt 1999), so that a few sequences without an error do
    not make all others certain.
    """
    doubt = 1 / (len(labels) + 2)
    logits = np.log(np.maximum(probabilities, _TINY))
    losses = []
    for temperature in TEMPERATURES:
        scaled = logits / temperature
        scaled = scaled - scaled.max(1, keepdims=True)
        log_p = scaled - np.log(np.exp(scaled).sum(1, keepdims=True))
        own = log_p[np.arange(len(labels)), labels]
        others = (log_p.sum(1) - own) / max(1, log_p.shape[1] - 1)
        losses.append(-float(((1 - doubt) * own + doubt * others).mean()))
    return float(TEMPERATURES[int(np.argmin(losses))])


def conformal_threshold(scores: Floats, coverage: float) -> float:
    """The probability that puts a class into the set, from those of the true classes.

    Split conformal prediction: with `n` sequences, the `ceil((n + 1) coverage)`-th largest, which
    promises the coverage for one more sequence of their kind. 0 where `n` is too small for that.
    """
    rank = math.ceil((len(scores) + 1) * coverage)
    if rank > len(scores):
        return 0.0
    return float(np.sort(scores)[::-1][rank - 1])


def conformal_thresholds(
    probabilities: Floats, labels: Ints, exits: Ints, count: int, coverage: float
) -> tuple[float, ...]:
    """One threshold per exit and one for the full model; a shared one where few got their answer.

    Args:
        probabilities: `[N, C]` where each sequence got its answer.
        exits: `[N]` where that was.
        count: of the exits, the full model included.
    """
    scores = probabilities[np.arange(len(labels)), labels]
    shared = conformal_threshold(scores, coverage)
    return tuple(
        conformal_threshold(scores[exits == exit], coverage)
        if (exits == exit).sum() > FEWEST
        else shared
        for exit in range(count)
    )


def prediction_set(probabilities: Sequence[float], threshold: float) -> list[int]:
    """Classes with at least the threshold's probability.

    None where the model is right more often than the coverage asks for.
    """
    return [i for i, p in enumerate(probabilities) if p >= threshold]
