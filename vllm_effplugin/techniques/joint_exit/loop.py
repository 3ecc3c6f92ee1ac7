"""The stack of a classifier with exits.

A sequence whose last token is in the step may leave at an exit, with all its tokens; its answer is
then that of the exit's head, and the others run on without it. What skipped layers would have
written into the cache is missing, and nobody reads it: the sequence is over.

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

from vllm_effplugin.engine.batch import Rows, RowSource, Step, current_step, ranges, subset
from vllm_effplugin.engine.graphs import GraphInputs, Tokens
from vllm_effplugin.engine.loop import TrunkLoop
from vllm_effplugin.errors import ConfigError
from vllm_effplugin.techniques.joint_exit.config import HEADS, JointExitConfig
from vllm_effplugin.techniques.joint_exit.heads import Decision, ExitHeads
from vllm_effplugin.techniques.joint_exit.request import engine_request
from vllm_effplugin.techniques.joint_exit.totals import MILLION, sequence_totals

if TYPE_CHECKING:
    from vllm.pooling_params import PoolingParams
    from vllm.sampling_params import SamplingParams

STAYS = -1
"""Exit of a row that runs all layers."""


@dataclass(frozen=True)
class Stack:
    """A trunk in parts.

    Attributes:
        layer_name: of an attention layer; all share one kind of attention metadata.
        embed: what the first layer reads, from token ids, positions and embeddings.
        segments: the layers before each exit: positions, hidden states and residual to the latter
            two.
        to_end: the same for the last layers, to the hidden states that the runner reads.
        plain: everything in one graph, from token ids, positions and embeddings.
        read: what heads read, from hidden states and residual of some tokens.
        place: which token of a sequence they read.
        graphs: inputs of CUDA graphs.
    """

    layer_name: str
    embed: Callable[[Tensor | None, Tensor, Tensor | None], Tensor]
    segments: Sequence[Callable[..., Any]]
    to_end: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    read: Callable[[Tensor, Any], Tensor]
    place: Literal["first", "last"]
    graphs: GraphInputs


@dataclass(frozen=True)
class Outcome:
    """What became of the rows of a step.

    Attributes:
        completes: `[R]` whether the row's prompt ends in it.
        exits: `[R]` where it left, or `STAYS`.
        logits: `[R, C]` of those that left; None if none did.
    """

    completes: np.ndarray
    exits: np.ndarray
    logits: Tensor | None


class SequenceExitLoop(TrunkLoop):
    """Runs a classifier's trunk whose plan has exits.

    Args:
        stack: the trunk.
        config: exits and rule.
        num_layers: of the whole trunk.
    """

    heads: ExitHeads

    def __init__(
        self, stack: Stack, config: JointExitConfig, num_layers: int, vllm_config: VllmConfig
    ) -> None:
        super().__init__(vllm_config, sequence_totals(len(config.exits)))
        self.stack, self.config, self.num_layers = stack, config, num_layers
        self._bias = np.full(vllm_config.scheduler_config.max_num_seqs, config.bias)
        self._outcome: Outcome | None = None

    # --- Requests --------------------------------------------------------------------------------

    def attach(self, source: RowSource, model: Any) -> None:
        super().attach(source, model)
        self.heads = model.exit_heads

    def admit(self, slot: int, params: SamplingParams | PoolingParams | None) -> None:
        request = engine_request(getattr(params, "extra_kwargs", None))
        self._bias[slot] = request.bias(self.config.bias)

    def replace(self, config: JointExitConfig, tensors: dict[str, Tensor]) -> None:
        """Other heads, gates and rule at the same depths; for measurements, between requests.

        Args:
            tensors: as in a checkpoint.
        """
        if config.depths != self.config.depths:
            raise ConfigError(f"exits at {self.config.depths} cannot become {config.depths}")
        self.config = config
        self._bias.fill(config.bias)
        heads = ExitHeads(config, self.heads.weight.shape[2], self.heads.weight.shape[1])
        heads.load_state_dict({k.removeprefix(f"{HEADS}."): v for k, v in tensors.items()})
        self.heads = heads.to(self.heads.weight.device)

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
        asked = rows.completes & (self._bias[rows.slots] > -np.inf)
        if asked.any():
            return self._in_segments(step, rows, asked, input_ids, positions, inputs_embeds)
        self.counters.add("layer_tokens", tokens * self.num_layers)
        self._outcome = Outcome(rows.completes, np.full(len(rows.slots), STAYS), None)
        return self.stack.plain(input_ids, positions, inputs_embeds)

    def _in_segments(
        self,
        step: Step,
        rows: Rows,
        asked: np.ndarray,
        input_ids: Tensor | None,
        positions: Tensor,
        inputs_embeds: Tensor | None,
    ) -> Tensor:
        """Run segment by segment, each on the rows that are left.

        Args:
            asked: rows that may leave.
        """
        stack = self.stack
        hidden, residual = stack.embed(input_ids, positions, inputs_embeds), None
        output = torch.zeros_like(hidden)
        tokens = Tokens(step.common.slot_mapping, positions)
        bias = torch.from_numpy(self._bias[rows.slots]).to(hidden.device, torch.float32)
        decision = Decision(self.heads, bias)
        alive, lengths = np.arange(len(rows.slots)), rows.lengths
        exits = np.full(len(alive), STAYS)
        answers: Tensor | None = None
        depth = 0
        for exit, segment in enumerate(stack.segments):
            with tokens.context():
                hidden, residual = segment(tokens.positions, hidden, residual)
            self._ran(lengths, depth, self.config.exits[exit].depth)
            depth = self.config.exits[exit].depth
            wanted = np.flatnonzero(asked[alive])
            if not len(wanted):
                continue
            places = self._on_device(self._places(lengths)[wanted])
            logits = self.heads.logits(
                exit,
                stack.read(hidden[places], None if residual is None else residual[places]),
            )
            chosen = decision.leaves(exit, logits.softmax(-1), self._on_device(alive[wanted]))
            leaves = np.zeros(len(alive), dtype=bool)
            leaves[wanted] = self.agreed(chosen.cpu().numpy())
            if not leaves.any():
                continue
            if answers is None:
                answers = logits.new_zeros(len(exits), logits.shape[1])
            gone = logits[self._on_device(leaves[wanted])] / self.config.exits[exit].temperature
            answers[self._on_device(alive[leaves])] = gone
            exits[alive[leaves]] = exit
            if leaves.all():
                break
            tokens, hidden, residual = self._cut(
                step, tokens, alive, lengths, leaves, hidden, residual
            )
            alive, lengths = alive[~leaves], lengths[~leaves]
        else:
            with tokens.context():
                finished = stack.to_end(tokens.positions, hidden, residual)
            self._ran(lengths, depth, self.num_layers)
            targets = self._places(rows.lengths)[alive]
            sources = self._places(lengths)
            output.index_copy_(0, self._on_device(targets), finished[self._on_device(sources)])
        self._outcome = Outcome(rows.completes, exits, answers)
        return output

    def _cut(
        self,
        step: Step,
        tokens: Tokens,
        alive: np.ndarray,
        lengths: np.ndarray,
        leaves: np.ndarray,
        hidden: Tensor,
        residual: Tensor | None,
    ) -> tuple[Tokens, Tensor, Tensor | None]:
        """The batch without the rows that leave."""
        stays = ~leaves
        kept = lengths[stays]
        first = np.cumsum(lengths)[stays] - kept
        sources = self._on_device(np.repeat(first, kept) + ranges(kept))
        slot_mapping, positions = tokens.slot_mapping[sources], tokens.positions[sources]
        metadata = subset(step, alive[stays], kept, slot_mapping, positions)
        return (
            Tokens(slot_mapping, positions, metadata, self.stack.graphs),
            hidden[sources],
            None if residual is None else residual[sources],
        )

    def _places(self, lengths: np.ndarray) -> np.ndarray:
        """Indices of the tokens that heads read, among those of rows with these lengths."""
        ends = np.cumsum(lengths)
        return ends - 1 if self.stack.place == "last" else ends - lengths

    def _ran(self, lengths: np.ndarray, above: int, depth: int) -> None:
        self.counters.add("layer_tokens", int(lengths.sum()) * (depth - above))

    def _warm_up(
        self, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None
    ) -> Tensor:
        """Run, and thereby compile, everything once; no gate decides."""
        hidden, residual = self.stack.embed(input_ids, positions, inputs_embeds), None
        for segment in self.stack.segments:
            hidden, residual = segment(positions, hidden, residual)
        self.stack.to_end(positions, hidden, residual)
        return self.stack.plain(input_ids, positions, inputs_embeds)

    def _on_device(self, indices: np.ndarray) -> Tensor:
        return torch.from_numpy(indices).to(self.heads.weight.device, non_blocking=True)

    # --- The answers -----------------------------------------------------------------------------

    def answer(self, logits: Tensor) -> tuple[Tensor, np.ndarray]:
        """The rows' logits, and how many layers each ran; to be called once per step.

        Args:
            logits: `[R, C]` of the full model's head, without meaning where a row left.
        """
        outcome, self._outcome = self._outcome, None
        if outcome is None:  # a dummy run
            return logits, np.full(len(logits), self.num_layers)
        left = outcome.exits != STAYS
        if outcome.logits is not None:
            away = self._on_device(left)[:, None]
            logits = torch.where(away, outcome.logits.to(logits.dtype), logits)
        # A row that overflowed is its request's trouble; sums of others stay right.
        confidence = logits.float().softmax(-1).amax(-1).nan_to_num(0.0).cpu().numpy()
        for exit in range(STAYS, len(self.config.exits)):
            here = outcome.completes & (outcome.exits == exit)
            place = exit % (len(self.config.exits) + 1)  # the full model's is the last
            self.counters.add("sequences", int(here.sum()), place)
            self.counters.add("confidence", round(MILLION * float(confidence[here].sum())), place)
        return logits, np.array([*self.config.depths, self.num_layers])[outcome.exits]
