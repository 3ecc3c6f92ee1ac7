"""Self-distillation: its loss, what it trains, its export and its resumption."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import FAMILIES, LAYERS, VOCAB
from vllm_effplugin.preparation import head as head_module
from vllm_effplugin.preparation.base import load_model
from vllm_effplugin.preparation.head import HeadDivergence
from vllm_effplugin.techniques.layer_parallel import distill
from vllm_effplugin.techniques.layer_parallel.config import LayerParallelConfig
from vllm_effplugin.techniques.layer_parallel.distill import (
    Distiller,
    DistillSettings,
    apply_replacements,
)
from vllm_effplugin.techniques.layer_parallel.reference import ReferenceDecoder
from vllm_effplugin.techniques.layer_parallel.search import partition_units

Tiny = Callable[..., Path]
TOKENS = torch.randint(0, VOCAB, (10, 16), generator=torch.Generator().manual_seed(3))
CONFIG = LayerParallelConfig(groups=((4, 5), (6, 7, 8)), bypass=1)
GROUPED = tuple(f"model.layers.{layer}." for layer in range(4, 9))


def distiller(checkpoint: Path, steps: int = 6, **fields: Any) -> Distiller:
    settings = DistillSettings(
        **{
            "tokens": steps * 4 * 16,
            "batch": 4,
            "learning_rate": 3e-4 if fields.get("train") == "full" else 3e-3,
            **fields,
        }
    )
    return Distiller(load_model(checkpoint, "auto"), CONFIG, settings, TOKENS)


def divergence(teacher: Any, student: Any) -> float:
    """Mean KL of `student` under CONFIG from `teacher` run layer by layer."""
    with torch.no_grad():
        t = torch.log_softmax(ReferenceDecoder(teacher)(TOKENS, partition_units((), LAYERS)), -1)
        units = partition_units(CONFIG.resolve_groups(LAYERS), LAYERS)
        q = torch.log_softmax(ReferenceDecoder(student)(TOKENS, units, CONFIG), -1)
    return float((t.exp() * (t - q)).sum(-1).mean())


def test_loss_and_gradient_equal_those_of_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "LOGITS_CHUNK", 3)
    torch.manual_seed(0)
    student, teacher, head = torch.randn(7, 5), torch.randn(7, 5), torch.randn(11, 5)
    student.requires_grad_(True)
    log_t, log_q = (torch.log_softmax(h @ head.T, -1) for h in (teacher, student))
    expected = (log_t.exp() * (log_t - log_q)).sum(-1).mean()
    (gradient,) = torch.autograd.grad(2 * expected, student)
    ours = HeadDivergence.apply(student, teacher, head)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(torch.autograd.grad(2 * ours, student)[0], gradient)


@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_distillation_reduces_the_damage(tiny: Tiny, family: str, train: str) -> None:
    original = load_model(tiny(family))
    before = divergence(original, original)
    trainer = distiller(tiny(family), steps=12, train=train)
    untrained, _ = trainer.loss(torch.arange(len(TOKENS)))
    assert float(untrained.detach()) == pytest.approx(before, rel=1e-4)
    trainer.train()
    assert len(trainer.losses) == trainer.step == 12
    tensors = trainer.replacement_tensors()
    assert set(tensors) == {name for name in original.state_dict() if name.startswith(GROUPED)}
    trained = load_model(tiny(family))
    apply_replacements(trained, tensors)
    after = divergence(original, trained)
    assert after < 0.9 * before
    # What was trained is what is exported: LoRA is merged, the frozen rest is untouched.
    if train == "lora":
        assert divergence(original, trainer._student.model) == pytest.approx(after, rel=1e-3)


def test_mismatch_compares_states_behind_each_group(tiny: Tiny) -> None:
    model = load_model(tiny())
    decoder = ReferenceDecoder(model)
    units = partition_units(CONFIG.resolve_groups(LAYERS), LAYERS)
    with torch.no_grad():
        states = model(TOKENS, output_hidden_states=True).hidden_states
        hidden, context = decoder.embed(TOKENS)
        expected = 0.0
        for unit in units:
            hidden = decoder.run((unit,), hidden, context, CONFIG)
            if unit.is_group:
                teacher = states[unit.layers[-1] + 1]
                error = (hidden - teacher).norm(dim=-1) / teacher.norm(dim=-1)
                expected += float((error**2).mean())
    _, mismatch = distiller(tiny()).loss(torch.arange(len(TOKENS)))
    assert expected > 1e-3
    assert float(mismatch.detach()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("train", ["lora", "full"])
def test_untrained_export_is_the_base_even_from_bf16(tiny: Tiny, train: str) -> None:
    base = load_model(tiny()).state_dict()
    for name, tensor in (
        distiller(tiny(), train=train, precision="bf16").replacement_tensors().items()
    ):
        assert tensor.dtype == base[name].dtype
        assert torch.equal(tensor, base[name]), name


@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_student_can_start_from_other_weights_than_the_teacher(
    tiny: Tiny, train: str, precision: str
) -> None:
    base = load_model(tiny())
    torch.manual_seed(1)
    initial = {
        name: value + 0.01 * torch.randn_like(value)
        for name, value in base.state_dict().items()
        if name.startswith(GROUPED)
    }
    settings = DistillSettings(tokens=64, learning_rate=1e-3, train=train, precision=precision)
    trainer = Distiller(load_model(tiny()), CONFIG, settings, TOKENS, initial)
    taught, _ = trainer._teach(torch.arange(2))
    untouched, _ = distiller(tiny(), train=train, precision=precision)._teach(torch.arange(2))
    assert torch.equal(taught, untouched)
    for name, tensor in trainer.replacement_tensors().items():
        assert torch.equal(tensor, initial[name]), name


def test_bf16_trains_too(tiny: Tiny) -> None:
    trainer = distiller(tiny(), steps=12, precision="bf16", train="full")
    assert {value.dtype for value in trainer.trainable.values()} == {torch.float32}
    trainer.train()
    assert sum(trainer.losses[-3:]) < 0.95 * sum(trainer.losses[:3])


@pytest.mark.parametrize("train", ["lora", "full"])
def test_resumed_training_equals_an_unbroken_one(tiny: Tiny, tmp_path: Path, train: str) -> None:
    unbroken = distiller(tiny(), train=train)
    unbroken.train()
    distiller(tiny(), train=train).train(tmp_path, stop_after=2)
    broken_again = distiller(tiny(), train=train)
    broken_again.train(tmp_path, stop_after=4)
    assert broken_again.step == 4
    resumed = distiller(tiny(), train=train)
    resumed.train(tmp_path)
    assert resumed.losses == pytest.approx(unbroken.losses, rel=1e-6)
    expected = unbroken.replacement_tensors()
    for name, tensor in resumed.replacement_tensors().items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-7, rtol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "distillation-6.safetensors",
        "distillation.json",
    ]


def test_text_shorter_than_training_is_repeated_in_a_new_order(tiny: Tiny) -> None:
    batches = list(distiller(tiny(), steps=4)._batches())
    first, second = torch.cat(batches[:2]), torch.cat(batches[2:])
    assert [len(batch) for batch in batches] == [4] * 4
    assert not torch.equal(first, second)
    assert len(set(first.tolist())) == 8


def test_kept_teacher_states_change_nothing(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    keeping = distiller(tiny())
    keeping.train()
    assert len(keeping._known) >= 8
    monkeypatch.setattr(distill, "TEACHER_BYTES", 0)
    forgetting = distiller(tiny())
    forgetting.train()
    assert not forgetting._known
    assert keeping.losses == pytest.approx(forgetting.losses, rel=1e-6)
