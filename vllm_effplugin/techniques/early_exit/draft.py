"""Tokens guessed from an exit, to be verified by the full model (`exit: "verify"`).

LayerSkip (arXiv 2404.16710, section 3.3) drafts with the first layers of a model and verifies with
the others. Here vLLM's own rejection sampler verifies, in the requests' next step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.forward_context import set_forward_context

from vllm_effplugin.engine.batch import Step, one_token_each
from vllm_effplugin.techniques.early_exit.exits import tail_of_segment
from vllm_effplugin.techniques.early_exit.step import pseudo_random

if TYPE_CHECKING:
    from vllm_effplugin.techniques.early_exit.loop import ExitLoop

Drafts = list[list[int]]


class DraftRun:
    """Drafts for requests that share their first exit.

    Args:
        loop: the model's parts.
        step: the step that has run.
        exit: where drafts come from.
        thresholds: confidence that a draft needs, per request.
    """

    def __init__(self, loop: ExitLoop, step: Step, exit: int, thresholds: np.ndarray) -> None:
        self._loop, self._step, self._exit = loop, step, exit
        self._thresholds = thresholds
        self._block_size = loop.ledger.block_size
        layers = [
            *loop.trunk.layers[: loop.exits[exit].point.depth],
            *(own.block for own in loop.exits[: exit + 1] if own.block is not None),
        ]
        self._names = [layer.self_attn.attn.layer_name for layer in layers]

    def __call__(
        self, rows: np.ndarray, positions: np.ndarray, ids: np.ndarray, most: int
    ) -> Drafts:
        """Tokens for each of the step's `rows`, whose last tokens `ids` are at `positions`."""
        drafts: Drafts = [[] for _ in rows]
        alive = np.arange(len(rows))
        # A row surely has the block of the last position that the step computed, and no other.
        blocks = (positions - 1) // self._block_size
        for ahead in range(most):
            at = positions[alive] + ahead
            inside = at // self._block_size == blocks[alive]
            alive, at, ids = alive[inside], at[inside], ids[inside]
            if not len(alive):
                break
            tokens, scores = self._guess(rows[alive], at, ids)
            sure = scores >= self._thresholds[alive]
            alive, ids = alive[sure], tokens[sure]
            for row, token in zip(alive.tolist(), ids.tolist(), strict=True):
                drafts[row].append(token)
        return drafts

    def _guess(
        self, rows: np.ndarray, positions: np.ndarray, ids: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The exit's most likely next tokens, and its gate's confidence."""
        loop = self._loop
        device = self._step.common.seq_lens.device
        at = torch.from_numpy(positions).to(device)
        table = self._step.common.block_table_tensor
        blocks = table[torch.from_numpy(rows).to(device), at // self._block_size]
        slots = blocks.to(at.dtype) * self._block_size + at % self._block_size
        batch = one_token_each(self._step, rows, positions, slots)
        metadata = batch.metadata(self._step.builder)
        with set_forward_context(
            dict.fromkeys(self._names, metadata),
            loop.vllm_config,
            num_tokens=len(rows),
            slot_mapping=dict.fromkeys(self._names, slots),
        ):
            hidden, residual = loop.trunk.embed(torch.from_numpy(ids).to(device), None), None
            for exit, segment in zip(loop.exits[: self._exit + 1], loop.segments, strict=False):
                tail = tail_of_segment(exit, segment(at, hidden, residual))
                hidden, residual = tail.hidden, tail.residual
        loop.counters.add("layer_tokens", len(rows) * loop.layers_to_exit[self._exit])
        logits = loop.compute_logits(loop.finished(self._exit, tail, slice(None)))
        assert logits is not None  # one rank
        probability, token = logits.float().softmax(-1).max(-1)
        if tail.gate is not None:
            scores = tail.gate.cpu().numpy()
        elif loop.exits[self._exit].point.gate == "softmax":
            scores = probability.cpu().numpy()
        else:
            scores = pseudo_random(self._exit, positions, ids)
        return token.cpu().numpy(), scores
