"""One class per model family, each a subclass of vLLM's own."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
)
from vllm.model_executor.models.mistral import (
    MistralAttention,
    MistralDecoderLayer,
    MistralForCausalLM,
    MistralModel,
)
from vllm.model_executor.models.qwen2 import Qwen2DecoderLayer, Qwen2ForCausalLM, Qwen2Model
from vllm.model_executor.models.qwen3 import (
    Qwen3Attention,
    Qwen3DecoderLayer,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from vllm.model_executor.models.utils import maybe_prefix

from vllm_effplugin.engine.loop import TrunkLoop
from vllm_effplugin.engine.settings import plan_for
from vllm_effplugin.models.looped import EXTRA_PREFIX, LoopedModel
from vllm_effplugin.models.trunk import (
    LayerFactory,
    PlannedTrunk,
    arranged_weights,
    compile_trunk,
)
from vllm_effplugin.techniques.layer_parallel.layer import MemberNorm


def _llama_attention(cls: type[LlamaAttention], *, bias: bool | None = None) -> Any:
    """A factory of `cls` with the heads of several layers.

    Args:
        bias: whether q, k and v have biases while the output has none (Qwen2); by default as
            Llama reads it from its configuration.
    """

    def build(vllm_config: VllmConfig, size: int, prefix: str) -> nn.Module:
        hf_config = vllm_config.model_config.hf_config
        config = copy.copy(hf_config)
        # Stated, because the class would otherwise derive it from the widened number of heads.
        config.head_dim = vllm_config.model_config.get_head_size()
        attention_bias = getattr(hf_config, "attention_bias", False) or getattr(
            hf_config, "bias", False
        )
        return cls(
            config=config,
            hidden_size=hf_config.hidden_size,
            num_heads=size * hf_config.num_attention_heads,
            num_kv_heads=size * hf_config.num_key_value_heads,
            max_position_embeddings=hf_config.max_position_embeddings,
            bias=getattr(hf_config, "qkv_bias", attention_bias) if bias is None else bias,
            bias_o_proj=attention_bias if bias is None else False,
            cache_config=vllm_config.cache_config,
            prefix=prefix,
        )

    return build


def _qwen3_attention(vllm_config: VllmConfig, size: int, prefix: str) -> nn.Module:
    hf_config = vllm_config.model_config.hf_config
    attention = Qwen3Attention(
        hidden_size=hf_config.hidden_size,
        num_heads=size * hf_config.num_attention_heads,
        num_kv_heads=size * hf_config.num_key_value_heads,
        max_position=hf_config.max_position_embeddings,
        head_dim=vllm_config.model_config.get_head_size(),
        rms_norm_eps=hf_config.rms_norm_eps,
        qkv_bias=getattr(hf_config, "attention_bias", False),
        cache_config=vllm_config.cache_config,
        rope_parameters=hf_config.rope_parameters,
        prefix=prefix,
    )
    attention.q_norm = MemberNorm(attention.num_heads, attention.q_norm)
    attention.k_norm = MemberNorm(attention.num_kv_heads, attention.k_norm)
    return attention


@compile_trunk
class EfficientLlamaModel(PlannedTrunk, LlamaModel):
    """Llama's trunk on a plan."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        plan = plan_for(vllm_config.model_config.hf_config)
        layers = LayerFactory(
            vllm_config, plan, LlamaDecoderLayer, _llama_attention(LlamaAttention)
        )
        LlamaModel.__init__(self, vllm_config=vllm_config, prefix=prefix, layer_type=layers)
        self.plan = plan
        self.arrange(vllm_config, prefix, layers)


@compile_trunk
class EfficientMistralModel(PlannedTrunk, MistralModel):
    """Mistral's trunk on a plan."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        plan = plan_for(vllm_config.model_config.hf_config)
        layers = LayerFactory(
            vllm_config, plan, MistralDecoderLayer, _llama_attention(MistralAttention)
        )
        MistralModel.__init__(self, vllm_config=vllm_config, prefix=prefix, layer_type=layers)
        self.plan = plan
        self.arrange(vllm_config, prefix, layers)


@compile_trunk
class EfficientQwen2Model(PlannedTrunk, Qwen2Model):
    """Qwen2's trunk on a plan."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        plan = plan_for(vllm_config.model_config.hf_config)
        # Qwen2's attention derives its head size from the number of heads, which a group
        # multiplies; Llama's computes the same with a stated head size.
        layers = LayerFactory(
            vllm_config, plan, Qwen2DecoderLayer, _llama_attention(LlamaAttention, bias=True)
        )
        Qwen2Model.__init__(self, vllm_config=vllm_config, prefix=prefix, decoder_layer_type=layers)
        self.plan = plan
        self.arrange(vllm_config, prefix, layers)


@compile_trunk
class EfficientQwen3Model(PlannedTrunk, Qwen3Model):
    """Qwen3's trunk on a plan."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        plan = plan_for(vllm_config.model_config.hf_config)
        layers = LayerFactory(vllm_config, plan, Qwen3DecoderLayer, _qwen3_attention)
        # Qwen3Model adds nothing to Qwen2Model's constructor but a fixed layer class.
        Qwen2Model.__init__(self, vllm_config=vllm_config, prefix=prefix, decoder_layer_type=layers)
        self.plan = plan
        self.arrange(vllm_config, prefix, layers)


class _EfficientForCausalLM(LoopedModel):
    """What the families share: a planned trunk, the head, and loading through the plan."""

    trunk_class: ClassVar[type[Any]]
    model: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        nn.Module.__init__(self)
        hf_config = vllm_config.model_config.hf_config
        self.config = hf_config
        self.vllm_config = vllm_config
        self.quant_config = vllm_config.quant_config
        self.model = self.trunk_class(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            hf_config.vocab_size,
            hf_config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if hf_config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(
            hf_config.vocab_size, scale=getattr(hf_config, "logit_scale", 1.0)
        )
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors
        self.connect(vllm_config)

    @property
    def loop(self) -> TrunkLoop | None:
        return self.model.loop

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load checkpoint tensors, named as in the stock model."""
        loaded = super().load_weights(arranged_weights(weights, self, EXTRA_PREFIX))
        if self.loop is not None:
            self.loop.weights_loaded()
        return loaded


class EfficientLlamaForCausalLM(_EfficientForCausalLM, LlamaForCausalLM):
    """Llama on a plan."""

    trunk_class = EfficientLlamaModel


class EfficientMistralForCausalLM(_EfficientForCausalLM, MistralForCausalLM):
    """Mistral on a plan."""

    trunk_class = EfficientMistralModel


class EfficientQwen2ForCausalLM(_EfficientForCausalLM, Qwen2ForCausalLM):
    """Qwen2 on a plan."""

    trunk_class = EfficientQwen2Model


class EfficientQwen3ForCausalLM(_EfficientForCausalLM, Qwen3ForCausalLM):
    """Qwen3 on a plan."""

    trunk_class = EfficientQwen3Model
