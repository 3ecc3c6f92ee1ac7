"""What is refused at start: each unsupported combination by the name of its setting."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from vllm_effplugin.config import EfficiencyConfig, parse_efficiency
from vllm_effplugin.config.checkpoint import check_extra_tensors
from vllm_effplugin.errors import UnsupportedError
from vllm_effplugin.plan import Plan, build_plan
from vllm_effplugin.techniques.layer_parallel.placement import check_placement

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = init_logger(f"vllm.{__name__}")  # below `vllm`, so that vLLM's log settings apply

# Attributes of a Hugging Face configuration that change what a layer computes, and that the
# grouped layers do not implement.
_UNSUPPORTED_ATTRIBUTES = {
    "dual_chunk_attention_config": "dual chunk attention",
    "ada_rms_norm_t_cond": "time-conditioned norms",
    "qk_norm": "Qwen2's optional query/key norm",
}


class EfficiencyAdmission(VerifyAndUpdateConfig):
    """Checks that run while vLLM builds its configuration, before any process is started."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Check the `efficiency` block, and a local checkpoint's extra tensors.

        Raises:
            ConfigError, CheckpointError: naming the field or the tensor.
        """
        efficiency = efficiency_of(model_config.hf_config)
        num_layers = model_config.hf_config.num_hidden_layers
        efficiency.validate_for(num_layers)
        layer_parallel = efficiency.layer_parallel
        folder = Path(model_config.model)
        if layer_parallel is not None and layer_parallel.trained and folder.is_dir():
            check_extra_tensors(folder, efficiency, num_layers)

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Refuse combinations that are not supported.

        Raises:
            UnsupportedError: naming the setting and the way out.
        """
        plan = plan_for(vllm_config.model_config.hf_config)
        _refuse_anywhere(vllm_config)
        if plan.groups:
            _refuse_with_groups(vllm_config, plan)
        if not plan.is_trivial:
            logger.info("%d layers in %d steps: %s", len(plan.unit_of), plan.depth, plan.describe())


def efficiency_of(hf_config: Any) -> EfficiencyConfig:
    """The validated `efficiency` block of a Hugging Face configuration; empty without one."""
    return parse_efficiency(getattr(hf_config, "efficiency", None))


def plan_for(hf_config: Any) -> Plan:
    """The plan of a Hugging Face configuration with (or without) an `efficiency` block."""
    return build_plan(efficiency_of(hf_config), hf_config.num_hidden_layers)


def _refuse_anywhere(vllm_config: VllmConfig) -> None:
    parallel = vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        raise UnsupportedError(
            f"--pipeline-parallel-size {parallel.pipeline_parallel_size} is not supported with an "
            "efficient checkpoint: use --tensor-parallel-size, or serve the base model"
        )
    if parallel.distributed_executor_backend == "ray" and not current_platform.ray_device_key:
        raise UnsupportedError(
            "--distributed-executor-backend ray is not supported by vLLM on its "
            f"{current_platform.device_type} platform: use `mp`"
        )
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method != "ngram":
        raise UnsupportedError(
            f"--speculative-config method {speculative.method!r} is not supported with an "
            "efficient checkpoint: use method `ngram`, or leave speculative decoding off"
        )


def _refuse_with_groups(vllm_config: VllmConfig, plan: Plan) -> None:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if model.quantization is not None:
        raise UnsupportedError(
            f"quantization {model.quantization!r} is not supported with layer-parallel groups: "
            "serve unquantised weights, or remove `layer_parallel` from the efficiency block"
        )
    if vllm_config.lora_config is not None:
        raise UnsupportedError(
            "--enable-lora is not supported with layer-parallel groups: merge the adapter into "
            "the checkpoint before `effplugin prepare`, or remove `layer_parallel`"
        )
    if parallel.decode_context_parallel_size > 1:
        raise UnsupportedError(
            "--decode-context-parallel-size is not supported with layer-parallel groups: leave "
            "it at 1"
        )
    if vllm_config.kv_transfer_config is not None:
        raise UnsupportedError(
            "--kv-transfer-config is not supported with layer-parallel groups: their KV cache has "
            "one entry per group, which no connector has been tested with; leave it off"
        )
    for attribute, meaning in _UNSUPPORTED_ATTRIBUTES.items():
        if getattr(model.hf_config, attribute, None):
            raise UnsupportedError(
                f"`{attribute}` ({meaning}) is not supported with layer-parallel groups: remove "
                "`layer_parallel` from the efficiency block"
            )
    layer_parallel = efficiency_of(model.hf_config).layer_parallel
    assert layer_parallel is not None
    check_placement(
        layer_parallel,
        plan,
        tp_size=parallel.tensor_parallel_size,
        num_heads=model.hf_config.num_attention_heads,
        num_kv_heads=model.hf_config.num_key_value_heads,
        layer_types=getattr(model.hf_config, "layer_types", None),
    )
