"""The stack with exits.

A token whose gate fires takes its logits from that exit, always: what is generated depends on the
request alone. Whether the layers behind the exit then run without it is a matter of cost only, and
decided twice. Before a step, the stack runs as one graph where leaving would save nothing; that
graph returns the hidden states at the exits too, so that gates fire the same. At an exit, the
batch is cut where the rows that leave are worth it (`step.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.forward_context import set_forward_context

from vllm_effplugin.engine.batch import RowSource, current_step
from vllm_effplugin.engine.segments import compiled_part, run_units
from vllm_effplugin.plan import Plan
from vllm_effplugin.techniques.early_exit.cache_fill import open_fill
from vllm_effplugin.techniques.early_exit.config import EarlyExitConfig
from vllm_effplugin.techniques.early_exit.costs import Column, Costs
from vllm_effplugin.techniques.early_exit.exits import Exit
from vllm_effplugin.techniques.early_exit.ledger import Ledger
from vllm_effplugin.techniques.early_exit.request import parse_exit_request, thresholds
from vllm_effplugin.techniques.early_exit.step import Counters, StepRun

SMOOTHING = 0.1
"""Weight of the last step in the running mean of what leaving saves."""

MARGIN = 0.03
"""Share of a step that leaving has to save before the stack runs in segments."""

MEASURED_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MEASUREMENTS = 15

CUT_SECONDS = 2e-4
"""Until measured: host time to cut a batch and to build its attention metadata."""


def _gate(exit: Exit, hidden: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
    return () if exit.gate is None else (exit.gate(hidden + residual),)


def _to_exit(
    self: Any, positions: Tensor, hidden: Tensor, residual: Tensor | None
) -> tuple[Tensor, ...]:
    hidden, residual = run_units(self.units, self.owned[0].layers, positions, hidden, residual)
    return hidden, residual, *_gate(self.exit[0], hidden, residual)


def _to_end(self: Any, positions: Tensor, hidden: Tensor, residual: Tensor | None) -> Tensor:
    trunk = self.owned[0]
    hidden, residual = run_units(self.units, trunk.layers, positions, hidden, residual)
    return trunk.norm(hidden, residual)[0]


def _whole(
    self: Any, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None
) -> tuple[Tensor, ...]:
    trunk = self.owned[0]
    hidden = trunk.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
    residual = None
    exits: list[Tensor] = []
    for unit in self.units:
        hidden, residual = trunk.layers[unit.first](positions, hidden, residual)
        exit = self.exit_behind[0].get(unit.layers[-1])
        if exit is not None:
            exits += [hidden, residual, *_gate(exit, hidden, residual)]
    return trunk.norm(hidden, residual)[0], *exits


class ExitLoop:
    """Runs a trunk whose plan has exits.

    Args:
        trunk: owns the layers, the final norm, and the exits as `trunk.exits`.
        config: exits and policies.
        plan: one segment before, between and behind the exits.
    """

    def __init__(
        self, trunk: Any, config: EarlyExitConfig, plan: Plan, vllm_config: VllmConfig, prefix: str
    ) -> None:
        self.config = config
        self.exits: list[Exit] = list(trunk.exits)
        self.num_layers = len(plan.unit_of)
        *before, last = plan.segments
        self.segments = [
            *(
                compiled_part(
                    _to_exit, f"ToExit{i}", trunk, segment.units, vllm_config, prefix, exit=exit
                )
                for i, (segment, exit) in enumerate(zip(before, self.exits, strict=True))
            ),
            compiled_part(_to_end, "ToEnd", trunk, last.units, vllm_config, prefix),
        ]
        behind = {exit.point.depth - 1: exit for exit in self.exits}
        self.whole = compiled_part(
            _whole, "Whole", trunk, plan.units, vllm_config, prefix, exit_behind=behind
        )
        self.fill = open_fill(config, trunk)
        self.costs: Costs | None = None
        self.counters = Counters(exits=[0] * len(self.exits))
        self.on_step: Callable[[StepRun], None] | None = None
        self.compute_logits: Callable[[Tensor], Tensor | None] = lambda hidden: None
        self._trunk = trunk
        self._vllm_config = vllm_config
        self._layer_name = trunk.layers[0].self_attn.attn.layer_name
        self._source: RowSource | None = None
        self._advantage = 0.0
        slots = vllm_config.scheduler_config.max_num_seqs
        self._thresholds = np.full((slots, len(self.exits)), np.inf)
        self._ledger: Ledger | None = None
        # Hidden state and residual of the tokens that wait, `max_pending` places per request.
        places = slots * config.max_pending if config.cache == "recompute" else 0
        model = vllm_config.model_config
        self.waiting = torch.empty(2, places, model.get_hidden_size(), dtype=model.dtype)

    def weights_loaded(self) -> None:
        """The trunk has its weights, in the layout of the checkpoint."""
        if self.fill is not None:
            self.fill.prepare()

    # --- Requests --------------------------------------------------------------------------------

    def attach(self, source: RowSource, compute_logits: Callable[[Tensor], Tensor | None]) -> None:
        """Where the rows of a step come from, and the language model head."""
        self._source = source
        self.compute_logits = compute_logits

    def admit(self, slot: int, extra_args: Mapping[str, Any] | None) -> None:
        """A request takes a slot. Its wishes were checked when it arrived."""
        chosen = thresholds(self.config, parse_exit_request(extra_args))
        for i, (exit, threshold) in enumerate(zip(self.exits, chosen, strict=True)):
            self._thresholds[slot, i] = exit.comparable(threshold)
        self.ledger.open(slot)

    @property
    def ledger(self) -> Ledger:
        """What the requests owe. Made late: the block size is final only with the cache."""
        if self._ledger is None:
            slots, exits = self._thresholds.shape
            self._ledger = Ledger(
                slots, exits, self.config.max_pending, self._vllm_config.cache_config.block_size
            )
        return self._ledger

    # --- A step ----------------------------------------------------------------------------------

    def __call__(
        self, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None
    ) -> Tensor:
        """Hidden states `[T, d]` after the final norm; those of an exit where its gate fired."""
        step = current_step(self._layer_name)
        if step is None or self._source is None:
            return self._warm_up(input_ids, positions, inputs_embeds)
        rows = self._source.rows()
        thresholds = self._thresholds[rows.slots]
        exits = (thresholds < np.inf).any(1)
        if not exits.any():  # nobody may leave at all: nothing but the stack
            return self.whole(input_ids, positions, inputs_embeds)[0]
        self.ledger.begin(rows.slots, rows.starts, exits)
        thresholds[~rows.decodes] = np.inf
        run = StepRun(self, step, rows, thresholds, input_ids, positions)
        decides = bool((thresholds < np.inf).any())
        if run.waiting.any() or (decides and self._prefers_segments):
            hidden = run.in_segments(self._embed(input_ids, inputs_embeds))
        else:
            hidden = run.as_one(inputs_embeds)
        if decides:
            self._learn(run)
        if self.on_step is not None:
            self.on_step(run)
        return hidden

    @property
    def _prefers_segments(self) -> bool:
        return self.costs is None or self._advantage > MARGIN

    def _learn(self, run: StepRun) -> None:
        """Take into account what a step saved, or would have saved, by letting tokens leave."""
        if self.costs is not None:
            saved = self.costs.saved(run.num_tokens, run.leavable)
            self._advantage += SMOOTHING * (saved - self._advantage)

    def _warm_up(
        self, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None
    ) -> Tensor:
        """Run, and thereby compile, everything once; no gate decides."""
        hidden = self._embed(input_ids, inputs_embeds)
        residual = None
        for segment in self.segments[:-1]:
            hidden, residual, *_ = segment(positions, hidden, residual)
        self.segments[-1](positions, hidden, residual)
        return self.whole(input_ids, positions, inputs_embeds)[0]

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        return self._trunk.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds

    def finish(self, exit: int, hidden: Tensor) -> Tensor:
        """The final norm's output for `[n, d]` hidden states that leave at an exit."""
        return self._trunk.norm(self.exits[exit].adapt(hidden))

    def agreed(self, decisions: np.ndarray) -> np.ndarray:
        """The first rank's decisions, so that all ranks run the same."""
        if self._vllm_config.parallel_config.tensor_parallel_size == 1:
            return decisions
        group = get_tp_group()
        shared = torch.from_numpy(decisions).to(group.device)
        return group.broadcast(shared, src=0).cpu().numpy()

    # --- Costs -----------------------------------------------------------------------------------

    def measure_costs(self) -> None:
        """Measure the parts at some batch sizes, attention left out. At the end of start-up."""
        limit = self._vllm_config.scheduler_config.max_num_batched_tokens
        sizes = [size for size in MEASURED_SIZES if size <= limit]
        if self.config.compaction == "always" or len(sizes) < 2:
            return
        seconds = np.array([self._part_seconds(size) for size in sizes])
        seconds = self.agreed(seconds)
        whole, *segments = (Column(sizes, column.tolist()) for column in seconds.T)
        fill = None if self.fill is None else [0.0] * len(self.exits)
        self.costs = Costs(whole, segments, CUT_SECONDS, fill)

    @torch.inference_mode()
    def _part_seconds(self, tokens: int) -> list[float]:
        """Seconds of the whole stack and of each segment."""
        weight = self._trunk.norm.weight
        positions = torch.zeros(tokens, dtype=torch.int64, device=weight.device)
        hidden = torch.zeros(tokens, len(weight), dtype=weight.dtype, device=weight.device)
        ids = torch.zeros_like(positions, dtype=torch.int32)
        first, *others = self.segments
        calls = [
            lambda: self.whole(ids, positions, None),
            lambda: first(positions, hidden, None),
            *(lambda part=part: part(positions, hidden, hidden) for part in others),
        ]
        with set_forward_context(None, self._vllm_config, num_tokens=tokens):
            return [_best_time(call, weight.device) for call in calls]


def _best_time(call: Callable[[], Any], device: torch.device) -> float:
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = []
    for _ in range(MEASUREMENTS):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        times.append(time.perf_counter() - start)
    return min(times)
