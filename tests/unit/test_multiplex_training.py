"""Training multiplexers, what company does to accuracy, and which points are written."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.tiny import CLASSES, VOCAB, make_classifier
from vllm_effplugin.preparation.backbone import Backbone, load_backbone
from vllm_effplugin.preparation.classifier import own_head
from vllm_effplugin.preparation.states import capture
from vllm_effplugin.techniques.multiplex.accuracy import (
    company,
    grouped_probabilities,
    in_company,
    random_groups,
)
from vllm_effplugin.techniques.multiplex.config import MULTIPLEXERS
from vllm_effplugin.techniques.multiplex.features import Lower, capture_lower
from vllm_effplugin.techniques.multiplex.layers import Multiplexer
from vllm_effplugin.techniques.multiplex.prepare import choose
from vllm_effplugin.techniques.multiplex.reference import ReferenceMultiplexer
from vllm_effplugin.techniques.multiplex.report import PointReport
from vllm_effplugin.techniques.multiplex.training import (
    MultiplexSettings,
    MultiplexTrainer,
    cosine_loss,
    info_nce,
)

DEPTH = 8


def texts(count: int, seed: int = 0) -> tuple[list[list[int]], Tensor]:
    """Sequences, and a class that their last token tells."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    lengths = torch.randint(1, 9, (count,), generator=generator).tolist()
    found = [
        [*torch.randint(20, VOCAB, (length,), generator=generator).tolist(), 3 + int(label)]
        for length, label in zip(lengths, labels, strict=True)
    ]
    return found, labels


@pytest.fixture(scope="module", params=["Llama", "Bert"])
def classifier(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Backbone, tuple[Tensor, Tensor | None], Path]:
    family = request.param
    model = make_classifier(tmp_path_factory.mktemp("classifier") / family, family)
    architecture = f"{family}ForSequenceClassification"
    head = own_head(model, {"architectures": [architecture]})
    assert head is not None
    return load_backbone(model, architecture, torch.float32), head, model


def test_a_replay_is_the_reference(classifier) -> None:
    """Batches of composites against one at a time."""
    backbone, head, _ = classifier
    sequences, _ = texts(30)
    torch.manual_seed(0)
    layer = Multiplexer(backbone.hidden_size, 3).eval()
    tensors = {f"{MULTIPLEXERS}.3.{n}": t for n, t in layer.state_dict().items()}
    plain = ReferenceMultiplexer(backbone, head, DEPTH, tensors)
    lower = capture_lower(backbone, sequences, DEPTH, "fp32")
    lower = Lower(_exact(backbone, sequences), lower.lengths, DEPTH)
    groups = random_groups(lower.lengths, 3, seed=1)
    found = grouped_probabilities(backbone, layer, lower, groups, head, "fp32")
    assert groups.shape == (10, 3)
    for group in groups.tolist():
        expected = torch.tensor(plain([sequences[row] for row in group]))
        assert torch.allclose(found[group], expected, atol=1e-4)


def _exact(backbone: Backbone, sequences: list[list[int]]) -> Tensor:
    """The states in fp32, which are kept in bf16."""
    with torch.inference_mode():
        parts = [
            backbone.below(torch.tensor([ids]), torch.tensor([len(ids)]), DEPTH)[0]
            for ids in sequences
        ]
    return torch.cat(parts).clone()


def test_captured_states_are_those_of_each_text(classifier) -> None:
    backbone, _, _ = classifier
    sequences, _ = texts(20)
    lower = capture_lower(backbone, sequences, DEPTH, "fp32")
    assert torch.allclose(lower.states.float(), _exact(backbone, sequences), atol=0.05, rtol=0.02)
    hidden, lengths = lower.padded(torch.tensor([[3, 5], [0, 1]]))
    assert lengths.tolist() == [
        [len(sequences[3]), len(sequences[5])],
        [len(sequences[0]), len(sequences[1])],
    ]
    start = sum(len(each) for each in sequences[:5])
    assert torch.equal(hidden[0, 1, : lengths[0, 1]], lower.states[start : start + lengths[0, 1]])
    assert not hidden[0, 1, lengths[0, 1] :].any()


def test_training_teaches_and_goes_on_where_it_stopped(classifier, tmp_path) -> None:
    backbone, head, _ = classifier
    sequences, _ = texts(600)
    teacher = capture(backbone, sequences, ())[0]
    weight, bias = head
    logits = functional.linear(teacher.float(), weight, bias)
    # A random head prefers a class; here all are as likely.
    mean, deviation = logits.mean(0), logits.std(0)
    shift = -mean if bias is None else bias - mean
    head = weight / deviation[:, None], shift / deviation
    alone = functional.linear(teacher.float(), *head).softmax(-1)
    labels = alone.argmax(-1)  # what the frozen model says is right
    lower = capture_lower(backbone, sequences, DEPTH, "fp32")

    def trainer() -> MultiplexTrainer:
        torch.manual_seed(3)
        layers = [Multiplexer(backbone.hidden_size, size) for size in (2, 3)]
        for layer in layers:
            layer.initialise()
        settings = MultiplexSettings(epochs=10, batch=30, learning_rate=2e-3)
        return MultiplexTrainer(backbone, layers, lower, teacher, labels, head, settings)

    whole = trainer()
    before = [
        in_company(backbone, layer.eval(), lower, labels, alone, head, "fp32", 2).accuracy
        for layer in whole._layers
    ]
    for layer in whole._layers:
        layer.train()
    whole.train()
    for name, layer in whole.finish().items():
        found = in_company(backbone, layer, lower, labels, alone, head, "fp32", 3)
        assert found.accuracy > max(before[int(name) - 2] + 0.1, 0.6)
        assert 0 < found.flips < 0.5
    trainer().train(tmp_path, stop_after=7)
    resumed = trainer()
    resumed.train(tmp_path)
    for name, value in whole.trainable.items():
        assert torch.equal(value, resumed.trainable[name]), name


def test_info_nce_by_hand() -> None:
    states, teacher = torch.tensor([[1.0, 0], [0, 2]]), torch.tensor([[3.0, 0], [3, 0]])
    # Cosines 1, 1 and 0, 0: both teachers look alike.
    assert float(info_nce(states, teacher, 0.5)) == pytest.approx(math.log(2))
    apart = torch.tensor([[3.0, 0], [0, 1]])
    assert float(info_nce(states, apart, 0.5)) == pytest.approx(math.log(1 + math.exp(-2)))


def test_cosine_loss_by_hand() -> None:
    """Partners push away where their label is another, and only then."""
    states = torch.tensor([[[1.0, 0], [1, 0]]])
    teacher = torch.tensor([[[1.0, 0], [1, 1]]])
    own = (0 + 1 - 0.5**0.5) / 2
    same, other = torch.tensor([[4, 4]]), torch.tensor([[4, 5]])
    assert float(cosine_loss(states, teacher, same)) == pytest.approx(own)
    assert float(cosine_loss(states, teacher, other)) == pytest.approx(own + (0.5**0.5 + 1) / 2)


def test_what_company_does() -> None:
    answers = np.array([[0, 1, 1, 0], [0, 1, 0, 0], [0, 1, 1, 1]])
    found = company(answers, np.array([0, 1, 1, 1]), np.array([0, 1, 1, 1]))
    assert found.accuracy == pytest.approx(9 / 12)
    assert found.spread == pytest.approx(np.std([3 / 4, 2 / 4, 4 / 4], ddof=1))
    # Of the three pairs of groupings, two tell the last two texts apart.
    assert found.flips == pytest.approx((2 / 3 + 2 / 3) / 4)
    assert found.difference == pytest.approx(-1 / 4)
    paired = np.array([0, 0, -1 / 3, -2 / 3])
    assert found.difference_se == pytest.approx(paired.std(ddof=1) / 2)


def test_random_groups_are_of_similar_lengths() -> None:
    lengths = torch.randint(1, 300, (1000,), generator=torch.Generator().manual_seed(0))
    for size in (2, 3, 8):
        groups = random_groups(lengths, size, seed=4)
        rows = groups.flatten().tolist()
        assert len(set(rows)) == len(rows) >= 1000 - 2 * size - 64 % size * 16
        waste = lengths[groups].amax(1).sum() * size / lengths[groups].sum()
        assert waste < 1.03 * 1.06 ** (size - 1)
        assert not torch.equal(groups, random_groups(lengths, size, seed=5))


def report(
    size: int, depth: int, difference: float, ratio: float, lowest: float = 1.1
) -> PointReport:
    return PointReport(
        depth=depth,
        size=size,
        mixing="reversible",
        accuracy=0.8 + difference,
        spread=0.01,
        difference=difference,
        error=0.002,
        flips=0.1,
        requests_s=100 * ratio,
        ratio=ratio,
        lowest=lowest,
    )


def test_what_is_written() -> None:
    alone = report(1, 0, 0.0, 1.0)
    slow, fast, wrong = (
        report(2, 15, -0.004, 1.3),
        report(2, 6, -0.006, 1.6),
        report(4, 6, -0.05, 2.4),
    )
    assert choose([alone, slow, fast, wrong], 0.01, 1.03) == [fast]
    assert choose([alone, slow, fast, wrong], 0.06, 1.03) == [fast, wrong]
    assert choose([alone, slow, fast], 0.007, 1.03) == [slow]
    assert choose([alone, slow], 0.005, 1.03) == []
    assert choose([alone, report(2, 6, 0.0, 0.98, lowest=0.95)], 0.01, 0.9) != []
    assert (
        choose([alone, report(2, 6, 0.0, 1.02), report(2, 15, 0.0, 1.5, lowest=0.99)], 0.01, 1.03)
        == []
    )
