"""What is refused at start: each unsupported combination by the name of its setting."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.config.compilation import CUDAGraphMode
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from vllm_effplugin.config import EfficiencyConfig, parse_efficiency
from vllm_effplugin.config.checkpoint import check_extra_tensors
from vllm_effplugin.engine.metrics import COLLECTOR
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


EXIT_PARAMS = "vllm_effplugin.engine.params:ExitParamsV1"
VERIFYING_EXIT_PARAMS = "vllm_effplugin.engine.params:VerifyingExitParamsV1"
EXIT_PARAMS_V2 = "vllm_effplugin.engine.params_v2:ExitParamsV2"
EXIT_SCHEDULER = "vllm_effplugin.engine.schedulers.salted_scheduler"
EXIT_WORKERS = {
    "cpu": "vllm_effplugin.engine.worker.EffpluginCPUWorker",
    "cuda": "vllm_effplugin.engine.worker.EffpluginWorker",
}
UNTESTED = "EFFPLUGIN_UNTESTED"
"""Environment variable that admits what was built and never run: exits on GPUs."""
VERIFY = {
    "method": "custom_class",
    "model": "vllm_effplugin.engine.v1_drafter.ExitProposer",
    "num_speculative_tokens": 4,
}
"""`--speculative-config` of a server that verifies early exits; the number is free."""


class EfficiencyAdmission(VerifyAndUpdateConfig):
    """Checks that run while vLLM builds its configuration, before any process is started."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Check the `efficiency` block, and a local checkpoint's extra tensors.

        Raises:
            ConfigError, CheckpointError: naming the field or the tensor.
        """
        efficiency = efficiency_of(model_config.hf_config)
        efficiency.validate_for(model_config.hf_config.num_hidden_layers)
        folder = Path(model_config.model)
        if efficiency.has_tensors and folder.is_dir():
            check_extra_tensors(folder, efficiency)

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Refuse combinations that are not supported.

        Raises:
            UnsupportedError: naming the setting and the way out.
        """
        plan = plan_for(vllm_config.model_config.hf_config)
        _refuse_anywhere(vllm_config)
        if _verifies(vllm_config) and not plan.has_exits:
            raise UnsupportedError(
                "--speculative-config asks for verified early exits, but the model has no exits: "
                "leave it off, or serve a checkpoint of `effplugin prepare early-exit`"
            )
        if plan.groups:
            _refuse_with_groups(vllm_config, plan)
        if plan.has_exits:
            _refuse_with_exits(vllm_config, plan)
            vllm_config.parallel_config.worker_cls = EXIT_WORKERS[current_platform.device_type]
            early_exit = efficiency_of(vllm_config.model_config.hf_config).early_exit
            assert early_exit is not None
            vllm_config.scheduler_config.scheduler_cls = EXIT_SCHEDULER
            processors = vllm_config.model_config.logits_processors or []
            params = VERIFYING_EXIT_PARAMS if _verifies(vllm_config) else EXIT_PARAMS
            if vllm_config.use_v2_model_runner:
                params = EXIT_PARAMS_V2
            if params not in processors:
                vllm_config.model_config.logits_processors = [*processors, params]
            COLLECTOR.watch(
                vllm_config.instance_id,
                str(vllm_config.model_config.served_model_name),
                [point.depth for point in early_exit.exits],
                len(plan.unit_of),
                vllm_config.parallel_config.data_parallel_size,
            )
        if not plan.is_trivial:
            logger.info("%d layers in %d steps: %s", len(plan.unit_of), plan.depth, plan.describe())


def efficiency_of(hf_config: Any) -> EfficiencyConfig:
    """The validated `efficiency` block of a Hugging Face configuration; empty without one."""
    return parse_efficiency(getattr(hf_config, "efficiency", None))


def plan_for(hf_config: Any) -> Plan:
    """The plan of a Hugging Face configuration with (or without) an `efficiency` block."""
    return build_plan(efficiency_of(hf_config), hf_config.num_hidden_layers)


def _verifies(vllm_config: VllmConfig) -> bool:
    """Whether the server verifies early exits."""
    speculative = vllm_config.speculative_config
    return speculative is not None and speculative.model == VERIFY["model"]


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
    if speculative is not None and speculative.method != "ngram" and not _verifies(vllm_config):
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


def _refuse_with_exits(vllm_config: VllmConfig, plan: Plan) -> None:
    model = vllm_config.model_config
    way_out = "remove `early_exit` from the efficiency block"
    if plan.groups:
        raise UnsupportedError(
            "`early_exit` and `layer_parallel` are not supported together yet: remove one of them"
        )
    if model.quantization is not None:
        raise UnsupportedError(
            f"quantization {model.quantization!r} is not supported with early exit: serve "
            f"unquantised weights, or {way_out}"
        )
    if vllm_config.lora_config is not None:
        raise UnsupportedError(
            "--enable-lora is not supported with early exit: merge the adapter into the "
            f"checkpoint, or {way_out}"
        )
    if vllm_config.kv_transfer_config is not None:
        raise UnsupportedError(
            "--kv-transfer-config is not supported with early exit, whose cache may have "
            f"entries that are still owed: leave it off, or {way_out}"
        )
    if vllm_config.speculative_config is not None and not _verifies(vllm_config):
        raise UnsupportedError(
            f"--speculative-config method {vllm_config.speculative_config.method!r} is not "
            f"supported with early exit: use {json.dumps(VERIFY)}, leave it off, or {way_out}"
        )
    if _verifies(vllm_config) and vllm_config.parallel_config.tensor_parallel_size > 1:
        raise UnsupportedError(
            "verified early exits (--speculative-config) are not supported with "
            "--tensor-parallel-size > 1: use one rank, or leave --speculative-config off"
        )
    if model.runner_type == "pooling":
        raise UnsupportedError(f"--runner pooling is not supported with early exit yet: {way_out}")
    if model.enable_prompt_embeds:
        raise UnsupportedError(
            f"--enable-prompt-embeds is not supported with early exit: leave it off, or {way_out}"
        )
    cache = vllm_config.cache_config
    if cache.kv_sharing_fast_prefill:
        raise UnsupportedError(
            "--kv-sharing-fast-prefill is not supported with early exit, which cuts batches by "
            f"rules of its own: leave it off, or {way_out}"
        )
    if cache.kv_offloading_size is not None:
        raise UnsupportedError(
            "--kv-offloading-size is not supported with early exit, whose cache may have entries "
            f"that are still owed: leave it off, or {way_out}"
        )
    if vllm_config.scheduler_config.scheduler_cls not in (None, EXIT_SCHEDULER):
        raise UnsupportedError(
            "--scheduler-cls is not supported with early exit, which may need one of its own: "
            f"leave it off, or {way_out}"
        )
    if _verifies(vllm_config) and vllm_config.use_v2_model_runner:
        raise UnsupportedError(
            "verified early exits (--speculative-config) are not supported on vLLM's model runner "
            "V2, which has no interface for them: set VLLM_USE_V2_MODEL_RUNNER=0, or leave "
            "--speculative-config off"
        )
    if len(set(getattr(model.hf_config, "layer_types", None) or ())) > 1:
        raise UnsupportedError(
            "a model that mixes kinds of attention layers is not supported with early exit, which "
            f"runs all layers on one set of cache blocks: {way_out}"
        )
    device = current_platform.device_type
    if device not in EXIT_WORKERS or (device != "cpu" and os.environ.get(UNTESTED) != "1"):
        raise UnsupportedError(
            f"early exit is not supported on {device} yet"
            + (
                f", where it was built but never run (set {UNTESTED}=1 to be the first)"
                if device in EXIT_WORKERS
                else ""
            )
            + f": {way_out}"
        )
    if device != "cpu":
        _refuse_on_gpu(vllm_config, way_out)
    parallel = vllm_config.parallel_config
    if parallel.worker_cls not in ("auto", EXIT_WORKERS[device]):
        raise UnsupportedError(
            f"--worker-cls {parallel.worker_cls} is not supported with early exit, which brings "
            f"a worker of its own: leave it at `auto`, or {way_out}"
        )


def _refuse_on_gpu(vllm_config: VllmConfig, way_out: str) -> None:
    compilation = vllm_config.compilation_config
    if compilation.cudagraph_mode is None:
        # Between two exits Python decides, so that no graph can hold the whole step.
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE
    if compilation.cudagraph_mode.has_full_cudagraphs():
        raise UnsupportedError(
            f"-cc.cudagraph_mode={compilation.cudagraph_mode.name} is not supported with early "
            f"exit, which decides between two graphs of a step: use PIECEWISE, or {way_out}"
        )
    if _verifies(vllm_config):
        raise UnsupportedError(
            "verified early exits (--speculative-config) are supported on CPUs only yet: leave it "
            f"off, or {way_out}"
        )
