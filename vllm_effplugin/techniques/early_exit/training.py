"""Training exits on captured features: adapters by distillation, gates on what the exit would say.

DYNAMAX (arXiv 2504.20922): the model is the oracle. The target of a gate is 1 where the exit's most
likely token is among the oracle's top k; losses weigh linearly more from exit to exit.

Shapes: `M` sequences, `S` positions, `N` = `M * S` tokens, `d` hidden size, `V` vocabulary,
`E` exits.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from tqdm.auto import tqdm

from vllm_effplugin.preparation.decoder import run_layer, take_apart
from vllm_effplugin.preparation.head import HeadDivergence
from vllm_effplugin.preparation.precision import Precision, autocast
from vllm_effplugin.preparation.trainer import cosine_decay
from vllm_effplugin.techniques.early_exit.exits import Exit, LinearAdapter
from vllm_effplugin.techniques.early_exit.features import Features
from vllm_effplugin.techniques.early_exit.gates import MambaGate

RIDGE = 1e-3
"""Relative to the mean of the Gram matrix's diagonal."""

HEAD_CHUNK = 512
"""Tokens whose `[chunk, V]` logits exist at a time."""

GATE_CHUNK = 8192
"""Tokens that gates judge at a time."""

APART = 10
"""One in so many of the sequences is kept apart, to tell which pass left a gate at its best."""


class TrainSettings(BaseModel):
    """How to train exits."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    adapter_tokens: int = Field(32768, ge=0, description="Of distillation, per exit.")
    adapter_rate: float = Field(3e-4, gt=0, description="Learning rate of adapters.")
    gate_epochs: int = Field(20, ge=1, description="Passes over the text that gates take.")
    gate_rate: float = Field(1e-3, gt=0, description="Learning rate of gates.")
    top_k: int = Field(1, ge=1, description="Of the oracle's tokens that count as right.")
    batch: int = Field(512, ge=1, description="Tokens per step of adapters and gates.")
    precision: Precision = "fp32"
    seed: int = 0


@dataclass(frozen=True)
class Verdicts:
    """What the head makes of an exit's states, `[N]` each.

    Attributes:
        agrees: whether the exit's most likely token is the oracle's.
        target: whether it is among the oracle's top k.
        probability: of the exit's most likely token.
    """

    agrees: Tensor
    target: Tensor
    probability: Tensor


class Trainer:
    """Trains the exits of one model.

    Args:
        model: the Hugging Face model whose final norm and head the exits share.
        settings: how to train.
    """

    def __init__(self, model: Any, settings: TrainSettings) -> None:
        self._decoder = take_apart(model)
        self._norm = self._decoder.norm
        self._head: Tensor = model.lm_head.weight
        self._settings = settings
        self._device = self._head.device

    # --- Adapters --------------------------------------------------------------------------------

    def fit_adapter(self, exit: Exit, index: int, features: Features) -> list[float]:
        """Fit an exit's adapter, if it has one: KL(oracle || exit), from a start that is close.

        A linear map starts from least squares on the final state; a block is a copy of a layer, as
        `new_block` made it.

        Args:
            exit: its adapter is changed in place.
            index: of the exit among the features'.

        Returns:
            the KL of each step, in nats per token.
        """
        if exit.adapter is None:
            return []
        exit.adapter.float().to(self._device)
        hidden, final = features.exits[index], features.final
        starts: Tensor | None = features.starts
        size = 1  # tokens of a unit that batches are drawn from: a block needs whole sequences
        if isinstance(exit.adapter, LinearAdapter):
            hidden, final, starts = hidden.flatten(0, 1), final.flatten(0, 1), None
            with torch.no_grad():
                exit.adapter.correction.weight.copy_(ridge(hidden, final))
        else:
            size = hidden.shape[1]

        def loss(rows: Tensor) -> Tensor:
            begins = None if starts is None else starts[rows]
            adapted = self._adapted(exit, hidden[rows], begins).flatten(0, -2)
            oracle = self._norm_of(final[rows]).flatten(0, -2)
            return HeadDivergence.apply(adapted, oracle, self._head)

        settings = self._settings
        optimizer = torch.optim.AdamW(
            exit.adapter.parameters(), lr=settings.adapter_rate, weight_decay=0.0
        )
        batch = min(max(1, settings.batch // size), len(hidden))
        steps = -(-settings.adapter_tokens // (batch * size))
        return self._descend(optimizer, loss, len(hidden), batch, steps, "adapter")

    def _adapted(self, exit: Exit, states: Tensor, starts: Tensor | None) -> Tensor:
        """The final norm's output in fp32, from `[..., d]` states; from `[B, S, d]` for a block.

        Args:
            starts: `[B, S]` where documents start, for a block.
        """
        states = states.to(self._device).float()
        if exit.block is None:
            return self._norm(exit.adapt(states))
        with autocast(self._device, self._settings.precision):
            states = run_layer(exit.block, states, self._decoder.context(states, starts))
        return self._norm(states.float())

    # --- Verdicts --------------------------------------------------------------------------------

    @torch.inference_mode()
    def verdicts(self, exits: Sequence[Exit], features: Features) -> list[Verdicts]:
        """What each exit would say, against the oracle."""
        sequences, length = features.final.shape[:2]
        count = sequences * length
        agrees = torch.empty(len(exits), count, dtype=torch.bool)
        target = torch.empty(len(exits), count, dtype=torch.bool)
        probability = torch.empty(len(exits), count)
        with tqdm(total=count, desc="verdicts", unit="tok", unit_scale=True, leave=False) as bar:
            for sequence in range(sequences):
                one = features[sequence : sequence + 1]
                said = [
                    self._adapted(exit, one.exits[index], one.starts)[0]
                    for index, exit in enumerate(exits)
                ]
                oracle = self._norm_of(one.final[0])
                for start in range(0, length, HEAD_CHUNK):
                    chunk = slice(start, start + HEAD_CHUNK)
                    best = self._logits(oracle[chunk]).topk(self._settings.top_k).indices
                    first = sequence * length + start
                    part = slice(first, first + len(best))
                    for index, normed in enumerate(said):
                        logits = self._logits(normed[chunk])
                        top, token = logits.max(-1)
                        probability[index, part] = (top - logits.logsumexp(-1)).exp().cpu()
                        agrees[index, part] = (token == best[:, 0]).cpu()
                        target[index, part] = (token[:, None] == best).any(-1).cpu()
                    bar.update(len(best))
        return [Verdicts(*parts) for parts in zip(agrees, target, probability, strict=True)]

    @torch.inference_mode()
    def same_token(self, one: Tensor, other: Tensor) -> float:
        """Share of tokens whose most likely successor is the same under two final states."""
        same = sum(
            int((self._best(a) == self._best(b)).sum())
            for a, b in zip(one.split(HEAD_CHUNK), other.split(HEAD_CHUNK), strict=True)
        )
        return same / len(one)

    def _best(self, states: Tensor) -> Tensor:
        return self._logits(self._norm_of(states)).argmax(-1)

    def _norm_of(self, states: Tensor) -> Tensor:
        return self._norm(states.to(self._device).float())

    def _logits(self, normed: Tensor) -> Tensor:
        """`[N, V]` in fp32 from `[..., d]` outputs of the final norm, `N` tokens in all."""
        return (normed.flatten(0, -2).to(self._head.dtype) @ self._head.T).float()

    # --- Gates -----------------------------------------------------------------------------------

    def fit_gates(
        self, exits: Sequence[Exit], features: Features, verdicts: Sequence[Verdicts]
    ) -> list[float]:
        """Train all gates together; the loss of exit `i` weighs `i + 1`.

        Each gate ends as it was after the pass that served it best on sequences kept apart: one
        that goes by the tokens before has learnt the text by heart after a few.

        Args:
            exits: those without a trained gate are left out; changed in place.
            features: their states at the exits.
            verdicts: of each exit on the same tokens.

        Returns:
            the mean loss of each epoch.
        """
        trained = [(i, exit) for i, exit in enumerate(exits) if exit.gate is not None]
        if not trained:
            return []
        for i, exit in trained:
            assert exit.gate is not None
            exit.gate.to(self._device)
            share = verdicts[i].target.float().mean().clamp(1e-3, 1 - 1e-3)
            with torch.no_grad():  # start from the share of tokens that might leave
                exit.gate.bias.fill_(float(torch.logit(share)))
        parameters = [p for _, exit in trained for p in exit.gate.parameters()]  # type: ignore[union-attr]
        weights = torch.tensor([i + 1.0 for i, _ in trained])
        weights /= weights.sum()
        # Batches are drawn from tokens, or from sequences where a gate goes by the tokens before.
        whole = any(isinstance(exit.gate, MambaGate) for _, exit in trained)
        size = features.final.shape[1] if whole else 1
        hidden = features.exits.unflatten(2, (-1, size)).flatten(1, 2)  # [E, N / size, size, d]
        starts = features.starts.view(-1, size)

        def each_loss(rows: Tensor) -> Iterator[Tensor]:
            for i, exit in trained:
                assert exit.gate is not None
                logits = exit.gate.of_sequences(hidden[i][rows].to(self._device), starts[rows])
                target = verdicts[i].target.view(-1, size)[rows].to(self._device).float()
                yield nn.functional.binary_cross_entropy_with_logits(logits, target)

        def loss(rows: Tensor) -> Tensor:
            return sum(
                weight * one for weight, one in zip(weights.tolist(), each_loss(rows), strict=True)
            )

        length = features.final.shape[1] // size
        apart = hidden.shape[1] // length // APART * length
        count = hidden.shape[1] - apart
        best = _Best([exit.gate for _, exit in trained if exit.gate is not None])

        def look() -> None:
            rows = torch.arange(count, count + apart).split(max(1, GATE_CHUNK // size))
            with torch.inference_mode():
                best.see(
                    [sum(map(float, each)) for each in zip(*map(each_loss, rows), strict=True)]
                )

        settings = self._settings
        optimizer = torch.optim.AdamW(parameters, lr=settings.gate_rate, weight_decay=1e-2)
        batch = min(max(1, settings.batch // size), count)
        per_epoch = count // batch
        steps = settings.gate_epochs * per_epoch
        losses = self._descend(
            optimizer, loss, count, batch, steps, "gates", look if apart else None
        )
        best.take()
        return [sum(losses[i : i + per_epoch]) / per_epoch for i in range(0, steps, per_epoch)]

    def _descend(
        self,
        optimizer: torch.optim.Optimizer,
        loss: Callable[[Tensor], Tensor],
        count: int,
        batch: int,
        steps: int,
        label: str,
        on_pass: Callable[[], None] | None = None,
    ) -> list[float]:
        """Minimise the `loss` of `batch` of `count` row indices; the loss of each step.

        Args:
            on_pass: called after each pass over the rows.
        """
        losses: list[float] = []
        rates = [group["lr"] for group in optimizer.param_groups]
        batches = tqdm(self._batches(count, batch, steps), total=steps, desc=label, leave=False)
        for step, rows in enumerate(batches):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * cosine_decay(step / steps, 0.05)
            value = loss(rows)
            value.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(value.detach()))
            if on_pass is not None and (step + 1) % (count // batch) == 0:
                on_pass()
        return losses

    def _batches(self, count: int, size: int, steps: int) -> Iterator[Tensor]:
        """Row indices of each step; shuffled anew in every pass."""
        size = min(size, count)
        per_pass = count // size
        for step in range(steps):
            turn, place = divmod(step, per_pass)
            if place == 0:
                generator = torch.Generator().manual_seed(self._settings.seed + turn)
                order = torch.randperm(count, generator=generator)
            yield order[place * size : (place + 1) * size]


class _Best:
    """Each gate's parameters where its loss was least.

    Args:
        gates: that are being trained.
    """

    def __init__(self, gates: Sequence[nn.Module]) -> None:
        self._gates = gates
        self._least = [math.inf] * len(gates)
        self._kept: list[dict[str, Tensor]] = [{} for _ in gates]

    def see(self, losses: Sequence[float]) -> None:
        """Keep those gates that are better than before."""
        for place, (gate, loss) in enumerate(zip(self._gates, losses, strict=True)):
            if loss < self._least[place]:
                self._least[place] = loss
                self._kept[place] = copy.deepcopy(gate.state_dict())

    def take(self) -> None:
        """Give every gate what was kept of it."""
        for gate, kept in zip(self._gates, self._kept, strict=True):
            if kept:
                gate.load_state_dict(kept)


def new_block(model: Any) -> nn.Module:
    """An exit's own layer before training (Balcony, arXiv 2503.05005): a copy of the last layer,
    whose output is what the final norm is used to.
    """
    return copy.deepcopy(model.model.layers[-1]).requires_grad_(True)


@torch.inference_mode()
def confidence(exit: Exit, hidden: Tensor, starts: Tensor, verdict: Verdicts) -> Tensor:
    """`[N]`: what an exit's gate says, in the unit of its threshold, a share of 1.

    Args:
        hidden: `[M, S, d]` states at the exit.
        starts: `[M, S]`, where a document starts.
    """
    if exit.gate is None:
        return verdict.probability
    device = exit.gate.bias.device
    sequences = max(1, 8192 // hidden.shape[1])
    parts = [
        exit.gate.of_sequences(part.to(device), begins)
        for part, begins in zip(hidden.split(sequences), starts.split(sequences), strict=True)
    ]
    return torch.cat(parts).sigmoid().flatten().cpu()


@torch.no_grad()
def ridge(hidden: Tensor, final: Tensor) -> Tensor:
    """`W` with `h + W h` near the final state, `[d, d]`; tokens weigh by the final norm's view.

    The final norm divides a state by its root mean square, so that is what errors are relative to.
    """
    size = hidden.shape[-1]
    gram, cross = (torch.zeros(size, size, dtype=torch.float64) for _ in range(2))
    for h, f in zip(hidden.split(4096), final.split(4096), strict=True):
        h, f = h.double(), f.double()
        scale = f.square().mean(-1, keepdim=True).rsqrt()
        gram += (h * scale).T @ (h * scale)
        cross += (h * scale).T @ ((f - h) * scale)
    gram += RIDGE * gram.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    return torch.linalg.solve(gram, cross).T.float()
