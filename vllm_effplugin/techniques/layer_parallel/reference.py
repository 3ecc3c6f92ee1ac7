"""CQIL in plain PyTorch, on a Hugging Face decoder: the contract that the engine is held to.

Also the model that the search scores and that distillation trains. It uses nothing of a layer but
its two norms, its attention and its MLP, so it fits every family of the package.

Shapes: `B` sequences, `S` positions, `d` hidden size, `V` vocabulary, `p` layers per group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask

from vllm_effplugin.plan import Unit
from vllm_effplugin.techniques.layer_parallel.config import LayerParallelConfig


class ReferenceDecoder:
    """Runs a plan's units on the layers of a Hugging Face causal language model.

    Args:
        model: a `*ForCausalLM` whose decoder layers have `input_layernorm`, `self_attn`,
            `post_attention_layernorm` and `mlp` (Llama, Mistral, Qwen2, Qwen3). A PEFT-wrapped
            model's `get_base_model()` serves as well.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.decoder = model.model
        self.layers: nn.ModuleList = self.decoder.layers

    def embed(self, input_ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Embed `[B, S]` token ids; sequences are full, unpadded and start at position 0.

        Returns:
            hidden states `[B, S, d]`, and the arguments that every layer's attention takes.
        """
        hidden = self.decoder.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        mask = create_causal_mask(
            config=self.model.config,
            inputs_embeds=hidden,
            attention_mask=None,
            past_key_values=None,
            position_ids=positions,
        )
        return hidden, {
            "position_embeddings": self.decoder.rotary_emb(hidden, positions),
            "attention_mask": mask,
        }

    def run(
        self,
        units: Sequence[Unit],
        hidden: Tensor,
        context: dict[str, Any],
        config: LayerParallelConfig | None = None,
    ) -> Tensor:
        """Run `units` in order on `[B, S, d]` hidden states."""
        for unit in units:
            hidden = (
                self._group(unit, hidden, context, config)
                if unit.is_group
                else self._layer(unit.first, hidden, context)
            )
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and language model head: `[B, S, d]` -> `[B, S, V]`."""
        return self.model.lm_head(self.decoder.norm(hidden))

    def __call__(
        self,
        input_ids: Tensor,
        units: Sequence[Unit],
        config: LayerParallelConfig | None = None,
    ) -> Tensor:
        """Logits `[B, S, V]` of `[B, S]` token ids under the plan's units."""
        hidden, context = self.embed(input_ids)
        return self.logits(self.run(units, hidden, context, config))

    def attention_delta(self, index: int, x: Tensor, context: dict[str, Any]) -> Tensor:
        """`A_j(x) = Attn_j(Norm1_j(x))`, shape of `x`."""
        layer = self.layers[index]
        return layer.self_attn(hidden_states=layer.input_layernorm(x), **context)[0]

    def mlp_delta(self, index: int, u: Tensor) -> Tensor:
        """`M_j(u) = MLP_j(Norm2_j(u))`, shape of `u`."""
        layer = self.layers[index]
        return layer.mlp(layer.post_attention_layernorm(u))

    def _layer(self, index: int, x: Tensor, context: dict[str, Any]) -> Tensor:
        u = x + self.attention_delta(index, x, context)
        return u + self.mlp_delta(index, u)

    def _group(
        self, unit: Unit, x: Tensor, context: dict[str, Any], config: LayerParallelConfig | None
    ) -> Tensor:
        if config is None:
            raise ValueError(f"no schedule given for the group {list(unit.layers)}")
        attention = [self.attention_delta(index, x, context) for index in unit.layers]
        output, inputs = group_states(x, attention, config)
        for index, u in zip(unit.layers, inputs, strict=True):
            output = output + self.mlp_delta(index, u)
        return output


def group_states(
    x: Tensor, attention: Sequence[Tensor], config: LayerParallelConfig
) -> tuple[Tensor, list[Tensor]]:
    """What the schedule makes of a group's input and its members' attention deltas.

    Returns:
        the group's output without its MLP deltas, and the input `u_j` of each member's MLP.
    """
    carried = x + sum(attention)
    if config.schedule == "fused":
        return carried, [carried] * len(attention)
    inputs = []
    for j, delta in enumerate(attention):
        bypass = sum(attention[max(0, j - config.bypass) : j], torch.zeros_like(x))
        inputs.append(x + delta + bypass)
        if config.double_count_bypass:
            carried = carried + bypass
    return carried, inputs
