"""A pretrained model that classifies a text by the state of one of its tokens.

Decoders (Llama, Mistral, Qwen2, Qwen3) read the last token behind the final norm; BERT reads its
first token, and behind the last layer its pooler's output.

Shapes: `B` sequences, `S` positions, `d` hidden size.
"""

from __future__ import annotations

import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_bidirectional_mask

from vllm_effplugin.errors import CheckpointError
from vllm_effplugin.preparation.decoder import Decoder

logger = logging.getLogger(__name__)


class Backbone(ABC):
    """A Hugging Face model, and how to read it.

    Args:
        model: the trunk alone.
    """

    prefix: str
    """Of its tensors' names in a classifier's checkpoint."""
    lora_targets: tuple[str, ...] | None = None

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return int(self.model.config.num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        """`d`."""
        return int(self.model.config.hidden_size)

    @abstractmethod
    def states(self, ids: Tensor, lengths: Tensor, depths: Sequence[int]) -> list[Tensor]:
        """What heads read: `[B, d]` at each depth, and at the end.

        Args:
            ids: `[B, S]`, padded on the right with anything.
            lengths: `[B]`.
            depths: layers before each exit, increasing.
        """

    @abstractmethod
    def below(self, ids: Tensor, lengths: Tensor, depth: int) -> Tensor:
        """Hidden states behind the first `depth` layers, `[B, S, d]`.

        Args:
            ids, lengths: as above.
        """

    @abstractmethod
    def above(self, hidden: Tensor, lengths: Tensor, depth: int) -> Tensor:
        """What the other layers make of them, `[B, S, d]`; behind the final norm, if there is one.

        Args:
            hidden: `[B, S, d]`, padded on the right with anything.
            lengths: `[B]`.
        """

    @abstractmethod
    def places(self, lengths: Tensor) -> Tensor:
        """Which token the head reads, of sequences of these lengths."""

    @abstractmethod
    def pooled(self, states: Tensor) -> Tensor:
        """What the head reads, `[..., d]`, of the last layer's states there."""


class DecoderBackbone(Backbone):
    """A decoder; causal attention makes padding on the right harmless."""

    prefix = "model."

    def states(self, ids: Tensor, lengths: Tensor, depths: Sequence[int]) -> list[Tensor]:
        decoder = Decoder(self.model)
        rows = torch.arange(len(ids), device=ids.device)
        hidden, context = decoder.embed(ids)
        found = []
        for first, last in itertools.pairwise((0, *depths, self.num_layers)):
            hidden = decoder.run_layers(range(first, last), hidden, context)
            found.append(decoder.decoder.norm(hidden[rows, lengths - 1]))
        return found

    def below(self, ids: Tensor, lengths: Tensor, depth: int) -> Tensor:
        decoder = Decoder(self.model)
        hidden, context = decoder.embed(ids)
        return decoder.run_layers(range(depth), hidden, context)

    def above(self, hidden: Tensor, lengths: Tensor, depth: int) -> Tensor:
        decoder = Decoder(self.model)
        layers = range(depth, self.num_layers)
        return decoder.decoder.norm(decoder.run_layers(layers, hidden, decoder.context(hidden)))

    def places(self, lengths: Tensor) -> Tensor:
        return lengths - 1

    def pooled(self, states: Tensor) -> Tensor:
        return states


class EncoderBackbone(Backbone):
    """A `BertModel` with its pooler."""

    prefix = "bert."
    lora_targets = ("query", "key", "value", "dense")

    def states(self, ids: Tensor, lengths: Tensor, depths: Sequence[int]) -> list[Tensor]:
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        output = self.model(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
        exits = [output.hidden_states[depth][:, 0] for depth in depths]
        return [*exits, output.pooler_output]

    def below(self, ids: Tensor, lengths: Tensor, depth: int) -> Tensor:
        return self._run(range(depth), self.model.embeddings(input_ids=ids), lengths)

    def above(self, hidden: Tensor, lengths: Tensor, depth: int) -> Tensor:
        return self._run(range(depth, self.num_layers), hidden, lengths)

    def places(self, lengths: Tensor) -> Tensor:
        return torch.zeros_like(lengths)

    def pooled(self, states: Tensor) -> Tensor:
        pooler = self.model.pooler
        return pooler.activation(pooler.dense(states))

    def _run(self, layers: Iterable[int], hidden: Tensor, lengths: Tensor) -> Tensor:
        mask = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
        attention = create_bidirectional_mask(
            config=self.model.config, inputs_embeds=hidden, attention_mask=mask.long()
        )
        for index in layers:
            hidden = self.model.encoder.layer[index](hidden, attention)
        return hidden


def load_backbone(model: Path, architecture: str, dtype: torch.dtype) -> Backbone:
    """The checkpoint without its head.

    Args:
        architecture: of the classifier that it is or becomes, as stock vLLM knows it.

    Raises:
        CheckpointError: weights are missing, other than BERT's pooler.
    """
    from transformers import AutoModel
    from transformers.utils import logging

    kind = EncoderBackbone if architecture.startswith("Bert") else DecoderBackbone
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it reports the head, which is not wanted here
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)  # a pooler that a checkpoint lacks is the same every time
            loaded, report = AutoModel.from_pretrained(model, dtype=dtype, output_loading_info=True)
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(report["missing_keys"])
    if any("pooler" not in name for name in missing):
        raise CheckpointError(f"{model} lacks {', '.join(missing)}")
    if missing:
        logger.warning("%s has no pooler: a random one takes its place", model)
    return kind(loaded.eval().requires_grad_(False))


def padded(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """`[B, S]` token ids, zeros behind each sequence, and `[B]` lengths."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    ids = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.int64)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = torch.tensor(sequence)
    return ids, lengths
