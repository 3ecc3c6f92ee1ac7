"""What the parts of a stack with exits cost on this machine, measured at the end of start-up.

Shapes: `T` tokens, `d` hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vllm_effplugin.engine.batch import Rows, Step
from vllm_effplugin.engine.counters import Counters
from vllm_effplugin.techniques.early_exit.exits import together
from vllm_effplugin.techniques.early_exit.passage import Wishes
from vllm_effplugin.techniques.early_exit.step import StepRun
from vllm_effplugin.techniques.early_exit.totals import exit_totals

if TYPE_CHECKING:
    from vllm_effplugin.techniques.early_exit.exits import Exit
    from vllm_effplugin.techniques.early_exit.loop import ExitLoop

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
REPEATS, MEASURING_ROUNDS, MEASURING_SECONDS = 5, 6, 0.6
"""Runs of a step in its turn, most turns, and the time behind which no second or further starts."""

CUTTING_ROWS = 16
"""Most rows of the batch whose cutting is measured."""


def clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was told."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


class Rehearsal:
    """Takes the place of a step in the runner's dummy run, attention included, and measures.

    Attributes:
        parts: seconds of an exit's way to the logits, of the stack without exits, of the stack
            with them as one graph, and of each segment.
        fills: for each exit, the seconds that the cache entries of all tokens cost there.
        overhead: seconds that a step takes longer when it is cut behind its first exit, layers
            left out; of a batch with one token per request.
    """

    def __init__(self, loop: ExitLoop) -> None:
        self._loop = loop
        self.parts: list[float] = []
        self.fills: list[float] = []
        self.overhead = 0.0

    def __call__(self, step: Step, input_ids: Tensor | None, positions: Tensor) -> Tensor:
        loop = self._loop
        output = loop.plain(input_ids, positions, None)
        self.parts = self._part_seconds(input_ids, positions, output)
        if loop.approximates:
            self.fills = [
                self._fill_seconds(step, exit, output, positions) for exit in range(len(loop.exits))
            ]
        if 1 < step.common.num_reqs == len(positions) <= CUTTING_ROWS:
            self.overhead = self._cutting_seconds(step, input_ids, positions, output)
        return output

    def _part_seconds(
        self, input_ids: Tensor | None, positions: Tensor, hidden: Tensor
    ) -> list[float]:
        loop = self._loop
        first, *others = loop.segments
        head = lambda: loop.compute_logits(loop.finish(0, hidden))  # noqa: E731
        plain = [head, lambda: loop.plain(input_ids, positions, None)]
        as_one = [head, lambda: loop.whole(input_ids, positions, None)]
        in_segments = [
            head,
            lambda: first(positions, hidden, None),
            *(lambda part=part: part(positions, hidden, hidden) for part in others),
        ]
        (head_seconds, stack), (_, whole), (_, *segments) = self._best_times(
            [plain, as_one, in_segments], positions.device
        )
        return [head_seconds, stack, whole, *segments]

    def _fill_seconds(self, step: Step, exit: int, hidden: Tensor, positions: Tensor) -> float:
        fill, skipped = self._loop.fill, self._loop.skipped
        indices = torch.arange(len(positions), device=positions.device)
        # No request runs yet, so that any slot may be written; a block each, as requests have.
        cache = self._loop.vllm_config.cache_config
        slots = indices % (cache.num_gpu_blocks or 1) * cache.block_size
        # Tokens leave one by one; what more than one of a row costs, others cost as well.
        rows = np.arange(len(positions)) % step.common.num_reqs
        ones = np.ones(len(rows), dtype=np.int64)

        def run() -> None:
            if fill is not None:
                fill.write(exit, fill.sources(exit, hidden, indices), positions, slots)
            if skipped is not None:
                skipped.skip(exit, step, rows, ones, hidden)

        return self._best_times([[run]], positions.device)[0][0]

    def _cutting_seconds(
        self, step: Step, input_ids: Tensor | None, positions: Tensor, hidden: Tensor
    ) -> float:
        """The time of a step of which every other row leaves, less that of an uncut one."""
        loop, count = self._loop, len(positions)
        ones = np.ones(count, dtype=np.int64)
        yes = ones.astype(bool)
        rows = Rows(np.arange(count), np.zeros_like(ones), ones, yes, yes)
        thresholds = np.full((count, len(loop.exits)), np.inf)
        thresholds[::2, 0] = -np.inf

        def run() -> StepRun:
            return StepRun(loop, step, rows, Wishes(thresholds), input_ids, positions)

        with _without_layers(loop, hidden):
            [[cut], [whole]] = self._best_times(
                [[lambda: run().in_segments(hidden)], [lambda: run().as_one(None)]],
                positions.device,
            )
        for slot in range(count):
            loop.ledger.open(slot)
        return max(0.0, cut - whole)

    def _best_times(
        self, steps: Sequence[Sequence[Callable[[], Any]]], device: torch.device
    ) -> list[list[float]]:
        """The shortest time of each call.

        Args:
            steps: calls that follow each other. A step is repeated before the next one's turn, and
                its first time does not count, so that caches hold what they hold in a run of such
                steps; the steps take turns, so that a drift falls on all alike.
        """
        best = [[np.inf] * len(calls) for calls in steps]
        end = time.perf_counter() + MEASURING_SECONDS
        for round in range(MEASURING_ROUNDS):
            # All ranks go on or none does: the calls have collectives in them.
            if round and self._loop.agreed(np.array([time.perf_counter() > end]))[0]:
                break
            for index, calls in enumerate(steps):
                for repeat in range(REPEATS):
                    for place, call in enumerate(calls):
                        start = clock(device)
                        call()
                        taken = clock(device) - start
                        if repeat:
                            best[index][place] = min(best[index][place], taken)
        return best


@contextmanager
def _without_layers(loop: ExitLoop, hidden: Tensor) -> Iterator[None]:
    """Everything of a step but its layers: they give `hidden`, as far as there are tokens."""
    kept = (loop.segments, loop.whole, loop.fills, loop.counters, loop.shadow, loop.skipped)

    logit = hidden[:, 0].float()

    def to_exit(exit: Exit) -> Callable[..., tuple[Tensor, ...]]:
        return lambda positions, *_: (
            *([hidden[: len(positions)]] * (2 + exit.finishes_in_graph)),
            *([logit[: len(positions)]] if exit.gate is not None else ()),
        )

    gates = together([logit] * sum(loop.gated))
    tails = [*gates, *(hidden for exit in loop.exits for _ in range(1 + (exit.block is not None)))]
    to_end = lambda positions, *_: hidden[: len(positions)]  # noqa: E731
    loop.segments = [loop.graph_inputs.placed(part) for part in (*map(to_exit, loop.exits), to_end)]
    loop.whole = lambda *_: (hidden.clone(), *tails)
    loop.fills, loop.counters, loop.shadow = None, Counters(exit_totals(len(loop.exits))), 0.0
    loop.skipped = None
    try:
        yield
    finally:
        loop.segments, loop.whole, loop.fills, loop.counters, loop.shadow, loop.skipped = kept
