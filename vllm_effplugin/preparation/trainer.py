"""Training loops that can be interrupted.

Shapes: `N` windows, `S` positions, `B` windows per step.
"""

from __future__ import annotations

import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from vllm_effplugin.preparation.precision import Precision


class TrainerSettings(BaseModel):
    """What every such training has to know."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    learning_rate: float = Field(1e-4, gt=0)
    warmup: float = Field(0.05, ge=0, le=1, description="Share of the steps.")
    batch: int = Field(4, ge=1, description="Sequences per step.")
    precision: Precision = "fp32"
    seed: int = 0
    save_seconds: float = Field(60.0, ge=0, description="Time between two saved states.")


class WindowTrainerSettings(TrainerSettings):
    """What a training over windows of text has to know besides."""

    tokens: int = Field(ge=1, description="Training tokens; the text repeats when it is shorter.")

    def steps(self, sequence_length: int) -> int:
        """Optimiser steps: at least `tokens` tokens."""
        return math.ceil(self.tokens / (self.batch * sequence_length))


def cosine_decay(progress: float, end: float = 0.0) -> float:
    """Share of a learning rate: 1 at progress 0, `end` at 1, along a cosine."""
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * progress))


class Trainer(ABC):
    """AdamW with linear warm-up and a cosine, from a saved state where there is one.

    Args:
        settings: how to train.
        rows: number of things to train on.
        steps: of the optimiser.
        label: of the progress bar, and of the files of the saved state.
        unit: what a row is, or of what it has `per_row`.
    """

    def __init__(
        self,
        settings: TrainerSettings,
        rows: int,
        steps: int,
        label: str,
        unit: str = "row",
        per_row: int = 1,
    ) -> None:
        self._training = settings
        self._label = label
        self._rows, self._unit, self._per_row = rows, unit, per_row
        self.step = 0
        self.total_steps = steps
        self.losses: list[float] = []
        self.seconds = 0.0
        self.trainable: dict[str, nn.Parameter] = {}

    def optimise(self, trainable: Mapping[str, nn.Parameter]) -> None:
        """What is trained; to be called once the model is ready."""
        self.trainable = dict(trainable)
        self._optimizer = torch.optim.AdamW(
            self.trainable.values(),
            lr=self._training.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=0.0,
        )

    @abstractmethod
    def objective(self, rows: Tensor) -> tuple[Tensor, float]:
        """What is minimised on some rows, and the figure to show for it."""

    def train(self, state: Path | None = None, *, stop_after: int | None = None) -> None:
        """Train to the end, from the state in `state` where there is one.

        Args:
            state: folder for the training state, written from time to time.
            stop_after: end early after this many steps, state saved.
        """
        if state is not None and (state / f"{self._label}.json").exists():
            self._load(state)
        if self.step >= self.total_steps:
            return
        saved = time.monotonic()
        with tqdm(
            total=self.total_steps * self._training.batch * self._per_row,
            initial=self.step * self._training.batch * self._per_row,
            desc=self._label,
            unit=self._unit,
            unit_scale=True,
        ) as bar:
            for rows in self._batches():
                started = time.monotonic()
                self.losses.append(self._optimise(rows))
                self.step += 1
                self.seconds += time.monotonic() - started
                bar.set_postfix(loss=f"{_recent(self.losses):.4f}", refresh=False)
                bar.update(len(rows) * self._per_row)
                stopping = self.step in (stop_after, self.total_steps)
                due = time.monotonic() - saved > self._training.save_seconds
                if state is not None and (stopping or due):
                    self._save(state)
                    saved = time.monotonic()
                if stopping:
                    return

    def _optimise(self, rows: Tensor) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = self._training.learning_rate * self._schedule()
        objective, shown = self.objective(rows)
        objective.backward()
        nn.utils.clip_grad_norm_(self.trainable.values(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return shown

    def _schedule(self) -> float:
        """Linear warm-up, then a cosine to a tenth."""
        warmup = self._training.warmup * self.total_steps
        if self.step < warmup:
            return (self.step + 1) / (warmup + 1)
        progress = (self.step - warmup) / max(1.0, self.total_steps - warmup)
        return cosine_decay(progress, 0.1)

    def _batches(self) -> Iterator[Tensor]:
        """Rows of the batches still to come; they depend on seed and step alone."""
        size = min(self._training.batch, self._rows)
        per_epoch = self._rows // size
        for step in range(self.step, self.total_steps):
            epoch, place = divmod(step, per_epoch)
            generator = torch.Generator().manual_seed(self._training.seed + epoch)
            order = self._order(generator)
            yield order[place * size : (place + 1) * size]

    def _order(self, generator: torch.Generator) -> Tensor:
        """All rows, as one pass takes them."""
        return torch.randperm(self._rows, generator=generator)

    def _save(self, folder: Path) -> None:
        """Write weights and optimiser state, then what points at them: never half of a pair."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        for name, value in self.trainable.items():
            tensors[f"weight.{name}"] = value.detach()
            for key, moment in self._optimizer.state[value].items():
                tensors[f"{key}.{name}"] = moment
        weights = folder / f"{self._label}-{self.step}.safetensors"
        save_file(tensors, weights)
        pointer = folder / f"{self._label}.json.tmp"
        progress = {"step": self.step, "losses": self.losses, "seconds": self.seconds}
        pointer.write_text(json.dumps(progress))
        os.replace(pointer, folder / f"{self._label}.json")
        for old in folder.glob(f"{self._label}-*.safetensors"):
            if old != weights:
                old.unlink()

    @torch.no_grad()
    def _load(self, folder: Path) -> None:
        state: Mapping[str, Any] = json.loads((folder / f"{self._label}.json").read_text())
        self.step, self.losses = state["step"], state["losses"]
        self.seconds = state["seconds"]
        tensors = load_file(folder / f"{self._label}-{self.step}.safetensors")
        for name, value in self.trainable.items():
            value.copy_(tensors[f"weight.{name}"])
            self._optimizer.state[value] = {
                "step": tensors[f"step.{name}"],
                "exp_avg": tensors[f"exp_avg.{name}"].to(value.device),
                "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(value.device),
            }


class WindowTrainer(Trainer):
    """The same over windows of token ids.

    Args:
        settings: how to train.
        tokens: `[N, S]` training token ids.
        label: of the progress bar, and of the files of the saved state.
    """

    def __init__(self, settings: WindowTrainerSettings, tokens: Tensor, label: str) -> None:
        length = tokens.shape[1]
        super().__init__(settings, len(tokens), settings.steps(length), label, "tok", length)
        self.tokens = tokens


def _recent(losses: list[float]) -> float:
    last = losses[-20:]
    return sum(last) / len(last)
