"""Training heads and gates, and choosing among what comes out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vllm_effplugin.techniques.joint_exit.candidates import (
    Answers,
    Candidate,
    Held,
    difference,
    fixed_candidates,
    frontier,
    full_answers,
    joint_candidates,
    loses_little,
    promising,
    threshold_candidates,
)
from vllm_effplugin.techniques.joint_exit.config import HEADS
from vllm_effplugin.techniques.joint_exit.distribution import exits_taken
from vllm_effplugin.techniques.joint_exit.measure import Speed
from vllm_effplugin.techniques.joint_exit.prepare import choose, warn_of_other_classes
from vllm_effplugin.techniques.joint_exit.report import MethodReport
from vllm_effplugin.techniques.joint_exit.training import Joint, JointTrainer, TrainSettings

DEPTHS, LAYERS = (4, 8), 12
COST = (4 / 12, 8 / 12, 1.0)


def states(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two classes; half of the sequences show theirs at every exit, the others at the end only.

    In dimension 0, far from zero and on a large scale; the other dimensions are noise.
    """
    chance = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count,), generator=chance)
    easy = torch.rand(count, generator=chance) < 0.5
    found = torch.randn(3, count, 8, generator=chance)
    sign = 2.0 * labels - 1
    found[:2, :, 0] = torch.where(easy, 4 * sign, found[:2, :, 0])
    found[2, :, 0] = 4 * sign + found[2, :, 0]
    found[..., 0] = 50 * found[..., 0] + 300
    return found, labels


def held(seed: int = 1) -> Held:
    found, labels = states(2000, seed)
    return Held(found, labels, torch.ones(2000))


@pytest.fixture(scope="module")
def trainer() -> JointTrainer:
    found, labels = states(4000)
    return JointTrainer(found, labels, 2, COST, TrainSettings(warm_up_epochs=4, epochs=16))


def accuracies(heads: Joint, sample: Held) -> list[float]:
    right = heads.logits(sample.states).argmax(-1) == sample.labels
    return right.float().mean(1).tolist()


def test_heads_learn_what_their_states_show(trainer: JointTrainer) -> None:
    """On states as they are, though they were trained on standardised ones."""
    early, late, final = accuracies(trainer.warm_up(), held())
    assert early == pytest.approx(0.75, abs=0.03)
    assert late == pytest.approx(0.75, abs=0.03)
    assert final > 0.99
    assert (
        exits_taken(trainer.warm_up().gates(torch.rand(2, 5, 2).softmax(-1)).sigmoid()).tolist()
        == [2] * 5
    )


def test_gates_let_the_easy_half_go(trainer: JointTrainer) -> None:
    sample, heads = held(), trainer.train(0.2)
    full = full_answers(heads, sample)
    [candidate] = joint_candidates(heads, 0.2, DEPTHS, LAYERS, sample, (0.0,))
    assert candidate.layers < 0.75
    assert candidate.answers.accuracy > full.accuracy - 0.03
    gone = candidate.answers.exits == 0
    assert 0.4 < float(gone.float().mean()) < 0.6


def test_cost_makes_gates_let_go_earlier(trainer: JointTrainer) -> None:
    sample = held()

    def layers(trade_off: float) -> float:
        heads = trainer.train(trade_off)
        [candidate] = joint_candidates(heads, trade_off, DEPTHS, LAYERS, sample, (0.0,))
        return candidate.layers

    assert layers(0.01) > layers(3.0) + 0.1


def test_gates_influence_heads_only_where_r_is_detached() -> None:
    found, labels = states(2000)

    def heads(detach: bool) -> tuple[Tensor, Tensor]:
        settings = TrainSettings(warm_up_epochs=1, epochs=6, phase=20)
        trainer = JointTrainer(found, labels, 2, COST, settings)
        one, other = (trainer.train(trade_off, detach=detach) for trade_off in (0.01, 3.0))
        return one.weight, other.weight

    # With r in the gradient the heads' loss is plain cross-entropy, whatever the gates say.
    torch.testing.assert_close(*heads(False), rtol=1e-3, atol=1e-5)
    one, other = heads(True)
    assert not torch.allclose(one, other, rtol=1e-2, atol=1e-4)


def test_heads_have_their_turn_however_few_the_batches() -> None:
    found, labels = states(128)
    trainer = JointTrainer(found, labels, 2, COST, TrainSettings(warm_up_epochs=1, epochs=8))
    before, after = trainer.warm_up(), trainer.train(0.2)
    assert not torch.equal(before.weight, after.weight)
    assert (after.gate_weight != 0).any()


def test_a_head_that_the_model_has_is_kept() -> None:
    found, labels = states(1000)
    weight, bias = torch.randn(2, 8), torch.randn(2)
    settings = TrainSettings(warm_up_epochs=1, epochs=2, phase=5)
    for own_bias in (bias, None):
        trainer = JointTrainer(found, labels, 2, COST, settings, final=(weight, own_bias))
        for heads in (trainer.warm_up(), trainer.train(0.2)):
            torch.testing.assert_close(heads.weight[-1], weight)
            expected = torch.zeros(2) if own_bias is None else bias
            torch.testing.assert_close(heads.bias[-1], expected, atol=1e-3, rtol=1e-4)


def test_the_full_models_head_is_the_same_for_all_trade_offs() -> None:
    """A checkpoint's is the stock classifier's; held-out answers have to be those it will give."""
    found, labels = states(1000)
    settings = TrainSettings(warm_up_epochs=1, epochs=4, phase=5)
    trainer = JointTrainer(found, labels, 2, COST, settings)
    alone = trainer.warm_up()
    for heads in (trainer.train(0.2), trainer.train(0.2, detach=False)):
        assert torch.equal(heads.weight[-1], alone.weight[-1])
        assert torch.equal(heads.bias[-1], alone.bias[-1])
        assert not torch.equal(heads.weight[0], alone.weight[0])


def test_a_head_without_bias() -> None:
    found, labels = states(1000)
    settings = TrainSettings(warm_up_epochs=2, epochs=2, phase=5)
    trainer = JointTrainer(found, labels, 2, COST, settings, final_bias=False)
    for heads in (trainer.warm_up(), trainer.train(0.2)):
        assert heads.bias[-1].tolist() == [0, 0]
        assert (heads.bias[:-1] != 0).any()


# --- Operating points ----------------------------------------------------------------------------


def test_fixed_and_threshold_points(trainer: JointTrainer) -> None:
    sample, heads = held(), trainer.warm_up()
    fixed = list(fixed_candidates(heads, DEPTHS, LAYERS, sample))
    assert [each.layers for each in fixed] == pytest.approx([4 / 12, 8 / 12])
    assert [each.answers.exits.unique().tolist() for each in fixed] == [[0], [1]]
    [shallow] = [each.only_used() for each in fixed if each.config.exits[0].threshold == 0]
    assert shallow.config.depths == (4,)
    assert shallow.tensors()[f"{HEADS}.weight"].shape == (1, 2, 8)
    [deep] = [each.only_used() for each in fixed if each.config.exits[1].threshold == 0]
    assert deep.config.depths == (8,)
    torch.testing.assert_close(deep.tensors()[f"{HEADS}.weight"], heads.weight[1:2])
    assert deep.answers.exits.unique().tolist() == [0]
    careful = list(threshold_candidates(heads, DEPTHS, LAYERS, sample))
    assert [each.layers for each in careful] == sorted(each.layers for each in careful)
    for each in careful:
        limit = each.config.exits[0].threshold
        left = each.answers.exits < 2
        assert (each.answers.probabilities[left].amax(-1) >= limit).all()


def test_layers_are_weighed_by_length(trainer: JointTrainer) -> None:
    sample = held()
    [candidate] = [
        each
        for each in threshold_candidates(trainer.warm_up(), DEPTHS, LAYERS, sample)
        if each.config.exits[0].threshold == 0.9
    ]
    stay = candidate.answers.exits == 2
    longer = Held(sample.states, sample.labels, 1.0 + 9.0 * stay)
    [again] = [
        each
        for each in threshold_candidates(trainer.warm_up(), DEPTHS, LAYERS, longer)
        if each.config.exits[0].threshold == 0.9
    ]
    depths = torch.tensor([4.0, 8.0, 12.0])[candidate.answers.exits]
    expected = float((depths * longer.lengths).sum() / longer.lengths.sum()) / 12
    assert again.layers == pytest.approx(expected)
    assert again.layers > candidate.layers


def answers(right: list[bool]) -> Answers:
    return Answers(torch.rand(len(right), 2), torch.zeros(len(right)), torch.tensor(right))


def point(layers: float, right: list[bool]) -> Candidate:
    config, heads = None, None
    return Candidate("joint", "", config, heads, answers(right), layers)  # type: ignore[arg-type]


def test_a_difference_is_paired() -> None:
    full = answers([True] * 90 + [False] * 10)
    same = answers([True] * 90 + [False] * 10)
    assert difference(same, full) == (0, pytest.approx(0.01))
    other = answers([False, *[True] * 99])
    gained, error = difference(other, full)
    assert gained == pytest.approx(0.09)
    # 10 gained, 1 lost, and one more that might have been.
    changes = torch.tensor([-1.0, *[0.0] * 89, *[1.0] * 10])
    assert error == pytest.approx(math.sqrt((12 / 100 - float(changes.mean()) ** 2) / 100))


def test_the_fastest_that_loses_little_is_taken() -> None:
    full = answers([True] * 900 + [False] * 100)
    lossy = point(0.3, [True] * 800 + [False] * 200)
    good, better = (point(layers, [True] * 900 + [False] * 100) for layers in (0.5, 0.6))

    def taken(*found: tuple[Candidate, float, float]) -> Candidate | None:
        speeds = [Speed(requests_s=1, ratio=r, lowest=low, classes=[]) for _, r, low in found]
        return choose([each for each, _, _ in found], speeds, full, 0.005).get("joint")

    assert taken((lossy, 3.0, 2.9), (good, 1.5, 1.4), (better, 1.6, 1.5)) is better
    assert taken((lossy, 3.0, 2.9)) is None
    assert taken((good, 1.02, 1.01)) is None, "within the noise"
    assert taken((good, 1.5, 0.9), (better, 1.2, 1.1)) is better, "slower in one round"


def test_few_sequences_prove_little() -> None:
    """None of ten differs; that does not make it certain."""
    same = answers([True] * 9 + [False])
    gained, error = difference(same, same)
    assert gained == 0
    assert error == pytest.approx(0.1)
    assert not loses_little(point(0.5, same.right.tolist()), same, 0.005)
    many = answers([True] * 900 + [False] * 100)
    assert loses_little(point(0.5, many.right.tolist()), many, 0.005)


def test_those_that_surely_lose_little_are_measured() -> None:
    full = answers([True] * 900 + [False] * 100)
    lossy = point(0.3, [True] * 880 + [False] * 120)
    # Loses nothing on average, but on so few sequences that might be luck.
    unsure = point(0.4, [False] * 60 + [True] * 900 + [False] * 40)
    good = point(0.5, [True] * 899 + [False] * 101)
    slow = point(0.6, [True] * 950 + [False] * 50)
    slower = point(0.7, [True] * 940 + [False] * 60)
    points = [slower, slow, good, unsure, lossy]
    fine = [loses_little(each, full, 0.005) for each in points]
    assert fine == [True, True, True, False, False]
    assert frontier(points) == [lossy, unsure, slow]
    # The two with the fewest layers, and of the rest of the frontier as much.
    assert promising(points, full, 0.005, 2) == [lossy, unsure, good, slow]
    assert promising(points, full, 0.05, 1) == [lossy, unsure]


def test_heads_do_not_go_by_what_rounding_takes_away() -> None:
    """States of fp32 that a 16-bit engine will compute; those of bf16 have lost it already."""
    torch.manual_seed(0)
    labels = torch.randint(2, (2000,))
    sign = 2.0 * labels - 1
    # A large entry that hardly varies, and says all; and a small one that says most of it.
    states = torch.stack([50.1 + 0.01 * sign, sign + torch.randn(2000)], 1).expand(2, -1, -1)
    settings = TrainSettings(warm_up_epochs=8)

    def right(states: torch.Tensor, served: torch.Tensor) -> float:
        heads = JointTrainer(states, labels, 2, [0.5, 1.0], settings).warm_up()
        answers = heads.logits(served)[0].argmax(-1)
        return float((answers == labels).float().mean())

    rounded = states.to(torch.bfloat16)
    assert (rounded[0, :, 0] == 50).all()
    assert right(rounded, rounded.float()) == pytest.approx(0.84, abs=0.02)
    assert right(states, rounded.float()) == pytest.approx(0.84, abs=0.02)


def test_temperatures_fit_those_that_leave(trainer: JointTrainer) -> None:
    sample, heads = held(), trainer.warm_up()
    sharp = Joint(4 * heads.weight, 4 * heads.bias, heads.gate_weight, heads.gate_bias)
    candidates = threshold_candidates(sharp, DEPTHS, LAYERS, sample)
    candidate = next(each for each in candidates if each.config.exits[0].threshold == 0.6)
    better = candidate.calibrated(sample.labels)
    assert better.config.exits[0].temperature > 1.5
    assert better.answers.calibration_error(sample.labels) < candidate.answers.calibration_error(
        sample.labels
    )
    torch.testing.assert_close(better.answers.exits, candidate.answers.exits)
    torch.testing.assert_close(better.answers.right, candidate.answers.right)
    exit = candidate.answers.exits == 0
    logits = sharp.logits(sample.states)[0][exit] / better.config.exits[0].temperature
    torch.testing.assert_close(better.answers.probabilities[exit], logits.softmax(-1))


def test_a_point_that_vllm_classifies_otherwise_is_warned_of(caplog) -> None:
    """Its figures are of the replay, not of what is served."""
    report = MethodReport(
        method="joint", name="b=1", accuracy=0.8, difference=0.0, error=0.0, layers=0.5, ece=0.0
    )
    with caplog.at_level("WARNING"):
        warn_of_other_classes(report)
        warn_of_other_classes(report.model_copy(update={"same": 0.985}))
        assert not caplog.records
        warn_of_other_classes(report.model_copy(update={"same": 0.9}))
    assert "b=1" in caplog.text
    assert "0.900" in caplog.text
