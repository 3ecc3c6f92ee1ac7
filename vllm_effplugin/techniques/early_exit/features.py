"""What exits are trained on: a model's hidden states, captured in one pass over text.

Under `recompute` the cache is exact, so that the states which an engine sees at an exit are these,
whatever left before.

Shapes: `M` sequences, `S` positions, `d` hidden size, `E` exits.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from vllm_effplugin.preparation.decoder import take_apart
from vllm_effplugin.preparation.precision import Precision, autocast


@dataclass(frozen=True)
class Features:
    """Residual streams, in bf16.

    Attributes:
        exits: `[E, M, S, d]` behind the layer before each exit.
        final: `[M, S, d]` behind the last layer, before the final norm.
        starts: `[M, S]` where a document starts.
    """

    exits: Tensor
    final: Tensor
    starts: Tensor

    def __getitem__(self, sequences: slice) -> Features:
        return Features(self.exits[:, sequences], self.final[sequences], self.starts[sequences])


@torch.inference_mode()
def capture(
    model: Any,
    tokens: Tensor,
    starts: Tensor,
    depths: Sequence[int],
    precision: Precision,
    batch: int = 4,
) -> Features:
    """Run the model on `[M, S]` token ids.

    Args:
        starts: where a document starts among them.
        depths: layers before each exit.
        batch: sequences at a time.
    """
    decoder = take_apart(model)
    size = (*tokens.shape, int(model.config.hidden_size))
    exits = torch.empty(len(depths), *size, dtype=torch.bfloat16)
    final = torch.empty(size, dtype=torch.bfloat16)
    boundaries = [0, *depths, len(decoder.layers)]
    with tqdm(total=tokens.numel(), desc="capturing", unit="tok", unit_scale=True) as bar:
        for start in range(0, len(tokens), batch):
            part = slice(start, start + batch)
            with autocast(model.device, precision):
                hidden, context = decoder.embed(tokens[part].to(model.device), starts[part])
                states = []
                for first, last in itertools.pairwise(boundaries):
                    hidden = decoder.run_layers(range(first, last), hidden, context)
                    states.append(hidden)
            for exit, state in enumerate(states[:-1]):
                exits[exit, part] = state.to("cpu", torch.bfloat16)
            final[part] = states[-1].to("cpu", torch.bfloat16)
            bar.update(tokens[part].numel())
    return Features(exits, final, starts)
