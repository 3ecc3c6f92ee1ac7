"""Thresholds, and whether what they promise holds."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_effplugin.techniques.early_exit.thresholds import (
    PRICES,
    Path,
    Sample,
    certify,
    disagreement_bound,
)


def sequences(
    rng: np.random.Generator, count: int, length: int, exits: int, scatter: float
) -> Sample:
    """Tokens of which each is easy to a degree, which its gates see through noise.

    Sequences differ in how easy they are, by `scatter`.
    """
    easy = rng.normal(size=(count, length)) + scatter * rng.normal(size=(count, 1))
    confidence, agrees = [], []
    for exit in range(exits):
        logit = easy + 0.5 * exit
        agrees.append(rng.random(easy.shape) < 1 / (1 + np.exp(-2 * logit)))
        confidence.append(1 / (1 + np.exp(-logit - 0.3 * rng.normal(size=easy.shape))))
    return Sample(np.stack(confidence), np.stack(agrees))


def test_a_token_leaves_at_the_first_exit_that_is_sure() -> None:
    confidence = np.array([[[0.9, 0.1, 0.1, 0.9]], [[0.9, 0.9, 0.1, 0.1]]])
    sample = Sample(confidence, np.array([[[True, True, True, False]], [[False] * 4]]))
    fires = sample.fires([0.5, 0.5])
    assert fires.tolist() == [[0, 1, -1, 0]]
    assert sample.wrong(fires).tolist() == [[False, True, False, True]]
    assert sample.fires([1.0, 0.5]).tolist() == [[1, 1, -1, -1]]


def test_the_bound_of_independent_tokens_is_that_of_clopper_and_pearson() -> None:
    """Published: 10 of 100, one-sided 97.5 %, at most 0.1762."""
    wrong = np.zeros((100, 1), dtype=bool)
    wrong[:10] = True
    assert disagreement_bound(wrong, 0.975) == pytest.approx(0.1762, abs=2e-3)


def test_tokens_that_are_alike_count_for_less() -> None:
    scattered = np.zeros((100, 50), dtype=bool)
    scattered[:, :5] = True
    clustered = np.zeros((100, 50), dtype=bool)
    clustered[:10] = True
    assert disagreement_bound(scattered, 0.95) < 0.11
    assert disagreement_bound(clustered, 0.95) > 0.15


def test_no_error_seen_is_not_no_error() -> None:
    """None of 59 is less than 5 %; and one error more never is a better sign."""
    assert disagreement_bound(np.zeros((59, 1), dtype=bool), 0.95) == pytest.approx(0.05, abs=1e-3)
    wrong = np.zeros((50, 20), dtype=bool)
    bounds = []
    for row in range(4):
        bounds.append(disagreement_bound(wrong, 0.95))
        wrong[row, 0] = True
    assert bounds == sorted(bounds)
    assert disagreement_bound(np.ones((4, 10), dtype=bool), 0.95) == 1


@pytest.mark.parametrize("scatter", [0.0, 0.7])
def test_the_promise_holds_as_often_as_stated(scatter: float) -> None:
    """The agreement of many fresh tokens is below the promise in at most 5 % of the draws."""
    broken = draws = 0
    rng = np.random.default_rng(0)
    truth = sequences(rng, 20000, 20, 2, scatter)
    for _ in range(120):
        path = Path(sequences(rng, 30, 40, 2, scatter), [0.5, 0.2])
        promise = certify(path, sequences(rng, 60, 40, 2, scatter), 0.9, 0.95)
        if promise is None:
            continue
        draws += 1
        wrong = truth.wrong(truth.fires(promise.thresholds)).mean()
        broken += 1 - wrong < 0.9
    assert draws > 60
    assert broken <= 0.05 * draws + 3  # binomial noise of a hundred draws


def test_dearer_prices_let_more_tokens_leave() -> None:
    rng = np.random.default_rng(1)
    sample = sequences(rng, 50, 40, 2, 0.3)
    path = Path(sample, [0.5, 0.2])
    shares = [(sample.fires(path.thresholds(price)) >= 0).mean() for price in PRICES]
    assert shares == sorted(shares)
    assert shares[0] < 0.2
    assert shares[-1] == 1
    first, last = path.first_price(0.02), path.last_price(0.02)
    assert last <= first


def test_an_exit_that_saves_more_may_err_more() -> None:
    """Same gate, same exit, other depth."""
    rng = np.random.default_rng(2)
    one = sequences(rng, 50, 40, 1, 0.0)
    both = Sample(np.repeat(one.confidence, 2, 0), np.repeat(one.agrees, 2, 0))
    shallow, deep = Path(both, [0.6, 0.1]).thresholds(0.5)
    assert shallow < deep
