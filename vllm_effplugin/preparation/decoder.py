"""A Hugging Face decoder, taken apart: embedding, layers, head.

It uses nothing of a layer but its two norms, its attention and its MLP, so it fits every family of
the package.

Shapes: `B` sequences, `S` positions, `d` hidden size, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask

from vllm_effplugin.preparation import packed
from vllm_effplugin.preparation.state_space import StateSpaceDecoder


class Decoder:
    """Runs the layers of a Hugging Face causal language model.

    Args:
        model: a `*ForCausalLM` whose decoder layers have `input_layernorm`, `self_attn`,
            `post_attention_layernorm` and `mlp` (Llama, Mistral, Qwen2, Qwen3), or its trunk,
            which has no `logits`. A PEFT-wrapped model's `get_base_model()` serves as well.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.decoder = getattr(model, "model", model)
        self.layers: nn.ModuleList = self.decoder.layers

    @property
    def norm(self) -> nn.Module:
        """The final norm."""
        return self.decoder.norm

    def embed(
        self, input_ids: Tensor, starts: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Embed `[B, S]` token ids; sequences are full, unpadded and start at position 0.

        Args:
            starts: as in `context`.

        Returns:
            hidden states `[B, S, d]`, and the arguments that every layer's attention takes.
        """
        hidden = self.decoder.embed_tokens(input_ids)
        return hidden, self.context(hidden, starts)

    def context(self, hidden: Tensor, starts: Tensor | None = None) -> dict[str, Any]:
        """The arguments that attention takes on `[B, S, d]` hidden states of whole sequences.

        Args:
            starts: `[B, S]`, where a document starts in a packed sequence. Positions count from
                there, and attention does not reach beyond it. Without, a sequence is one document.
        """
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        if starts is not None and starts[:, 1:].any():
            first = torch.where(starts.to(hidden.device), positions, 0).cummax(-1).values
            positions = positions - first
        rotary = self.decoder.rotary_emb(hidden, positions)
        if self.model.config._attn_implementation == packed.XFORMERS:
            lengths = None if starts is None else packed.document_lengths(starts)
            return {"position_embeddings": rotary, "attention_mask": None, "lengths": lengths}
        mask = create_causal_mask(
            config=self.model.config,
            inputs_embeds=hidden,
            attention_mask=None,
            past_key_values=None,
            position_ids=positions,
        )
        return {"position_embeddings": rotary, "attention_mask": mask}

    @contextmanager
    def fastest_attention(self) -> Iterator[None]:
        """Inside, attention of packed documents is xformers' where that is there."""
        config = self.model.config
        before = config._attn_implementation
        if packed.available(config):
            config._attn_implementation = packed.XFORMERS
        try:
            yield
        finally:
            config._attn_implementation = before

    def run_layers(self, indices: Iterable[int], hidden: Tensor, context: dict[str, Any]) -> Tensor:
        """Run layers one after another on `[B, S, d]` hidden states."""
        for index in indices:
            hidden = run_layer(self.layers[index], hidden, context)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and language model head: `[B, S, d]` -> `[B, S, V]`."""
        return self.model.lm_head(self.decoder.norm(hidden))

    def attention_delta(self, index: int, x: Tensor, context: dict[str, Any]) -> Tensor:
        """`A_j(x) = Attn_j(Norm1_j(x))`, shape of `x`."""
        return _attention(self.layers[index], x, context)

    def mlp_delta(self, index: int, u: Tensor) -> Tensor:
        """`M_j(u) = MLP_j(Norm2_j(u))`, shape of `u`."""
        return _mlp(self.layers[index], u)


def take_apart(model: Any) -> Decoder | StateSpaceDecoder:
    """A causal language model of either kind, by its layers; groups of them run as such."""
    if hasattr(model, "backbone"):
        return StateSpaceDecoder(model)
    block = getattr(model.config, "efficiency", None)  # of a checkpoint that is prepared further
    if block is None:
        return Decoder(model)
    from vllm_effplugin.techniques.layer_parallel.reference import GroupedDecoder

    return GroupedDecoder(model, block)


def run_layer(layer: Any, hidden: Tensor, context: dict[str, Any]) -> Tensor:
    """Run a decoder layer, of the model or like one of it, on `[B, S, d]` hidden states.

    Args:
        context: of `Decoder.context`.
    """
    hidden = hidden + _attention(layer, hidden, context)
    return hidden + _mlp(layer, hidden)


def _attention(layer: Any, x: Tensor, context: dict[str, Any]) -> Tensor:
    return layer.self_attn(hidden_states=layer.input_layernorm(x), **context)[0]


def _mlp(layer: Any, u: Tensor) -> Tensor:
    return layer.mlp(layer.post_attention_layernorm(u))
