"""Calibration error, temperatures and prediction sets."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_effplugin.techniques.joint_exit.uncertainty import (
    FEWEST,
    calibration_difference,
    calibration_error,
    conformal_threshold,
    conformal_thresholds,
    fit_temperature,
    prediction_set,
)


def sample(count: int, sharpness: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """`[N, 3]` probabilities and classes drawn from them before they were made sharper."""
    chance = np.random.default_rng(seed)
    logits = chance.normal(size=(count, 3)) * 1.5
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (p.cumsum(1) > chance.random((count, 1))).argmax(1)
    sharp = np.exp(logits * sharpness)
    return sharp / sharp.sum(1, keepdims=True), labels


def test_calibration_error_by_hand() -> None:
    p = np.array([[0.9, 0.1], [0.9, 0.1], [0.62, 0.38]])
    # Right in one of two at 0.9, and at 0.62: (|1.8 - 1| + |0.62 - 1|) / 3.
    assert calibration_error(p, np.array([0, 1, 0])) == pytest.approx((0.8 + 0.38) / 3)
    assert calibration_error(np.array([[1.0, 0.0]]), np.array([0])) == 0


def test_overconfidence_shows_and_a_temperature_cures_it() -> None:
    honest, labels = sample(20000, 1.0)
    sharp, _ = sample(20000, 2.0)
    assert calibration_error(honest, labels) < 0.02
    assert calibration_error(sharp, labels) > 0.08
    assert fit_temperature(sharp, labels) == pytest.approx(2.0, rel=0.05)
    assert fit_temperature(honest, labels) == pytest.approx(1.0, rel=0.05)


def test_a_difference_of_calibration_errors_has_an_honest_standard_error() -> None:
    found = []
    for seed in range(40):
        honest, labels = sample(800, 1.0, seed)
        sharp, _ = sample(800, 1.3, seed)
        found.append(calibration_difference(sharp, honest, labels))
    differences, errors = np.array(found).T
    assert differences.mean() > 0.02
    # Over samples, differences vary as much as the bootstrap of one says.
    assert errors.mean() == pytest.approx(differences.std(ddof=1), rel=0.3)
    honest, labels = sample(800, 1.0)
    assert calibration_difference(honest, honest, labels) == (0.0, 0.0)


def test_a_few_without_an_error_are_not_certain() -> None:
    p = np.array([[0.8 + 0.008 * i, 0.2 - 0.008 * i] for i in range(25)])
    labels = np.zeros(25, dtype=int)
    scaled = p ** (1 / fit_temperature(p, labels))
    scaled /= scaled.sum(1, keepdims=True)
    assert 1 / 54 < float(scaled[:, 1].mean()) < 2 / 27


def test_conformal_threshold_by_hand() -> None:
    scores = np.array([0.9, 0.5, 0.7, 0.1])
    # ceil(5 * 0.6) = 3rd largest of four.
    assert conformal_threshold(scores, 0.6) == 0.5
    assert conformal_threshold(scores, 0.8) == 0.1
    assert conformal_threshold(scores, 0.9) == 0.0, "four are too few for 0.9: everything is in"


@pytest.mark.parametrize("coverage", [0.8, 0.9, 0.95])
def test_sets_hold_the_true_class_as_often_as_promised(coverage: float) -> None:
    """Per exit, though the exits are differently sure of themselves."""
    parts = [sample(3000, sharpness, seed) for seed, sharpness in enumerate((1.0, 2.5))]
    p, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
    exits = np.repeat([0, 1], 3000)
    thresholds = conformal_thresholds(p, labels, exits, 2, coverage)
    for exit, sharpness in enumerate((1.0, 2.5)):
        fresh, truth = sample(20000, sharpness, 10 + exit)
        sets = [prediction_set(row.tolist(), thresholds[exit]) for row in fresh]
        covered = np.mean([label in each for label, each in zip(truth, sets, strict=True)])
        assert covered == pytest.approx(coverage, abs=0.02)


def test_few_sequences_share_a_threshold() -> None:
    p, labels = sample(200 + FEWEST + FEWEST + 1, 1.0)
    exits = np.array([0] * 200 + [1] * FEWEST + [2] * (FEWEST + 1))
    found = conformal_thresholds(p, labels, exits, 4, 0.8)
    scores = p[np.arange(len(labels)), labels]
    shared = conformal_threshold(scores, 0.8)
    assert found[1] == found[3] == shared
    assert found[2] == conformal_threshold(scores[exits == 2], 0.8) != shared


def test_prediction_set() -> None:
    assert prediction_set([0.2, 0.5, 0.3], 0.3) == [1, 2]
    assert prediction_set([0.2, 0.5, 0.3], 0.9) == []
