"""The stack with exits.

A token whose gate fires takes its logits from that exit, always: what is generated depends on the
request alone (but for preemption: what a request had generated runs again as a prompt, and the last
of it gives the full model's token). Whether the layers behind the exit then run without it is a
matter of cost only, and decided twice. Before a step, the stack runs as one graph where leaving
would save nothing; that graph returns the hidden states at the exits too, so that gates fire the
same. At an exit, the batch is cut where the rows that leave are worth it (`step.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.mamba.abstract import MambaBase

from vllm_effplugin.engine.batch import (
    RowSource,
    Step,
    cached_name,
    cached_part,
    current_step,
    running_on,
    with_own_blocks,
)
from vllm_effplugin.engine.graphs import GraphInputs
from vllm_effplugin.engine.loop import TrunkLoop
from vllm_effplugin.engine.segments import (
    apart,
    compiled_part,
    joined,
    run_units,
    to_end,
    whole_stack,
)
from vllm_effplugin.engine.state_pages import waves
from vllm_effplugin.errors import UnsupportedError
from vllm_effplugin.plan import Plan
from vllm_effplugin.techniques.early_exit.cache_fill import PendingFills, open_fill
from vllm_effplugin.techniques.early_exit.config import EarlyExitConfig
from vllm_effplugin.techniques.early_exit.costs import Column, Costs, Preference
from vllm_effplugin.techniques.early_exit.draft import DraftRun, Drafts
from vllm_effplugin.techniques.early_exit.exits import Exit, Tail
from vllm_effplugin.techniques.early_exit.ledger import Ledger
from vllm_effplugin.techniques.early_exit.measure import (
    CUTTING_ROWS,
    SIZES,
    Rehearsal,
    clock,
)
from vllm_effplugin.techniques.early_exit.passage import Wishes
from vllm_effplugin.techniques.early_exit.request import (
    draft_thresholds,
    parse_exit_request,
    thresholds,
)
from vllm_effplugin.techniques.early_exit.states import open_states
from vllm_effplugin.techniques.early_exit.step import StepRun
from vllm_effplugin.techniques.early_exit.totals import exit_totals

if TYPE_CHECKING:
    from vllm.pooling_params import PoolingParams
    from vllm.sampling_params import SamplingParams


def _tail(
    trunk: Any, exit: Exit, positions: Tensor, hidden: Tensor, residual: Tensor
) -> tuple[Tensor, ...]:
    """What is needed of a batch behind an exit, in the order of `take_tail`."""
    tail = [hidden, residual]
    if exit.block is not None:
        tail.append(trunk.norm(*exit.block(positions, *apart(hidden, residual)))[0])
    elif exit.finishes_in_graph:
        tail.append(trunk.norm(hidden + residual))
    if exit.gate is not None:
        tail.append(exit.gate(hidden + residual))
    return tuple(tail)


def _to_exit(
    self: Any, positions: Tensor, hidden: Tensor, residual: Tensor | None
) -> tuple[Tensor, ...]:
    trunk = self.owned[0]
    hidden, residual = run_units(self.units, trunk.layers, positions, hidden, residual)
    return _tail(trunk, self.exit[0], positions, hidden, residual)


def _whole(
    self: Any, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None
) -> tuple[Tensor, ...]:
    trunk = self.owned[0]
    hidden = trunk.embed(input_ids, inputs_embeds)
    residual: Tensor | None = None
    exits: list[Tensor] = []
    gated: list[Tensor] = []
    for unit in self.units:
        hidden, residual = run_units((unit,), trunk.layers, positions, hidden, residual)
        exit = self.exit_behind[0].get(unit.layers[-1])
        if exit is not None:
            state = joined(hidden, residual)
            exits.append(state)
            if exit.block is not None:
                own = exit.block(positions, *apart(hidden, residual))
                exits.append(trunk.norm(*own)[0])
            if exit.gate is not None:
                gated.append(state)
    return trunk.norm(hidden, residual)[0], *trunk.gates(gated), *exits


class ExitLoop(TrunkLoop):
    """Runs a trunk whose plan has exits.

    Args:
        trunk: owns the layers, the final norm, and the exits as `trunk.exits`.
        config: exits and policies.
        plan: one segment before, between and behind the exits.
    """

    # Forward functions of the last segment and of the stack without and with exits.
    TO_END, PLAIN, WHOLE = staticmethod(to_end), staticmethod(whole_stack), staticmethod(_whole)

    def __init__(
        self, trunk: Any, config: EarlyExitConfig, plan: Plan, vllm_config: VllmConfig, prefix: str
    ) -> None:
        self.exits: list[Exit] = list(trunk.exits)[: len(plan.boundaries)]
        super().__init__(vllm_config, exit_totals(len(self.exits)))
        self.config = config
        self.gated = [exit.gate is not None for exit in self.exits]
        self.num_layers = len(plan.unit_of)
        # Layers up to each exit and to the end, the exits' own included.
        blocks = np.cumsum([exit.block is not None for exit in self.exits], dtype=int)
        self.layers_to_exit = [
            exit.point.depth + int(count) for exit, count in zip(self.exits, blocks, strict=True)
        ]
        self.layers_to_end = self.num_layers + int(blocks[-1])
        *before, last = plan.segments
        model = vllm_config.model_config
        self.graph_inputs = GraphInputs(vllm_config, model.get_hidden_size(), model.dtype)
        parts = [
            *(
                compiled_part(
                    _to_exit, f"ToExit{i}", trunk, segment.units, vllm_config, prefix, exit=exit
                )
                for i, (segment, exit) in enumerate(zip(before, self.exits, strict=True))
            ),
            compiled_part(self.TO_END, "ToEnd", trunk, last.units, vllm_config, prefix),
        ]
        self.segments: list[Callable[..., Any]] = [self.graph_inputs.placed(part) for part in parts]
        # Not the graph below without its further results: in bf16 those change what Inductor keeps
        # in fp32. Where nobody may leave, outputs are those of the stock model bit for bit.
        plain = compiled_part(self.PLAIN, "Plain", trunk, plan.units, vllm_config, prefix)
        behind = {exit.point.depth - 1: exit for exit in trunk.exits}
        whole = compiled_part(
            self.WHOLE, "Whole", trunk, plan.units, vllm_config, prefix, exit_behind=behind
        )
        self.plain: Callable[..., Any] = plain
        self.whole: Callable[..., Any] = whole
        self.parts = nn.ModuleList([*parts, plain, whole])
        self.fill = open_fill(config, trunk)
        state_space = isinstance(cached_part(trunk.layers[0]), MambaBase)
        self.skipped = open_states(config, trunk, state_space=state_space)
        self.has_states = state_space or config.has_states
        self.shadow = config.shadow
        self._head_seconds: list[float] = []
        self._plain_seconds: list[float] = []
        self.rehearsal: Rehearsal | None = None
        self.on_step: Callable[[StepRun], None] | None = None
        self.compute_logits: Callable[[Tensor], Tensor | None] = lambda hidden: None
        self.trunk = trunk
        self._layer_name = cached_name(cached_part(trunk.layers[0]))
        self._last_step: Step | None = None
        self.preference = Preference(None)
        slots = vllm_config.scheduler_config.max_num_seqs
        self._thresholds = np.full((slots, len(self.exits)), np.inf)
        self._draft_thresholds = np.full((slots, len(self.exits)), np.inf)
        # Of the batch's requests, while they stay the same.
        self._slots: np.ndarray | None = None
        self._wishes = Wishes(np.zeros((0, len(self.exits))))
        # Whether exits have to see all tokens of these, drafted ones included.
        self.needs_exits = False
        # Hidden state, residual and cache slot of the tokens that wait, `max_pending` places per
        # request.
        places = slots * config.max_pending if config.cache == "recompute" else 0
        self.waiting = torch.empty(2, places, model.get_hidden_size(), dtype=model.dtype)
        self.waiting_slots = torch.zeros(places, dtype=torch.int64)

    def weights_loaded(self) -> None:
        self.trunk.gates.prepare()
        if self.fill is not None:
            self.fill.prepare()
        if self.skipped is not None:
            self.skipped.prepare()

    # --- Requests --------------------------------------------------------------------------------

    def attach(self, source: RowSource, model: Any) -> None:
        super().attach(source, model)
        self.compute_logits = model.compute_logits

    def admit(self, slot: int, params: SamplingParams | PoolingParams | None) -> None:
        request = parse_exit_request(getattr(params, "extra_args", None))
        leave, draft = thresholds(self.config, request), draft_thresholds(self.config, request)
        for i, exit in enumerate(self.exits):
            self._thresholds[slot, i] = exit.comparable(leave[i])
            self._draft_thresholds[slot, i] = exit.comparable(draft[i])
        self._open(slot)

    def release(self, slot: int) -> None:
        """The request in a slot owes nothing any more."""
        self._open(slot)
        self.counters.set("pending", self.ledger.backlog)

    def _open(self, slot: int) -> None:
        self.ledger.open(slot)
        if self.fills is not None:
            self.fills.open(slot)

    # Made late: the block size is final only with the cache.

    @cached_property
    def ledger(self) -> Ledger:
        """What the requests owe under `recompute`."""
        slots, exits = self._thresholds.shape
        return Ledger(
            slots, exits, self.config.max_pending, self.vllm_config.cache_config.block_size
        )

    @cached_property
    def fills(self) -> PendingFills | None:
        """What they owe under the other policies."""
        if self.fill is None:
            return None
        return PendingFills(
            self.fill,
            len(self._thresholds),
            self.config.max_pending,
            self.vllm_config.cache_config.block_size,
            self.vllm_config.model_config.dtype,
            self.waiting.device,
        )

    # --- A step ----------------------------------------------------------------------------------

    def __call__(
        self, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None
    ) -> Tensor:
        """Hidden states `[T, d]` after the final norm; those of an exit where its gate fired."""
        step = current_step(self._layer_name)
        if step is None or self._source is None:
            return self._warm_up(input_ids, positions, inputs_embeds)
        if self.rehearsal is not None:
            return self._rehearse(self.rehearsal, step, input_ids, positions)
        slots = self._source.slots()
        if slots is None:
            return self._warm_up(input_ids, positions, inputs_embeds)
        self._last_step = step
        if slots is not self._slots:
            self._slots = slots
            self._wishes = Wishes(self._thresholds[slots])
            self.needs_exits = self.config.sees_all_tokens and (
                self._wishes.count > 0 or bool(np.any(self._draft_thresholds[slots] < np.inf))
            )
        if not (self._wishes.count or self.needs_exits):  # nothing but the stack
            for name in ("layer_tokens", "full_layer_tokens"):
                self.counters.add(name, step.common.num_actual_tokens * self.num_layers)
            return self.stepped(None, self.plain(input_ids, positions, inputs_embeds))
        rows = self._source.rows()
        wishes = self._wishes.of(rows.decodes)
        if self.config.has_states:
            waves(step)  # now: between layers, with cold caches, it takes several times as long
        run = StepRun(self, step, rows, wishes, input_ids, positions)
        in_segments = run.wants_segments
        looks = wishes.count > 0 and self.preference.looks()
        began = clock(positions.device) if looks else 0.0
        if in_segments:
            hidden = run.in_segments(self.trunk.embed(input_ids, inputs_embeds))
        else:
            hidden = run.as_one(inputs_embeds)
        if looks:
            passage = run.passage
            seconds = float(self.agreed(np.array([clock(positions.device) - began]))[0])
            self.preference.learn(
                passage.tokens,
                passage.leavable(len(self.exits)),
                None if in_segments and not passage.may_leave else in_segments,
                seconds,
            )
        if self.on_step is not None:
            self.on_step(run)
        return self.stepped(run, hidden)

    def stepped(self, run: StepRun | None, hidden: Tensor) -> Tensor:
        """Called with each step's hidden states, and the run where some row wished to leave.

        Returns:
            what the runner will see.
        """
        return hidden

    def _warm_up(
        self, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None
    ) -> Tensor:
        """Run, and thereby compile, everything once; no gate decides."""
        hidden = self.trunk.embed(input_ids, inputs_embeds)
        residual = None
        for segment in self.segments[:-1]:
            hidden, residual, *_ = segment(positions, hidden, residual)
        self.segments[-1](positions, hidden, residual)
        self.whole(input_ids, positions, inputs_embeds)
        return self.plain(input_ids, positions, inputs_embeds)

    def finish(self, exit: int, hidden: Tensor) -> Tensor:
        """The final norm's output for `[n, d]` hidden states that leave at an exit.

        Not where a graph computed it.
        """
        return self.trunk.norm(self.exits[exit].adapt(hidden))

    def finished(self, exit: int, tail: Tail, index: Tensor | slice) -> Tensor:
        """The same for some tokens of a batch, `[n, d]`."""
        if tail.finished is not None:
            return tail.finished[index]
        return self.finish(exit, tail.at(index))

    # --- Verified drafts ------------------------------------------------------------------------

    @torch.inference_mode()
    def draft(self, rows: np.ndarray, positions: np.ndarray, ids: np.ndarray, most: int) -> Drafts:
        """Guess what requests go on with, from their first exit alone, while its gate fires.

        Between two steps. The layers before the exit run on tokens that the cache does not hold
        yet, and write entries that the next step writes again.

        Args:
            rows: indices of the step's rows that have a new token and run no more of a prompt.
            positions, ids: of that token.
            most: tokens to guess.

        Returns:
            for each of `rows`, the tokens guessed; none for a request that asked for none.
        """
        assert self._last_step is not None
        assert self._source is not None
        slots = self._source.slots()
        assert slots is not None
        wanted = self._draft_thresholds[slots[rows]]
        drafts: Drafts = [[] for _ in rows]
        for exit in range(len(self.exits)):
            # At its first exit: the layers up to there are the ones that drafting has to run.
            chosen = np.flatnonzero(
                (wanted[:, exit] < np.inf) & (wanted[:, :exit] == np.inf).all(1)
            )
            if len(chosen):
                run = DraftRun(self, self._last_step, exit, wanted[chosen, exit])
                for row, tokens in zip(
                    chosen.tolist(),
                    run(rows[chosen], positions[chosen], ids[chosen], most),
                    strict=True,
                ):
                    drafts[row] = tokens
        return drafts

    # --- Costs -----------------------------------------------------------------------------------

    @torch.inference_mode()
    def measure_costs(self, run_dummy: Callable[[int], bool]) -> None:
        """Measure what exits cost and save."""
        if self.config.compaction == "always":
            return
        scheduler = self.vllm_config.scheduler_config
        found: dict[int, Rehearsal] = {}
        for size in SIZES:
            self.rehearsal = rehearsal = Rehearsal(self)
            if size <= scheduler.max_num_batched_tokens and run_dummy(size):
                found[size] = rehearsal
            self.rehearsal = None
        if len(found) < 2:
            return
        single = min(scheduler.max_num_seqs, CUTTING_ROWS)
        overhead = found[max(size for size in found if size <= single)].overhead
        parts = np.array([item.parts for item in found.values()]).T
        fills = np.array([item.fills for item in found.values()]).T
        # Every rank decides by the same figures.
        agreed = self.agreed(np.concatenate([parts.ravel(), fills.ravel(), [overhead]]))
        overhead = float(agreed[-1])
        parts = agreed[: parts.size].reshape(parts.shape)
        fills = agreed[parts.size : -1].reshape(fills.shape)
        self._head_seconds, self._plain_seconds, *columns = parts.tolist()
        whole, *segments = (Column(list(found), column) for column in columns)
        fill = None
        if self.approximates:
            fill = [Column(list(found), column) for column in fills.tolist()]
        self.preference = Preference(
            Costs(whole, segments, overhead, fill, self.config.written_together)
        )

    @property
    def approximates(self) -> bool:
        """Whether what tokens skip is not made up for exactly."""
        return self.config.cache != "recompute"

    def _rehearse(
        self, rehearsal: Rehearsal, step: Step, input_ids: Tensor | None, positions: Tensor
    ) -> Tensor:
        if not self.has_states:
            return rehearsal(step, input_ids, positions)
        batch = with_own_blocks(step, self.vllm_config.cache_config.num_gpu_blocks or 1)
        with running_on(batch, step.common.slot_mapping):
            own = current_step(self._layer_name)
            assert own is not None
            return rehearsal(own, input_ids, positions)

    def describe_costs(self) -> dict[str, Any]:
        """What was measured, as JSON: a `forecast.Machine` but for its `steps`."""
        costs = self.preference.costs
        if costs is None:
            raise UnsupportedError(
                "no costs were measured: too few tokens fit a batch, or `compaction` is `always`"
            )
        return {
            "sizes": list(costs.whole.sizes),
            "plain": self._plain_seconds,
            "whole": list(costs.whole.seconds),
            "head": self._head_seconds,
            "segments": [list(segment.seconds) for segment in costs.segments],
            "overhead": costs.overhead,
            "fill": None if costs.fill is None else [list(c.seconds) for c in costs.fill],
            "block_size": self.vllm_config.cache_config.block_size,
            "num_layers": self.num_layers,
            "depths": [exit.point.depth for exit in self.exits],
            "blocks": [exit.block is not None for exit in self.exits],
        }
