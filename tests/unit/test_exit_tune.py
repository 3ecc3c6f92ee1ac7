"""Exit-aware fine-tuning."""

from __future__ import annotations

import math

import pytest
import torch

from vllm_effplugin.preparation.base import load_model
from vllm_effplugin.preparation.decoder import Decoder
from vllm_effplugin.techniques.early_exit.tune import (
    Tuner,
    TuneSettings,
    drop_share,
    exit_weights,
)

TOKENS = torch.randint(3, 256, (8, 24), generator=torch.Generator().manual_seed(0))
STARTS = torch.zeros_like(TOKENS, dtype=torch.bool)
DEPTHS = (4, 9)


def divergence(model, reference, depth: int) -> float:
    """KL(reference || model read behind `depth` layers), nats per token."""
    with torch.no_grad():
        decoder, original = Decoder(model), Decoder(reference)
        hidden, context = decoder.embed(TOKENS)
        q = decoder.logits(decoder.run_layers(range(depth), hidden, context)).log_softmax(-1)
        hidden, context = original.embed(TOKENS)
        p = original.logits(original.run_layers(range(12), hidden, context)).log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_the_schedules_are_the_papers():
    assert drop_share(0, 30) == 0
    assert drop_share(29, 30) == pytest.approx(1)
    assert drop_share(10, 30) == pytest.approx(math.exp(10 * math.log(2) / 29) - 1)
    weights = exit_weights((3, 5), 8, 0.5)
    raw = [0.5 * (0 + 1 + 2), 0.5 * (0 + 1 + 2 + 3 + 4), 7 + 0.5 * sum(range(7))]
    assert weights == pytest.approx([value / sum(raw) for value in raw])


@pytest.mark.parametrize("train", ["lora", "full"])
def test_exits_come_closer_and_the_model_stays(tiny, train):
    original = load_model(tiny())
    settings = TuneSettings(tokens=24 * 4 * 60, train=train, learning_rate=1e-3, layer_dropout=0.1)
    tuner = Tuner(load_model(tiny()), DEPTHS, settings, TOKENS, STARTS)
    tuner.train()
    tuned = tuner.finish().float().eval()
    for depth in DEPTHS:
        before, after = (divergence(model, original, depth) for model in (original, tuned))
        assert after < 0.8 * before
    assert divergence(tuned, original, 12) < 0.5 * divergence(original, original, 9)
    for name, value in original.state_dict().items():
        if "layers." not in name:
            assert value.equal(tuned.state_dict()[name]), f"{name} changed"
        assert name in tuned.state_dict()


def test_an_interrupted_tuning_resumes_to_the_same_weights(tiny, tmp_path):
    settings = TuneSettings(tokens=24 * 4 * 6, train="full", layer_dropout=0.3)
    whole = Tuner(load_model(tiny()), DEPTHS, settings, TOKENS, STARTS)
    whole.train()
    Tuner(load_model(tiny()), DEPTHS, settings, TOKENS, STARTS).train(tmp_path, stop_after=2)
    resumed = Tuner(load_model(tiny()), DEPTHS, settings, TOKENS, STARTS)
    resumed.train(tmp_path)
    assert resumed.losses == whole.losses
    for name, value in whole.finish().state_dict().items():
        assert value.equal(resumed.finish().state_dict()[name])


def test_the_loss_is_the_weighted_sum(tiny):
    """Without dropout, against the divergences worked out apart."""
    original = load_model(tiny())
    settings = TuneSettings(tokens=24, train="full", layer_dropout=0.0)
    tuner = Tuner(load_model(tiny()), DEPTHS, settings, TOKENS, STARTS)
    with torch.no_grad():
        for parameter in tuner.trainable.values():
            parameter.mul_(1.05)
    loss, shown = tuner.objective(torch.arange(len(TOKENS)))
    model = tuner.finish()
    parts = [divergence(model, original, depth) for depth in (*DEPTHS, 12)]
    weights = exit_weights(DEPTHS, 12, settings.exit_scale)
    assert float(loss.detach()) == pytest.approx(
        sum(w * part for w, part in zip(weights, parts, strict=True)), rel=1e-3
    )
    assert shown == pytest.approx(parts[-1], rel=1e-3)


def test_dropped_layers_are_left_out_sequence_by_sequence(tiny):
    """With a layer dropped for one sequence, that one alone passes it unchanged."""
    settings = TuneSettings(tokens=24, train="full", layer_dropout=0.5)
    tuner = Tuner(load_model(tiny()), DEPTHS, settings, TOKENS, STARTS)
    chance = torch.Generator().manual_seed(3)
    draws = torch.rand(8, generator=chance.clone_state())
    hidden, context = tuner._tuned.embed(TOKENS)
    with torch.no_grad():
        after = tuner._run(range(11, 12), hidden, context, chance)
        ran = tuner._tuned.run_layers((11,), hidden, context)
    dropped = draws >= 0.5
    assert 0 < int(dropped.sum()) < 8
    assert after[dropped].equal(hidden[dropped])
    assert after[~dropped].equal(ran[~dropped])
