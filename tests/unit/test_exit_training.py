"""Training of exits: features, adapters, gates, and what the head makes of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vllm_effplugin.preparation.base import load_model
from vllm_effplugin.preparation.decoder import Decoder
from vllm_effplugin.techniques.early_exit import training
from vllm_effplugin.techniques.early_exit.config import EarlyExitConfig, ExitPoint
from vllm_effplugin.techniques.early_exit.exits import Exit
from vllm_effplugin.techniques.early_exit.features import Features, capture
from vllm_effplugin.techniques.early_exit.training import (
    Trainer,
    TrainSettings,
    Verdicts,
    confidence,
    new_block,
    ridge,
)

TOKENS = torch.randint(3, 256, (6, 24), generator=torch.Generator().manual_seed(0))
STARTS = torch.zeros_like(TOKENS, dtype=torch.bool)
STARTS[:, 0] = STARTS[::2, 9] = True  # every other sequence has two documents
POSITIONS = torch.arange(24).repeat(6, 1)
POSITIONS[::2, 9:] -= 9
DEPTHS = (4, 9)


def make_exits(gate: str = "linear", adapter: str = "none", model: Any = None) -> list[Exit]:
    torch.manual_seed(0)
    points = [ExitPoint(depth=depth, gate=gate, adapter=adapter) for depth in DEPTHS]
    config = EarlyExitConfig(exits=tuple(points), gate_width=16)
    blocks = [new_block(model) if adapter == "block" else None for _ in points]
    return [Exit(point, config, 128, block) for point, block in zip(points, blocks, strict=True)]


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_features_are_the_residual_stream(tiny, family):
    """As Hugging Face reports it behind each layer."""
    model = load_model(tiny(family))
    features = capture(model, TOKENS, STARTS, DEPTHS, "fp32", batch=4)
    states = model(TOKENS, position_ids=POSITIONS, output_hidden_states=True, use_cache=False)
    for index, depth in enumerate(DEPTHS):
        torch.testing.assert_close(
            features.exits[index].float(), states.hidden_states[depth], rtol=1e-2, atol=1e-2
        )
    final = model.model.norm(features.final.float())
    torch.testing.assert_close(final, states.hidden_states[-1], rtol=2e-2, atol=2e-2)


def test_verdicts_are_those_of_the_logits(tiny):
    model = load_model(tiny())
    features = capture(model, TOKENS, STARTS, DEPTHS, "fp32")
    hidden, final = features.exits.flatten(1, 2), features.final.flatten(0, 1)
    exits = make_exits(adapter="linear")
    with torch.no_grad():
        exits[1].adapter.correction.weight.normal_(std=0.05)
    for top_k in (1, 5):
        ours = Trainer(model, TrainSettings(top_k=top_k)).verdicts(exits, features)
        oracle = model.lm_head(model.model.norm(final.float()))
        for exit, states, verdict in zip(exits, hidden, ours, strict=True):
            logits = model.lm_head(model.model.norm(exit.adapt(states.float())))
            token = logits.argmax(-1)
            assert verdict.agrees.equal(token == oracle.argmax(-1))
            assert verdict.target.equal((oracle.topk(top_k).indices == token[:, None]).any(-1))
            torch.testing.assert_close(verdict.probability, logits.softmax(-1).amax(-1))
        assert (ours[0].target.sum() > ours[0].agrees.sum()) == (top_k == 5)


def test_a_block_is_a_layer_behind_the_exit(tiny):
    """Until it is trained: the last layer, run on the exit's states; sequences stay apart."""
    model = load_model(tiny())
    features = capture(model, TOKENS, STARTS, DEPTHS, "fp32")
    exits = make_exits(adapter="block", model=model)
    ours = Trainer(model, TrainSettings()).verdicts(exits, features)
    decoder = Decoder(model)
    for states, verdict in zip(features.exits, ours, strict=True):
        for row, hidden in enumerate(states.float().split(1)):
            context = decoder.context(hidden, STARTS[row : row + 1])
            hidden = decoder.run_layers([11], hidden, context)
            probability = decoder.logits(hidden)[0].softmax(-1).amax(-1)
            part = verdict.probability.view(TOKENS.shape)[row]
            torch.testing.assert_close(part, probability, rtol=1e-4, atol=1e-5)


def test_ridge_finds_a_linear_map():
    torch.manual_seed(0)
    hidden, truth = torch.randn(4000, 16), 0.3 * torch.randn(16, 16)
    found = ridge(hidden, hidden + hidden @ truth.T)
    torch.testing.assert_close(found, truth, atol=5e-3, rtol=0)


@pytest.mark.parametrize("kind", ["linear", "block"])
def test_distillation_improves_on_the_start(tiny, kind):
    """Which is least squares for a linear map, and the last layer for a block."""
    model = load_model(tiny())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    features = capture(model, TOKENS, STARTS, DEPTHS, "fp32")
    settings = TrainSettings(adapter_tokens=144 * 60, batch=72, adapter_rate=3e-3)
    exit = make_exits(adapter=kind, model=model)[1]
    losses = Trainer(model, settings).fit_adapter(exit, 1, features)
    assert len(losses) == 120
    assert sum(losses[-4:]) < 0.6 * sum(losses[:4])
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def as_features(hidden: torch.Tensor) -> Features:
    """Of `[E, M, S, d]` states, each sequence one document."""
    starts = torch.zeros(hidden.shape[1:3], dtype=torch.bool)
    starts[:, 0] = True
    return Features(hidden, hidden[0], starts)


@pytest.mark.parametrize("kind", ["linear", "mlp", "mamba"])
def test_gates_learn_which_tokens_agree(tiny, kind):
    """Whether one direction of the hidden state is positive."""
    torch.manual_seed(0)
    features = as_features(torch.randn(2, 60, 50, 128))
    right = [features.exits[0, ..., 3] > 0, features.exits[1, ..., 5] > 0.5]
    verdicts = [Verdicts(r.flatten(), r.flatten(), torch.zeros(3000)) for r in right]
    exits = make_exits(kind)
    settings = TrainSettings(gate_epochs=30, gate_rate=1e-2, batch=256)
    losses = Trainer(load_model(tiny()), settings).fit_gates(exits, features, verdicts)
    assert losses[-1] < 0.5 * losses[0]
    for exit, states, verdict in zip(exits, features.exits, verdicts, strict=True):
        sure = confidence(exit, states, features.starts, verdict) > 0.5
        assert (sure == verdict.agrees).float().mean() > 0.9


def test_a_gate_with_a_state_learns_what_the_token_before_said(tiny):
    """Which no gate can know that sees one token, and which ends with a document."""
    torch.manual_seed(0)
    everything = as_features(torch.randn(2, 120, 50, 128))
    everything.starts[:, 25] = True
    before = everything.exits[..., 3].roll(1, 2) > 0
    before[:, everything.starts] = False

    def part(sequences: slice) -> tuple[Features, list[Verdicts]]:
        rows = before[:, sequences].flatten(1)
        return everything[sequences], [Verdicts(r, r, torch.zeros(len(r))) for r in rows]

    (train, verdicts), (fresh, truth) = part(slice(0, 60)), part(slice(60, 120))
    right = {}
    for kind in ("mlp", "mamba"):
        exits = make_exits(kind)
        settings = TrainSettings(gate_epochs=30, gate_rate=1e-2, batch=256)
        Trainer(load_model(tiny()), settings).fit_gates(exits, train, verdicts)
        sure = confidence(exits[0], fresh.exits[0], fresh.starts, truth[0]) > 0.5
        agrees = (sure == truth[0].agrees).view(60, 50)
        right[kind] = float(agrees.float().mean()), float(agrees[fresh.starts].float().mean())
    assert right["mamba"][0] > 0.85
    assert right["mamba"][1] > 0.85
    assert right["mlp"][0] < 0.8


def test_gates_do_not_learn_the_text_by_heart(tiny):
    """Where the hidden states say nothing, the best gate says nothing either."""
    torch.manual_seed(0)
    features = as_features(torch.randn(2, 60, 50, 128))
    noise = torch.rand(2, 3000) > 0.5
    verdicts = [Verdicts(row, row, torch.zeros(3000)) for row in noise]
    exits = make_exits("mlp")
    settings = TrainSettings(gate_epochs=30, gate_rate=1e-2, batch=256)
    Trainer(load_model(tiny()), settings).fit_gates(exits, features, verdicts)
    fresh = as_features(torch.randn(2, 60, 50, 128))
    said = confidence(exits[0], fresh.exits[0], fresh.starts, verdicts[0])
    assert (said - 0.5).abs().mean() < 0.1


def test_softmax_gates_are_their_own_confidence():
    verdict = Verdicts(torch.ones(3), torch.ones(3), torch.tensor([0.1, 0.5, 0.9]))
    [exit, _] = make_exits("softmax")
    hidden, starts = torch.zeros(1, 3, 128), torch.ones(1, 3)
    assert confidence(exit, hidden, starts, verdict).equal(verdict.probability)


def test_later_exits_weigh_more(tiny, monkeypatch):
    """The loss is the sum of the exits' losses, weighted 1 : 2."""
    torch.manual_seed(0)
    features = as_features(torch.randn(2, 4, 16, 128))
    verdicts = [Verdicts(torch.ones(64), torch.rand(64) > 0.3, torch.ones(64)) for _ in range(2)]
    exits = make_exits()
    trainer = Trainer(load_model(tiny()), TrainSettings(gate_epochs=1, batch=64))
    seen = []
    entropy = torch.nn.functional.binary_cross_entropy_with_logits

    def recorded(*args):
        seen.append(float(entropy(*args).detach()))
        return entropy(*args)

    monkeypatch.setattr(training.nn.functional, "binary_cross_entropy_with_logits", recorded)
    [loss] = trainer.fit_gates(exits, features, verdicts)
    assert loss == pytest.approx(seen[0] / 3 + 2 * seen[1] / 3, rel=1e-5)
