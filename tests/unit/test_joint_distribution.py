"""JEI-DNN's equations, against the formulas as the paper states them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_effplugin.techniques.joint_exit.distribution import (
    Inference,
    exit_distribution,
    exits_taken,
    measures,
)
from vllm_effplugin.techniques.joint_exit.training import (
    gate_logits,
    gate_loss,
    head_loss,
    importance,
)

gate_columns = st.lists(
    st.lists(st.floats(0, 1, width=32), min_size=3, max_size=3), min_size=1, max_size=6
)


def by_formula(gates: list[float]) -> tuple[list[float], list[float]]:
    """`P_l` and `c_l`, one sequence."""
    probability = [max(0.0, min(gate, 1 - sum(gates[:index]))) for index, gate in enumerate(gates)]
    conditional: list[float] = []
    for p in probability:
        stays = math.prod(1 - c for c in conditional)
        conditional.append(min(1.0, max(0.0, p / stays)) if stays > 0 else float(p > 0))
    return probability, conditional


@settings(deadline=None)
@given(gate_columns)
def test_exit_distribution(rows: list[list[float]]) -> None:
    gates = torch.tensor(rows, dtype=torch.float64)
    found = exit_distribution(gates)
    assert (found >= 0).all()
    assert (found[:-1].sum(0) <= 1 + 1e-9).all()
    torch.testing.assert_close(found.sum(0), torch.ones(3, dtype=torch.float64))
    for column in range(3):
        expected, _ = by_formula(gates[:, column].tolist())
        assert found[:-1, column].tolist() == pytest.approx(expected, abs=1e-12)


@settings(deadline=None)
@given(gate_columns)
def test_a_sequence_leaves_at_the_first_exit_with_half(rows: list[list[float]]) -> None:
    gates = torch.tensor(rows, dtype=torch.float64)
    taken = exits_taken(gates)
    for column, exit in enumerate(taken.tolist()):
        _, conditional = by_formula(gates[:, column].tolist())
        if any(abs(c - 0.5) < 1e-9 for c in conditional):
            continue  # rounding decides
        expected = next((i for i, c in enumerate(conditional) if c >= 0.5), len(rows))
        assert exit == expected


@settings(deadline=None)
@given(gate_columns)
def test_inference_does_not_depend_on_companions(rows: list[list[float]]) -> None:
    """Asked about some sequences only, it decides for each as if it were alone."""
    gates = torch.tensor(rows, dtype=torch.float64)
    together = exits_taken(gates)
    inference = Inference(3, gates)
    left = torch.full((3,), len(rows))
    asked = torch.arange(3)
    for exit, row in enumerate(gates):
        leaves = inference.leaves(row[asked], asked)
        left[asked[leaves]] = exit
        asked = asked[~leaves]
    assert left.tolist() == together.tolist()


def test_measures() -> None:
    p = torch.tensor([[0.7, 0.2, 0.1], [1.0, 0.0, 0.0]])
    found = measures(p)
    entropy = -(0.7 * math.log(0.7) + 0.2 * math.log(0.2) + 0.1 * math.log(0.1))
    q = np.array([0.49, 0.04, 0.01]) / 0.54
    assert found[0].tolist() == pytest.approx([0.7, entropy, 0.5, -(q * np.log(q)).sum()], abs=1e-6)
    assert found[1].tolist() == pytest.approx([1, 0, 1, 0], abs=1e-6)


# --- Losses --------------------------------------------------------------------------------------


def example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A parameter per head, cross-entropies that grow with it, and exit probabilities."""
    torch.manual_seed(0)
    scale = torch.ones(3, 1, requires_grad=True)
    return scale, scale * torch.rand(3, 8), exit_distribution(torch.rand(2, 8))


def test_the_heads_loss_is_weighted_by_where_sequences_leave() -> None:
    """Its value is the mean cross-entropy; its gradient is not that of the mean."""
    scale, cross_entropy, probability = example()
    [plain] = torch.autograd.grad(cross_entropy.mean(), scale, retain_graph=True)
    loss = head_loss(cross_entropy, probability)
    [weighted] = torch.autograd.grad(loss, scale, retain_graph=True)
    torch.testing.assert_close(loss, cross_entropy.mean())
    assert not torch.allclose(plain, weighted, rtol=0.05)
    ratio = (cross_entropy.sum() / (probability * cross_entropy).sum()).detach()
    expected = (probability * cross_entropy / scale).mean(1, keepdim=True) * ratio / 3
    torch.testing.assert_close(weighted, expected.detach())
    [released] = torch.autograd.grad(head_loss(cross_entropy, probability, detach=False), scale)
    torch.testing.assert_close(released, plain)


def test_the_heads_loss_survives_exits_that_nobody_takes() -> None:
    cross_entropy = torch.rand(3, 4, requires_grad=True)
    loss = head_loss(cross_entropy, torch.zeros(3, 4))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(cross_entropy.grad).all()


def test_gates_learn_where_the_best_exit_is_or_was() -> None:
    # Best: exit 0, exit 1, the full model, and exit 1 once cost counts.
    cross_entropy = torch.tensor(
        [[0.1, 0.9, 0.9, 0.50], [0.2, 0.1, 0.9, 0.20], [0.3, 0.8, 0.1, 0.15]]
    )
    cost = torch.tensor([0.3, 0.6, 1.0])
    target = torch.tensor([[1.0, 0, 0, 0], [1.0, 1, 0, 1]])
    logits = torch.zeros(2, 4)
    weights = torch.tensor([[3.0], [1.0]])  # negatives over positives, at least 1
    expected = (math.log(2) * (weights * target + 1 - target)).mean()
    assert float(gate_loss(logits, cross_entropy, cost, 0.2)) == pytest.approx(float(expected))
    confident = 20 * (2 * target - 1)
    assert float(gate_loss(confident, cross_entropy, cost, 0.2)) == pytest.approx(0, abs=1e-6)


def test_the_weight_of_leaving_is_bounded() -> None:
    cross_entropy = torch.ones(2, 100)
    cross_entropy[1] = 0.0  # the full model is best
    cross_entropy[0, 0] = -1.0  # but once
    loss = gate_loss(torch.zeros(1, 100), cross_entropy, torch.tensor([0.5, 1.0]), 0.0)
    assert float(loss) == pytest.approx(math.log(2) * (99 + 5) / 100)


def test_gate_logits() -> None:
    p = torch.tensor([[[0.7, 0.3]], [[0.4, 0.6]]])
    weight, bias = torch.tensor([[1.0, 0, 0, 0], [0, 0, 2.0, 0]]), torch.tensor([0.5, -1.0])
    assert gate_logits(weight, bias, p).flatten().tolist() == pytest.approx([1.2, -0.6])


def test_warm_up_weighs_early_exits_more() -> None:
    assert importance(4).tolist() == pytest.approx([3 / 7, 2 / 7, 1 / 7, 1 / 7])
