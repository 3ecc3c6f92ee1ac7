"""Exit-aware fine-tuning of the backbone: early layers learn to say what the last one says.

LayerSkip (arXiv 2404.16710): layers are dropped in training, the deeper the more often (section
3.1, D(l)), and the loss adds up the exits', the deeper the heavier (section 3.2, e(l)). The target
is not the text but the original model: KL(original || exit) at the exits, and KL(original || tuned)
behind the last layer, which keeps the model what it was.

Shapes: `B` sequences, `S` positions, `d` hidden size, `L` layers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from vllm_effplugin.preparation.decoder import Decoder
from vllm_effplugin.preparation.head import HeadDivergence
from vllm_effplugin.preparation.lora import add_lora
from vllm_effplugin.preparation.precision import autocast
from vllm_effplugin.preparation.trainer import WindowTrainer, WindowTrainerSettings

LEARNING_RATES = {"lora": 1e-3, "full": 1e-4}
"""Defaults for short training of a small model."""


class TuneSettings(WindowTrainerSettings):
    """How to tune."""

    train: Literal["lora", "full"] = "lora"
    layer_dropout: float = Field(
        0.1, ge=0, lt=1, description="How often the last layer is dropped; others less often."
    )
    exit_scale: float = Field(
        0.2, gt=0, description="Weight of the exits' losses against the last layer's."
    )


class Tuner(WindowTrainer):
    """Tunes one model, in place; embeddings, final norm and head stay as they are.

    Args:
        model: a Hugging Face causal language model.
        depths: layers before each exit.
        settings: how to train.
        tokens: `[N, S]` training token ids.
        starts: `[N, S]` where a document starts among them.
    """

    def __init__(
        self,
        model: Any,
        depths: Sequence[int],
        settings: TuneSettings,
        tokens: Tensor,
        starts: Tensor,
    ) -> None:
        super().__init__(settings, tokens, "tuning")
        self._starts = starts
        self._settings = settings
        compute = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        model.to(compute).requires_grad_(False)
        self._original = Decoder(copy.deepcopy(model).eval())
        self._peft: Any = None
        torch.manual_seed(settings.seed)
        if settings.train == "lora":
            self._peft = add_lora(model)
        else:
            model.model.layers.float().requires_grad_(True)
        self._model = model
        self._tuned = Decoder(model)
        count = len(self._tuned.layers)
        self._weights = exit_weights(depths, count, settings.exit_scale)
        self._keep = [1 - settings.layer_dropout * drop_share(i, count) for i in range(count)]
        self._segments = list(zip([0, *depths], [*depths, count], strict=True))
        self.optimise({n: value for n, value in model.named_parameters() if value.requires_grad})

    def objective(self, rows: Tensor) -> tuple[Tensor, float]:
        """The weighted loss, and the last layer's share of it in nats."""
        device = self.tokens.device
        chance = torch.Generator().manual_seed(self._settings.seed * 1_000_003 + self.step)
        ids, starts = self.tokens[rows], self._starts[rows]
        with (
            autocast(device, self._settings.precision),
            self._original.fastest_attention(),
            self._tuned.fastest_attention(),
        ):
            with torch.no_grad():
                target, context = self._original.embed(ids, starts)
                target = self._original.run_layers(
                    range(len(self._original.layers)), target, context
                )
                target = self._original.decoder.norm(target).flatten(0, 1)
            hidden, context = self._tuned.embed(ids, starts)
            states = []
            for first, last in self._segments:
                hidden = self._run(range(first, last), hidden, context, chance)
                states.append(self._tuned.decoder.norm(hidden).flatten(0, 1))
        head = self._tuned.model.lm_head.weight
        losses = [HeadDivergence.apply(state, target, head) for state in states]
        total = torch.stack(
            [weight * loss for weight, loss in zip(self._weights, losses, strict=True)]
        )
        return total.sum(), float(losses[-1].detach())

    def _run(
        self, layers: range, hidden: Tensor, context: dict[str, Any], chance: torch.Generator
    ) -> Tensor:
        """Run layers, each for those sequences that do not drop it."""
        for index in layers:
            kept = torch.rand(len(hidden), generator=chance) < self._keep[index]
            if not kept.any():
                continue
            after = self._tuned.run_layers((index,), hidden, context)
            mask = kept.to(hidden.device)[:, None, None]
            hidden = after if kept.all() else torch.where(mask, after, hidden)
        return hidden

    def finish(self) -> Any:
        """The tuned Hugging Face model, adapters merged. To be called once."""
        if self._peft is not None:
            return self._peft.merge_and_unload()
        return self._model


def drop_share(layer: int, layers: int) -> float:
    """`D(l) = exp(l ln 2 / (L - 1)) - 1`: 0 at the first layer, 1 at the last."""
    return math.exp(layer * math.log(2) / max(1, layers - 1)) - 1


def exit_weights(depths: Sequence[int], layers: int, scale: float) -> list[float]:
    """Normalised weights of the exits' losses and of the last layer's.

    `e(l) = scale * sum_{i <= l} i` for an exit behind layer `l`, and for the last layer
    `e(L - 1) = L - 1 + scale * sum_{i <= L - 2} i`.
    """
    weights = [scale * (depth - 1) * depth / 2 for depth in depths]
    weights.append(layers - 1 + scale * (layers - 2) * (layers - 1) / 2)
    total = sum(weights)
    return [weight / total for weight in weights]
