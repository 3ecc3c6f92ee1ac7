"""Mamba-2 on a plan: a subclass of vLLM's own model."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.mamba2 import Mamba2ForCausalLM, Mamba2Model
from vllm.model_executor.models.utils import maybe_prefix

from vllm_effplugin.engine.loop import TrunkLoop
from vllm_effplugin.engine.settings import plan_for
from vllm_effplugin.models.looped import EXTRA_PREFIX, LoopedModel
from vllm_effplugin.models.trunk import PlannedTrunk, compile_trunk

EXITS, OWN_EXITS = "model.exits.", "backbone.exits."
"""The exits' tensors, as checkpoints of all families name them and as this model does."""


@compile_trunk
class EfficientMamba2Model(PlannedTrunk, Mamba2Model):
    """Mamba-2's trunk on a plan."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        Mamba2Model.__init__(self, vllm_config=vllm_config, prefix=prefix)
        self.plan = plan_for(vllm_config.model_config.hf_config)
        self.arrange(vllm_config, prefix)

    @property
    def norm(self) -> nn.Module:
        """The final norm."""
        return self.norm_f


class EfficientMamba2ForCausalLM(LoopedModel, Mamba2ForCausalLM):
    """Mamba-2 on a plan."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        # As the stock class does, which names its trunk's class.
        nn.Module.__init__(self)
        config = vllm_config.model_config.hf_config
        self.config, self.vllm_config = config, vllm_config
        self.model_config = vllm_config.model_config
        self.scheduler_config = vllm_config.scheduler_config
        self.backbone = EfficientMamba2Model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "backbone")
        )
        self.lm_head = ParallelLMHead(
            config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "lm_head")
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.backbone.embeddings)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.backbone.make_empty_intermediate_tensors
        self.connect(vllm_config)

    @property
    def loop(self) -> TrunkLoop | None:
        return self.backbone.loop

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load checkpoint tensors, named as in the stock model."""
        loaded = super().load_weights(
            (name.removeprefix(EXTRA_PREFIX).replace(EXITS, OWN_EXITS), tensor)
            for name, tensor in weights
        )
        if self.loop is not None:
            self.loop.weights_loaded()
        return loaded
