"""The lower layers of a split model.

Early exit as ever, up to the last exit, which lies behind all layers that are here. What reaches it
goes up to the cloud, each position once: what left before comes there with the request's next token
that goes deeper (`recompute`). A token that no exit is sure of becomes a question.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig

from vllm_effplugin.engine.batch import Rows
from vllm_effplugin.engine.counters import publish_for
from vllm_effplugin.engine.segments import joined, run_units
from vllm_effplugin.engine.settings import CLOUD_KEY, CLOUD_URL
from vllm_effplugin.plan import Plan
from vllm_effplugin.techniques.early_exit.config import EarlyExitConfig
from vllm_effplugin.techniques.early_exit.exits import Exit
from vllm_effplugin.techniques.early_exit.loop import ExitLoop
from vllm_effplugin.techniques.early_exit.passage import STAYS, Batch
from vllm_effplugin.techniques.early_exit.request import parse_exit_request, thresholds
from vllm_effplugin.techniques.early_exit.step import StepRun, pseudo_random
from vllm_effplugin.techniques.edge_cloud.config import EdgeConfig
from vllm_effplugin.techniques.edge_cloud.desk import Desk, Question
from vllm_effplugin.techniques.edge_cloud.link import Link, LinkSettings
from vllm_effplugin.techniques.edge_cloud.request import (
    drawn_at,
    requested_mode,
    sampling_for_the_cloud,
)
from vllm_effplugin.techniques.edge_cloud.totals import LINK_TOTALS

if TYPE_CHECKING:
    from vllm.pooling_params import PoolingParams
    from vllm.sampling_params import SamplingParams


def _to_partition(
    self: Any, positions: Tensor, hidden: Tensor, residual: Tensor | None
) -> tuple[Tensor, ...]:
    trunk = self.owned[0]
    hidden, residual = run_units(self.units, trunk.layers, positions, hidden, residual)
    return _ended(trunk, hidden, residual)


def _plain_to_partition(
    self: Any, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None
) -> tuple[Tensor, ...]:
    trunk = self.owned[0]
    hidden = trunk.embed(input_ids, inputs_embeds)
    hidden, residual = run_units(self.units, trunk.layers, positions, hidden, None)
    return _ended(trunk, hidden, residual)


def _ended(trunk: Any, hidden: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
    """The final norm's output, the hidden states at the partition, and the last gate's logits."""
    state = joined(hidden, residual)
    gate = trunk.exits[-1].gate
    gated = () if gate is None else (gate(state),)
    return trunk.norm(hidden, residual)[0], state, *gated


class EdgeLoop(ExitLoop):
    """Runs them.

    Args:
        edge: of the checkpoint.
    """

    TO_END, PLAIN = staticmethod(_to_partition), staticmethod(_plain_to_partition)

    def __init__(
        self,
        trunk: Any,
        config: EarlyExitConfig,
        edge: EdgeConfig,
        plan: Plan,
        vllm_config: VllmConfig,
        prefix: str,
    ) -> None:
        super().__init__(trunk, config, plan, vllm_config, prefix)
        self.edge = edge
        self.last: Exit = trunk.exits[-1]
        self._at_partition: tuple[Tensor, Tensor | None] | None = None
        self.segments[-1] = self._ending(self.segments[-1])
        self.plain = self._ending(self.plain)
        self._run_whole, self.whole = self.whole, self._whole_ending
        slots = len(self._thresholds)
        # The confidence below which a token is asked for.
        self._sure = np.full(slots, -np.inf)
        self._uploads = np.zeros(slots, dtype=bool)
        self._sampling: list[dict[str, Any]] = [{} for _ in range(slots)]
        self.questions: dict[str, Question] = {}
        self.link: Link | None = None
        self.desk: Desk | None = None

    def _ending(self, part: Callable[..., Any]) -> Callable[..., Tensor]:
        def run(*inputs: Any) -> Tensor:
            hidden, state, *gate = part(*inputs)
            self._at_partition = state, (gate[0] if gate else None)
            found: Tensor = hidden
            return found

        return run

    def _whole_ending(self, *inputs: Any) -> tuple[Tensor, ...]:
        hidden, *tensors = self._run_whole(*inputs)
        gates: list[Tensor] = []
        gate: Tensor | None = None
        if self.last.gate is not None or any(self.gated):
            logits, largest, *tensors = tensors
            gate = logits[-1] if self.last.gate is not None else None
            gates = [logits, largest] if any(self.gated) else []
        *inner, state = tensors
        self._at_partition = state, gate
        return hidden, *gates, *inner

    # --- Requests --------------------------------------------------------------------------------

    def attach(self, source: Any, model: Any) -> None:
        super().attach(source, model)
        url = os.environ.get(CLOUD_URL)
        if not url:  # all requests are `standalone`
            return
        self.link = Link(
            LinkSettings(
                url=url,
                key=os.environ.get(CLOUD_KEY, ""),
                model=self.edge.model,
                hidden_size=self.vllm_config.model_config.get_hidden_size(),
                encoding=self.edge.transport,
                deadline_s=self.edge.deadline_s,
            ),
            publish_for(self, self.vllm_config, LINK_TOTALS, "link"),
        )
        self.desk = Desk(self.link)

    def admit(self, slot: int, params: SamplingParams | PoolingParams | None) -> None:
        super().admit(slot, params)
        extra = getattr(params, "extra_args", None)
        mode = requested_mode(self.edge, extra)
        last = thresholds(self.config, parse_exit_request(extra))[-1]
        if mode == "cloud":
            self._thresholds[slot] = np.inf
            last = np.inf
        else:
            last = self.last.comparable(last)
        asks = mode != "standalone"
        self._uploads[slot] = asks
        self._sure[slot] = last if asks else -np.inf
        self._sampling[slot] = sampling_for_the_cloud(params) if asks else {}

    # --- A step ----------------------------------------------------------------------------------

    def stepped(self, run: StepRun | None, hidden: Tensor) -> Tensor:
        at_partition, self._at_partition = self._at_partition, None
        if at_partition is None or self._source is None:  # all left before
            return hidden
        state, gate = at_partition
        rows = self._source.rows() if run is None else run.rows
        everything = Batch(np.arange(len(rows.slots)), rows.starts, rows.lengths)
        batch, fired = everything, np.full(len(rows.slots), STAYS)
        if run is not None:
            fired = run.passage.fired
            batch = run.passage.batch if run.in_parts else everything
        source: Any = self._source
        names: list[str] = source.names()
        if self.link is not None:
            self._upload(self.link, batch, rows, names, state)
        decides = rows.completes[batch.rows] & (fired[batch.rows] == STAYS)
        if not decides.any():
            return hidden
        chosen = batch.rows[decides]
        ends, targets = batch.ends[decides] - 1, everything.ends[chosen] - 1
        if self.last.adapter is not None:
            index = torch.from_numpy(ends)
            own = self.trunk.norm(self.last.adapt(state[index]))
            hidden = hidden.index_copy(0, torch.from_numpy(targets), own)
        self._doubt(chosen, rows, batch.lasts[decides], ends, targets, names, gate, hidden)
        return hidden

    def _upload(
        self, link: Link, batch: Batch, rows: Rows, names: list[str], state: Tensor
    ) -> None:
        wanted = self._uploads[rows.slots[batch.rows]]
        if not wanted.any():
            return
        states = state.float().cpu().numpy()
        for row, first, length, end in zip(
            batch.rows[wanted].tolist(),
            batch.firsts[wanted].tolist(),
            batch.lengths[wanted].tolist(),
            batch.ends[wanted].tolist(),
            strict=True,
        ):
            link.add(names[row], first, states[end - length : end])

    def _doubt(
        self,
        chosen: np.ndarray,
        rows: Rows,
        positions: np.ndarray,
        ends: np.ndarray,
        targets: np.ndarray,
        names: list[str],
        gate: Tensor | None,
        hidden: Tensor,
    ) -> None:
        """Make questions of the tokens that nobody here is sure of."""
        sure = self._sure[rows.slots[chosen]]
        asked = np.flatnonzero(sure > -np.inf)
        if not len(asked):
            return
        scores = np.zeros(len(asked))
        if np.any(sure[asked] < np.inf):
            if gate is not None:
                scores = gate.float().cpu().numpy()[ends[asked]]
            elif self.last.point.gate == "softmax":
                logits = self.compute_logits(hidden[torch.from_numpy(targets[asked])])
                assert logits is not None
                scores = logits.float().softmax(-1).amax(-1).cpu().numpy()
            else:
                slots = rows.slots[chosen[asked]]
                scores = pseudo_random(len(self.exits), positions[asked], slots)
        for place in asked[scores < sure[asked]].tolist():
            row = int(chosen[place])
            position, sampling = int(positions[place]), self._sampling[int(rows.slots[row])]
            self.questions[names[row]] = Question(position, drawn_at(sampling, position))
