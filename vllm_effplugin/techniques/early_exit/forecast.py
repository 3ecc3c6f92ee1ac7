"""What exits will save on this machine, before anyone is served by them.

The machine's costs are measured by a real engine; which tokens leave is known from text; the rest
is played through on the host by the engine's own rules (`passage.py`).

Shapes: `M` sequences, `S` positions, `E` exits.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel

from vllm_effplugin.techniques.early_exit.config import EarlyExitConfig
from vllm_effplugin.techniques.early_exit.costs import Column, Costs, Preference
from vllm_effplugin.techniques.early_exit.ledger import Ledger
from vllm_effplugin.techniques.early_exit.passage import STAYS, Passage

DECODE_STEPS = 16
"""Decode steps that the time of a whole step is the median of."""

STEPS = 512
"""Steps to play through."""

WARM_UP = 64
"""Steps before them, in which the engine learns what pays."""


class Machine(BaseModel):
    """Seconds that a model's parts take, as its engine measured them.

    Attributes:
        sizes: numbers of tokens.
        plain: the stack without exits, for each size.
        whole: the stack with them as one graph, for each size.
        head: an exit's adapter, the final norm and the head, which a `softmax` gate runs.
        segments: for each segment, its seconds for each size.
        overhead: to cut a batch.
        fill: for each exit, the seconds of the cache entries of tokens that leave, for each size;
            None under `recompute`.
        steps: a whole decode step without exits, head and scheduling included, per batch size.
        block_size: positions of a block of the KV cache.
        depths: of the exits.
        blocks: whether each exit has a layer of its own.
    """

    sizes: list[int]
    plain: list[float]
    whole: list[float]
    head: list[float]
    segments: list[list[float]]
    overhead: float
    fill: list[list[float]] | None
    steps: dict[int, float]
    block_size: int
    num_layers: int
    depths: list[int]
    blocks: list[bool]

    def costs(self, kept: Sequence[int], max_pending: int) -> Costs:
        """The cost table of a stack that has only some of the exits, given by index.

        The block of an exit that is left out is taken to have cost what a layer before it did.
        """
        segments = np.array(self.segments)
        whole = np.array(self.whole)
        layers = np.diff([0, *self.depths])
        for index in np.flatnonzero(self.blocks):
            if index not in kept:
                block = segments[index] / (layers[index] + 1)
                segments[index] -= block
                whole -= block
        # Measured apart from each other, and it computes all that the stack without exits does.
        whole = np.maximum(self.plain, whole)
        columns: list[Column] = []
        start = 0
        for end in [*(index + 1 for index in kept), len(segments)]:
            columns.append(Column(self.sizes, segments[start:end].sum(axis=0).tolist()))
            start = end
        fill = None
        if self.fill is not None:
            fill = [Column(self.sizes, self.fill[index]) for index in kept]
        return Costs(Column(self.sizes, whole.tolist()), columns, self.overhead, fill, max_pending)


class Forecast(BaseModel):
    """What is expected at one batch size.

    Attributes:
        batch: requests that decode at a time.
        speed: tokens per second, relative to the model without exits.
        layer_tokens: layers run times tokens, relative to it.
    """

    batch: int
    speed: float
    layer_tokens: float


def forecast(
    machine: Machine, config: EarlyExitConfig, kept: Sequence[int], fires: np.ndarray, batch: int
) -> Forecast:
    """Play decoding through.

    Args:
        machine: measured with all exits that were considered.
        config: the exits that are kept, and the cache policy.
        kept: their indices among all.
        fires: `[M, S]`: the exit, among those kept, at which each token leaves; -1 for none.
        batch: requests that decode at a time; one that ends is followed by the next sequence.
    """
    exits = config.exits
    costs = machine.costs(kept, config.max_pending)
    layers = np.diff([0, *(point.depth for point in exits), machine.num_layers])
    layers[:-1] += [point.adapter == "block" for point in exits]
    preference = Preference(costs)
    ledger = Ledger(batch, len(exits), config.max_pending, machine.block_size)
    asks = [
        Column(machine.sizes, machine.head) if point.gate == "softmax" else None for point in exits
    ]
    owes = config.cache == "recompute"
    slots, ones = np.arange(batch), np.ones(batch, dtype=np.int64)
    sequences = slots % len(fires)
    # Spread over the positions, as requests of a running server are.
    positions = (slots * fires.shape[1] // batch).astype(np.int64)
    for slot in range(batch):
        ledger.open(slot)
    seconds, ran = 0.0, np.zeros(len(exits) + 1)
    for step in range(-WARM_UP, STEPS):
        if step == 0:
            seconds, ran = 0.0, np.zeros(len(exits) + 1)
        passage = Passage(ledger, preference, owes, slots, positions, ones)
        chosen = fires[sequences, positions]
        in_segments = passage.waits or passage.may_leave
        if in_segments:
            taken, tokens = _in_segments(passage, costs, asks, chosen)
            seconds += taken
            ran += tokens
        else:
            passage.fired[:] = chosen
            passage.finish()
            seconds += costs.whole.at(batch)
            for exit, asked in enumerate(asks):
                if asked is not None:
                    seconds += asked.at(int(((chosen == STAYS) | (chosen >= exit)).sum()))
            ran += batch
        if preference.looks():
            preference.learn(batch, passage.leavable(len(exits)), in_segments)
        positions = positions + 1
        for slot in np.flatnonzero(positions == fires.shape[1]).tolist():
            sequences[slot] = (sequences[slot] + batch) % len(fires)
            positions[slot] = 0
            ledger.open(slot)
    stack = seconds / STEPS
    plain = Column(machine.sizes, machine.plain).at(batch)
    rest = max(0.0, machine.steps[batch] - plain)  # head, sampler, scheduler
    return Forecast(
        batch=batch,
        speed=(plain + rest) / (stack + rest),
        layer_tokens=float(ran @ layers) / (STEPS * batch * machine.num_layers),
    )


def _in_segments(
    passage: Passage, costs: Costs, asks: Sequence[Column | None], chosen: np.ndarray
) -> tuple[float, np.ndarray]:
    """Seconds of a step that runs in segments, and the tokens that each segment runs on."""
    exits = len(costs.segments) - 1
    tokens = np.zeros(exits + 1)
    seconds = 0.0
    for exit in range(exits):
        batch = passage.batch
        tokens[exit] = batch.tokens
        seconds += costs.segments[exit].at(batch.tokens)
        asked = asks[exit]
        if asked is not None:
            seconds += asked.at(int((passage.fired[batch.rows] == STAYS).sum()))
        passage.fired[chosen == exit] = exit
        departure = passage.depart(exit)
        after, leaving = departure.batch, int(departure.leaves.sum())
        if costs.fill is not None and leaving:
            seconds += costs.owed(exit, 0 if after is None else after.tokens, leaving)
        if after is None:
            return seconds, tokens
        if after is not batch:
            seconds += costs.overhead
    passage.finish()
    tokens[-1] = passage.batch.tokens
    return seconds + costs.segments[-1].at(passage.batch.tokens), tokens


def measure_machine(checkpoint: str, batches: Sequence[int], **options: Any) -> dict[str, Any]:
    """A `Machine` as JSON, for a checkpoint with exits; runs in the engine's process.

    `options` are further arguments of `vllm.LLM`.
    """
    from vllm import LLM, SamplingParams

    llm = LLM(
        checkpoint,
        max_model_len=512,
        max_num_seqs=max(batches),
        disable_log_stats=True,
        **options,
    )
    [measured] = llm.collective_rpc("exit_costs")
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=DECODE_STEPS + 2,
        ignore_eos=True,
        detokenize=False,
        extra_args={"exit": False},
    )
    engine = llm.llm_engine
    measured["steps"] = {}
    for batch in batches:
        for row in range(batch):
            engine.add_request(f"{batch}-{row}", {"prompt_token_ids": [row + 1] * 8}, sampling)
        times = []
        while engine.has_unfinished_requests():
            start = time.perf_counter()
            engine.step()
            times.append(time.perf_counter() - start)
        measured["steps"][batch] = statistics.median(times[-DECODE_STEPS:])
    return measured
