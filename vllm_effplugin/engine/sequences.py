"""The stack of a classifier in which whole sequences come to an end, or merge, on their way.

A prompt that is only classified owes the cache nothing: nobody reads what layers that it skipped,
or ran as a part of a composite, would have written.

Shapes: `T` tokens of the batch, `R` sequences of the step ("rows"), `d` hidden size, `C` classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig

from vllm_effplugin.engine.batch import Step, current_step, ranges, subset
from vllm_effplugin.engine.graphs import GraphInputs, Tokens
from vllm_effplugin.engine.loop import TrunkLoop
from vllm_effplugin.engine.sequence_totals import sequence_reporter
from vllm_effplugin.engine.settings import efficiency_of, plan_for
from vllm_effplugin.techniques.joint_exit.boundary import ExitBoundary, ExitPass
from vllm_effplugin.techniques.joint_exit.totals import MILLION
from vllm_effplugin.techniques.multiplex.boundary import MergeBoundary
from vllm_effplugin.techniques.multiplex.grouping import lay_out

if TYPE_CHECKING:
    from vllm.pooling_params import PoolingParams
    from vllm.sampling_params import SamplingParams

    from vllm_effplugin.engine.batch import Rows, RowSource
    from vllm_effplugin.engine.counters import Layout

Part = Callable[[Tensor, Tensor, Tensor | None], Any]
"""Layers: from positions, hidden states and residual to the latter two, or to their sum's norm."""


@dataclass(frozen=True)
class Stack:
    """A trunk in parts.

    Attributes:
        layer_name: of an attention layer; all share one kind of attention metadata.
        embed: what the first layer reads, from token ids, positions and embeddings.
        segments: the layers before each boundary; None where there are none.
        to_end: the last layers, to the hidden states that the runner reads.
        plain: everything in one graph, from token ids, positions and embeddings.
        read: what heads read, from hidden states and residual of some tokens.
        place: which token of a sequence they read.
        graphs: inputs of CUDA graphs.
    """

    layer_name: str
    embed: Callable[[Tensor | None, Tensor, Tensor | None], Tensor]
    segments: Sequence[Part | None]
    to_end: Part
    plain: Callable[..., Tensor]
    read: Callable[[Tensor, Any], Tensor]
    place: Literal["first", "last"]
    graphs: GraphInputs


class Passage:
    """The sequences of a step on their way through a stack.

    Attributes:
        alive: which rows of the step are left, increasing.
        lengths: their numbers of tokens.
        hidden, residual: of their tokens, row by row.
    """

    def __init__(self, stack: Stack, step: Step, lengths: np.ndarray, tokens: Tokens) -> None:
        self.stack, self._step, self._tokens = stack, step, tokens
        self.alive, self.lengths = np.arange(len(lengths)), lengths
        self.hidden: Tensor = torch.empty(0)
        self.residual: Tensor | None = None

    def run(self, part: Part) -> Any:
        """What layers give on the tokens that are left."""
        with self._tokens.context():
            return part(self._tokens.positions, self.hidden, self.residual)

    @property
    def places(self) -> np.ndarray:
        """Indices of the tokens that heads read, one per row that is left."""
        return read_places(self.lengths, self.stack.place)

    def states(self, rows: np.ndarray) -> Tensor:
        """What heads read of some of the rows that are left, `[n, d]`."""
        places = self.on_device(self.places[rows])
        residual = None if self.residual is None else self.residual[places]
        return self.stack.read(self.hidden[places], residual)

    def keep(self, stays: np.ndarray) -> None:
        """Go on without the other rows.

        Args:
            stays: a mask of the rows that are left.
        """
        kept = self.lengths[stays]
        first = np.cumsum(self.lengths)[stays] - kept
        sources = self.on_device(np.repeat(first, kept) + ranges(kept))
        hidden = self.hidden[sources]
        residual = None if self.residual is None else self.residual[sources]
        self.become(self.alive[stays], kept, sources, hidden, residual)

    def become(
        self,
        alive: np.ndarray,
        lengths: np.ndarray,
        sources: Tensor,
        hidden: Tensor,
        residual: Tensor | None,
    ) -> None:
        """Go on with other rows of the step.

        Args:
            alive, lengths: as the attributes.
            sources: for each new token, the one so far that has its position and cache slot.
        """
        slots, positions = self._tokens.slot_mapping[sources], self._tokens.positions[sources]
        batch = subset(self._step, alive, lengths, slots, positions)
        self._tokens = Tokens(slots, positions, batch, self.stack.graphs)
        self.alive, self.lengths = alive, lengths
        self.hidden, self.residual = hidden, residual

    def on_device(self, indices: np.ndarray) -> Tensor:
        """An array as a tensor beside the hidden states."""
        return torch.from_numpy(indices).to(self.hidden.device, non_blocking=True)


def read_places(lengths: np.ndarray, place: Literal["first", "last"]) -> np.ndarray:
    """Indices of the tokens that heads read, among those of rows with these lengths."""
    ends = np.cumsum(lengths)
    return ends - 1 if place == "last" else ends - lengths


@dataclass(frozen=True)
class Outcome:
    """What became of the rows of a step.

    Attributes:
        completes: `[R]` whether the row's prompt ends in it.
        exits: where they left, and with what logits; None without exits.
        merged: `[R]` sequences that ran as one with it, itself included.
    """

    completes: np.ndarray
    exits: ExitPass | None
    merged: np.ndarray


class SequenceLoop(TrunkLoop):
    """Runs a classifier's trunk whose plan has boundaries for whole sequences.

    Args:
        stack: the trunk.
        depths: layers before each of its boundaries.
        num_layers: of the whole trunk.
        exits: decides at all boundaries, but for the last if sequences merge there.
        merge: what happens at the last one; None if that is an exit.
        totals: what is counted.
    """

    def __init__(
        self,
        stack: Stack,
        depths: Sequence[int],
        num_layers: int,
        exits: ExitBoundary | None,
        merge: MergeBoundary | None,
        vllm_config: VllmConfig,
        totals: Layout,
    ) -> None:
        super().__init__(vllm_config, totals)
        self.stack, self.depths, self.num_layers = stack, tuple(depths), num_layers
        self.exits, self.merge = exits, merge
        self._outcome: Outcome | None = None

    # --- Requests --------------------------------------------------------------------------------

    def attach(self, source: RowSource, model: Any) -> None:
        super().attach(source, model)
        if self.exits is not None:
            self.exits.heads = model.exit_heads
        if self.merge is not None:
            self.merge.multiplexers = model.multiplexers

    def admit(self, slot: int, params: SamplingParams | PoolingParams | None) -> None:
        extra = getattr(params, "extra_kwargs", None)
        if self.exits is not None:
            self.exits.admit(slot, extra)
        if self.merge is not None:
            self.merge.admit(slot, extra)

    # --- A step ----------------------------------------------------------------------------------

    def __call__(
        self, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None
    ) -> Tensor:
        """Hidden states `[T, d]` after the final norm; nothing useful where a sequence left."""
        self._outcome = None
        step = current_step(self.stack.layer_name)
        slots = None if step is None or self._source is None else self._source.slots()
        if step is None or slots is None:
            return self._warm_up(input_ids, positions, inputs_embeds)
        assert self._source is not None
        rows = self._source.rows()
        tokens = int(rows.lengths.sum())
        self.counters.add("full_layer_tokens", tokens * self.num_layers)
        leaving = None if self.exits is None else self.exits.begin(rows)
        merges = self.merge is not None and self.merge.may_merge(rows)
        if leaving is not None or merges:
            tokens_of_step = Tokens(step.common.slot_mapping, positions)
            passage = Passage(self.stack, step, rows.lengths, tokens_of_step)
            passage.hidden = self.stack.embed(input_ids, positions, inputs_embeds)
            return self._in_parts(passage, rows, leaving)
        self.counters.add("layer_tokens", tokens * self.num_layers)
        self._outcome = Outcome(rows.completes, None, np.ones(len(slots), dtype=np.int64))
        return self.stack.plain(input_ids, positions, inputs_embeds)

    def _in_parts(self, passage: Passage, rows: Rows, leaving: ExitPass | None) -> Tensor:
        """Run part by part, each on the rows that are left."""
        output = torch.zeros_like(passage.hidden)
        merged = np.ones(len(rows.slots), dtype=np.int64)
        self._outcome = Outcome(rows.completes, leaving, merged)
        reads = read_places(rows.lengths, self.stack.place)
        depth = 0
        for index, part in enumerate(self.stack.segments):
            if part is not None:
                passage.hidden, passage.residual = passage.run(part)
            self._ran(passage, depth, self.depths[index])
            depth = self.depths[index]
            if leaving is None or index >= leaving.count:
                continue
            leaves = self.agreed(leaving.decide(index, passage))
            if leaves.any():
                leaving.leave(index, passage.alive, leaves)
                if leaves.all():
                    return output
                passage.keep(~leaves)

        def give(rows: np.ndarray, states: Tensor) -> None:
            output.index_copy_(0, passage.on_device(reads[rows]), states.to(output.dtype))

        before = passage.alive
        groups = [] if self.merge is None else self.merge.groups(rows, before)
        if self.merge is None or not groups:
            finished = passage.run(self.stack.to_end)
            give(before, finished[passage.on_device(passage.places)])
        else:
            batch = lay_out(passage.lengths, groups, last=self.stack.place == "last")
            self.merge.merge(passage, batch, self.counters)
            finished = passage.run(self.stack.to_end)
            give(before[batch.singles], finished[passage.on_device(batch.single_reads)])
            for size, composites in batch.merged.items():
                read = finished[passage.on_device(composites.reads)]
                members = before[composites.rows]
                give(members.ravel(), self.merge.answers(size, read).flatten(0, 1))
                merged[members] = size
        self._ran(passage, depth, self.num_layers)
        return output

    def _ran(self, passage: Passage, above: int, depth: int) -> None:
        self.counters.add("layer_tokens", int(passage.lengths.sum()) * (depth - above))

    def _warm_up(
        self, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None
    ) -> Tensor:
        """Run, and thereby compile, everything once; nothing is decided."""
        hidden, residual = self.stack.embed(input_ids, positions, inputs_embeds), None
        for part in self.stack.segments:
            if part is not None:
                hidden, residual = part(positions, hidden, residual)
        self.stack.to_end(positions, hidden, residual)
        return self.stack.plain(input_ids, positions, inputs_embeds)

    # --- The answers -----------------------------------------------------------------------------

    def answer(self, logits: Tensor) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """The rows' logits, how many layers each ran, and how many ran as one with it.

        To be called once per step.

        Args:
            logits: `[R, C]` of the full model's head, without meaning where a row left.
        """
        outcome, self._outcome = self._outcome, None
        if outcome is None:  # a dummy run
            whole = np.full(len(logits), self.num_layers)
            return logits, whole, np.ones_like(whole)
        exits = () if self.exits is None else self.exits.config.depths
        left = np.full(len(logits), len(exits))
        if outcome.exits is not None:
            left = outcome.exits.exits
            logits = outcome.exits.answers(logits)
        # A row that overflowed is its request's trouble; sums of others stay right.
        confidence = logits.float().softmax(-1).amax(-1).nan_to_num(0.0).cpu().numpy()
        for place in range(len(exits) + 1):
            here = outcome.completes & (left == place)
            self.counters.add("sequences", int(here.sum()), place)
            self.counters.add("confidence", round(MILLION * float(confidence[here].sum())), place)
        if self.merge is not None:
            stayed = outcome.merged[outcome.completes & (left == len(exits))]
            self.counters.add("alone", int((stayed == 1).sum()))
            for place, size in enumerate(self.merge.config.sizes):
                self.counters.add("merged", int((stayed == size).sum()), place)
        return logits, np.array([*exits, self.num_layers])[left], outcome.merged


def sequence_loop(stack: Stack, vllm_config: VllmConfig) -> SequenceLoop:
    """The loop of a model whose configuration has exits of sequences, or merges them, or both."""
    hf_config = vllm_config.model_config.hf_config
    efficiency, num_layers = efficiency_of(hf_config), hf_config.num_hidden_layers
    slots = vllm_config.scheduler_config.max_num_seqs
    exits, multiplex = efficiency.joint_exit, efficiency.multiplex
    return SequenceLoop(
        stack,
        [boundary.after + 1 for boundary in plan_for(hf_config).boundaries],
        num_layers,
        None if exits is None else ExitBoundary(exits, slots),
        None if multiplex is None else MergeBoundary(multiplex, slots),
        vllm_config,
        sequence_reporter(efficiency, num_layers).layout,
    )
