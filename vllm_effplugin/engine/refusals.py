"""What is refused at start: each unsupported combination by the name of its setting."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm import envs
from vllm.config.compilation import CUDAGraphMode
from vllm.model_executor.layers.pooler.activations import PoolerClassify, get_act_fn
from vllm.platforms import current_platform

from vllm_effplugin.config import CLASSIFIERS
from vllm_effplugin.engine.settings import (
    CLOUD_KEY,
    CLOUD_URL,
    CLOUD_WORKERS,
    SCHEDULER,
    UNTESTED,
    VERIFY,
    WORKERS,
    efficiency_of,
    verifies,
    why_not_on_a_gpu,
)
from vllm_effplugin.errors import ConfigError, UnsupportedError
from vllm_effplugin.plan import Plan
from vllm_effplugin.techniques.edge_cloud.link import cloud_client
from vllm_effplugin.techniques.layer_parallel.placement import check_placement

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Attributes of a Hugging Face configuration that change what a layer computes, and that the
# grouped layers do not implement.
_UNSUPPORTED_ATTRIBUTES = {
    "dual_chunk_attention_config": "dual chunk attention",
    "ada_rms_norm_t_cond": "time-conditioned norms",
    "qk_norm": "Qwen2's optional query/key norm",
}


def anywhere(vllm_config: VllmConfig, plan: Plan) -> None:
    """What no efficient checkpoint supports."""
    parallel = vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        raise UnsupportedError(
            f"--pipeline-parallel-size {parallel.pipeline_parallel_size} is not supported with an "
            "efficient checkpoint: use --tensor-parallel-size, or serve the base model"
        )
    for option in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if (size := getattr(parallel, option)) > 1:
            raise UnsupportedError(
                f"--{option.replace('_', '-')} {size} is not supported with an efficient "
                "checkpoint, whose layers keep all of a sequence on each rank: leave it at 1"
            )
    if parallel.distributed_executor_backend == "ray" and not current_platform.ray_device_key:
        raise UnsupportedError(
            "--distributed-executor-backend ray is not supported by vLLM on its "
            f"{current_platform.device_type} platform: use `mp`"
        )
    if parallel.distributed_executor_backend == "ray" and not (
        envs.VLLM_USE_RAY_V2_EXECUTOR_BACKEND
    ):
        raise UnsupportedError(
            "VLLM_USE_RAY_V2_EXECUTOR_BACKEND=0 is not supported with an efficient checkpoint: "
            "vLLM's older Ray executor goes past the worker that some techniques bring; leave it "
            "at 1"
        )
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method != "ngram" and not verifies(vllm_config):
        raise UnsupportedError(
            f"--speculative-config method {speculative.method!r} is not supported with an "
            "efficient checkpoint: use method `ngram`, or leave speculative decoding off"
        )
    if verifies(vllm_config) and not plan.has_exits:
        raise UnsupportedError(
            "--speculative-config asks for verified early exits, but the model has no exits: "
            "leave it off, or serve a checkpoint of `effplugin prepare early-exit`"
        )


def with_groups(vllm_config: VllmConfig, plan: Plan) -> None:
    """What layer-parallel groups do not support."""
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


def with_exits(vllm_config: VllmConfig, plan: Plan) -> None:
    """What early exit does not support."""
    model = vllm_config.model_config
    way_out = "remove `early_exit` from the efficiency block"
    if plan.groups and verifies(vllm_config):
        raise UnsupportedError(
            "verified early exits (--speculative-config) are not supported with `layer_parallel`: "
            "leave --speculative-config off, or remove `layer_parallel` from the efficiency block"
        )
    if vllm_config.speculative_config is not None and not verifies(vllm_config):
        raise UnsupportedError(
            f"--speculative-config method {vllm_config.speculative_config.method!r} is not "
            f"supported with early exit: use {json.dumps(VERIFY)}, leave it off, or {way_out}"
        )
    if verifies(vllm_config) and vllm_config.parallel_config.tensor_parallel_size > 1:
        raise UnsupportedError(
            "verified early exits (--speculative-config) are not supported with "
            "--tensor-parallel-size > 1: use one rank, or leave --speculative-config off"
        )
    if model.runner_type == "pooling":
        raise UnsupportedError(
            "--runner pooling is not supported with `early_exit`, which is for generation: use "
            f"`effplugin prepare classify` for a classifier, or {way_out}"
        )
    if verifies(vllm_config) and vllm_config.use_v2_model_runner:
        raise UnsupportedError(
            "verified early exits (--speculative-config) are not supported on vLLM's model runner "
            "V2, which has no interface for them: set VLLM_USE_V2_MODEL_RUNNER=0, or leave "
            "--speculative-config off"
        )
    if verifies(vllm_config) and current_platform.device_type != "cpu":
        raise UnsupportedError(
            "verified early exits (--speculative-config) are supported on CPUs only yet: leave it "
            f"off, or {way_out}"
        )
    early_exit = efficiency_of(model.hf_config).early_exit
    assert early_exit is not None
    if early_exit.has_states:
        _with_gate_states(vllm_config, way_out)
    _with_a_loop(vllm_config, "early exit", way_out, ["early_exit"])


def _with_gate_states(vllm_config: VllmConfig, way_out: str) -> None:
    """What gates that keep states do not support."""
    if verifies(vllm_config):
        raise UnsupportedError(
            "verified early exits (--speculative-config) are not supported with `mamba` gates, "
            "whose states cannot take a draft back: use `linear` or `mlp` gates, or leave "
            "--speculative-config off"
        )
    if current_platform.device_type != "cpu":
        raise UnsupportedError(
            f"`mamba` gates are not supported on {current_platform.device_type} yet, where a CUDA "
            f"graph would not see their states' pages: use `linear` or `mlp` gates, or {way_out}"
        )


def with_skipped_states(vllm_config: VllmConfig) -> None:
    """What exits of a model with recurrent states do not support."""
    way_out = "remove `early_exit` from the efficiency block"
    cache = vllm_config.cache_config
    if cache.enable_prefix_caching:
        raise UnsupportedError(
            "--enable-prefix-caching is not supported with exits of a model with recurrent "
            f"states, which may be shared before skipped layers ran: leave it off, or {way_out}"
        )
    if verifies(vllm_config):
        raise UnsupportedError(
            "verified early exits (--speculative-config) are not supported on a model with "
            "recurrent states, which cannot take a draft back: leave --speculative-config off"
        )
    if cache.use_replayssm:
        raise UnsupportedError(
            "--use-replayssm is not supported with early exit, which skips updates of the states: "
            f"leave it off, or {way_out}"
        )
    if vllm_config.mamba_config.enable_stochastic_rounding:
        raise UnsupportedError(
            "stochastic rounding of states (--mamba-config) is not supported with early exit, "
            f"where skipped layers have to give what they would have given: leave it off, or "
            f"{way_out}"
        )


def on_an_edge(vllm_config: VllmConfig, mode: str) -> None:
    """What the lower layers of a split model do not support, beyond early exit's own.

    Args:
        mode: of the server.
    """
    if mode != "standalone" and not os.environ.get(CLOUD_URL):
        raise UnsupportedError(
            f"an edge in mode {mode!r} has to know its cloud: set {CLOUD_URL} to the cloud's URL, "
            "or `mode` in `edge_cloud` of the efficiency block to `standalone`"
        )
    if url := os.environ.get(CLOUD_URL):
        try:
            cloud_client(url, os.environ.get(CLOUD_KEY, ""), deadline_s=1.0)
        except ConfigError as error:
            raise ConfigError(f"{error} (set {CLOUD_URL} and {CLOUD_KEY})") from None
    if vllm_config.use_v2_model_runner:
        raise UnsupportedError(
            "vLLM's model runner V2 is not supported with `edge_cloud` yet, where no request has "
            "been parked: set VLLM_USE_V2_MODEL_RUNNER=0"
        )
    if vllm_config.parallel_config.tensor_parallel_size > 1:
        raise UnsupportedError(
            "--tensor-parallel-size > 1 is not supported on an edge: use one rank"
        )
    if vllm_config.scheduler_config.async_scheduling:
        raise UnsupportedError(
            "--async-scheduling is not supported on an edge, where a step decides who takes part "
            "in the next one: leave it out"
        )
    if verifies(vllm_config):
        raise UnsupportedError(
            "verified early exits (--speculative-config) are not supported on an edge, whose "
            "upper layers are elsewhere: leave --speculative-config off"
        )
    if current_platform.device_type != "cpu":
        raise UnsupportedError(
            "an edge is supported on CPUs only yet: serve the unsplit model on a GPU"
        )


def with_streamed_states(vllm_config: VllmConfig) -> None:
    """What the cloud of a split model does not support."""
    model = vllm_config.model_config
    if vllm_config.use_v2_model_runner:
        raise UnsupportedError(
            "vLLM's model runner V2 is not supported with `edge_cloud` yet, where no session of "
            "hidden states has run: set VLLM_USE_V2_MODEL_RUNNER=0"
        )
    if model.runner_type == "pooling":
        raise UnsupportedError(
            "--runner pooling is not supported with `edge_cloud`, which is for generation: leave "
            "it at `auto`"
        )
    if model.quantization is not None:
        raise UnsupportedError(
            f"quantization {model.quantization!r} is not supported with `edge_cloud`, whose edge "
            "was trained for the model as it is: serve unquantised weights"
        )
    if vllm_config.lora_config is not None:
        raise UnsupportedError(
            "--enable-lora is not supported with `edge_cloud`: merge the adapter into the "
            "checkpoint before `effplugin prepare edge-cloud`"
        )
    if vllm_config.speculative_config is not None:
        raise UnsupportedError(
            "--speculative-config is not supported with `edge_cloud`, where each token is asked "
            "for by itself: leave it off"
        )
    if vllm_config.kv_transfer_config is not None:
        raise UnsupportedError(
            "--kv-transfer-config is not supported with `edge_cloud`, whose sessions have no "
            "tokens to find cache entries by: leave it off"
        )
    if vllm_config.scheduler_config.scheduler_cls not in (None, SCHEDULER):
        raise UnsupportedError(
            "--scheduler-cls is not supported with `edge_cloud`, which needs one of its own: "
            "leave it off"
        )
    device = current_platform.device_type
    if device not in CLOUD_WORKERS:
        raise UnsupportedError(f"`edge_cloud` is not supported on {device} yet")
    worker = vllm_config.parallel_config.worker_cls
    if worker not in ("auto", CLOUD_WORKERS[device]):
        raise UnsupportedError(
            f"--worker-cls {worker} is not supported with `edge_cloud`, which needs one of its "
            "own: leave it at `auto`"
        )


def with_sequences(vllm_config: VllmConfig) -> None:
    """What a classifier with exits, or one that merges sequences, does not support."""
    model = vllm_config.model_config
    efficiency = efficiency_of(model.hf_config)
    sections = [name for name in ("joint_exit", "multiplex") if getattr(efficiency, name)]
    section = " and ".join(f"`{name}`" for name in sections)
    way_out = f"remove {section} from the efficiency block"
    if model.runner_type != "pooling":
        raise UnsupportedError(
            f"--runner {model.runner_type} is not supported with {section}, which is for "
            f"classifiers: leave it at `auto`, or {way_out}"
        )
    pooler = model.pooler_config
    reads = "CLS" if model.architecture.startswith("EfficientBert") else "LAST"
    if pooler is not None and pooler.seq_pooling_type not in (None, reads):
        raise UnsupportedError(
            f"pooling type {pooler.seq_pooling_type} (--pooler-config) is not supported with "
            f"{section} of {model.architecture}, which was trained on {reads}: leave it out, or "
            f"{way_out}"
        )
    if pooler is not None and pooler.task not in (None, "classify"):
        raise UnsupportedError(
            f"pooling task {pooler.task!r} (--pooler-config) is not supported with {section}, "
            f"which classifies whole sequences: leave it out, or {way_out}"
        )
    for setting in ("logit_mean", "logit_sigma"):
        if pooler is not None and getattr(pooler, setting) is not None:
            raise UnsupportedError(
                f"{setting} (--pooler-config) is not supported with {section}, which was "
                f"trained without it: leave it out, or {way_out}"
            )
    if not isinstance(get_act_fn(model.hf_config, static_num_labels=False), PoolerClassify):
        raise UnsupportedError(
            f"{section} needs a softmax over the classes, and `problem_type` or the activation "
            f"function in config.json says otherwise: change that, or {way_out}"
        )
    if reads == "LAST" and getattr(model.hf_config, "is_causal", True) is False:
        raise UnsupportedError(
            f"`is_causal`: false is not supported with {section} of a decoder, which was trained "
            f"on causal attention: leave it out, or {way_out}"
        )
    if vllm_config.speculative_config is not None:
        raise UnsupportedError(
            f"--speculative-config is not supported with a classifier: leave it off, or {way_out}"
        )
    if model.hf_config.num_labels < 2:
        raise UnsupportedError(
            f"a classifier with one label is not supported with {section}, which is for two "
            f"classes or more: {way_out}"
        )
    _with_a_loop(vllm_config, section, way_out, sections)


def on_wrong_model(hf_config: Any) -> None:
    """A technique's section in the configuration of a model that it is not for."""
    efficiency = efficiency_of(hf_config)
    [architecture, *_] = hf_config.architectures
    classifies = architecture in CLASSIFIERS.values()
    for section in ("layer_parallel", "early_exit", "split_after"):
        if classifies and getattr(efficiency, section):
            raise UnsupportedError(
                f"`{section}` is not supported on {architecture}: remove it from the "
                "efficiency block"
            )
    for section, command in (("joint_exit", "classify"), ("multiplex", "multiplex")):
        if getattr(efficiency, section) is not None and not classifies:
            raise UnsupportedError(
                f"`{section}` is not supported on {architecture}, which is no classifier: serve a "
                f"checkpoint of `effplugin prepare {command}`, or remove it from the efficiency "
                "block"
            )


def _with_a_loop(
    vllm_config: VllmConfig, technique: str, way_out: str, sections: Sequence[str]
) -> None:
    """What no technique supports whose rows change inside the model.

    Args:
        technique: its name, for the message.
        way_out: what to do instead.
        sections: of the efficiency block that ask for it.
    """
    model = vllm_config.model_config
    if model.quantization is not None:
        raise UnsupportedError(
            f"quantization {model.quantization!r} is not supported with {technique}: serve "
            f"unquantised weights, or {way_out}"
        )
    if vllm_config.lora_config is not None:
        raise UnsupportedError(
            f"--enable-lora is not supported with {technique}: merge the adapter into the "
            f"checkpoint, or {way_out}"
        )
    if vllm_config.kv_transfer_config is not None:
        raise UnsupportedError(
            f"--kv-transfer-config is not supported with {technique}, where the cache may lack "
            f"entries: leave it off, or {way_out}"
        )
    if model.enable_prompt_embeds:
        raise UnsupportedError(
            f"--enable-prompt-embeds is not supported with {technique}: leave it off, or {way_out}"
        )
    cache = vllm_config.cache_config
    if cache.kv_sharing_fast_prefill:
        raise UnsupportedError(
            f"--kv-sharing-fast-prefill is not supported with {technique}, which cuts batches by "
            f"rules of its own: leave it off, or {way_out}"
        )
    if cache.kv_offloading_size is not None:
        raise UnsupportedError(
            f"--kv-offloading-size is not supported with {technique}, where the cache may lack "
            f"entries: leave it off, or {way_out}"
        )
    if vllm_config.scheduler_config.scheduler_cls not in (None, SCHEDULER):
        raise UnsupportedError(
            f"--scheduler-cls is not supported with {technique}, which may need one of its own: "
            f"leave it off, or {way_out}"
        )
    if len(set(getattr(model.hf_config, "layer_types", None) or ())) > 1:
        raise UnsupportedError(
            f"a model that mixes kinds of attention layers is not supported with {technique}, "
            f"which runs all layers on one set of cache blocks: {way_out}"
        )
    device = current_platform.device_type
    if device not in WORKERS:
        raise UnsupportedError(f"{technique} is not supported on {device} yet: {way_out}")
    v2 = vllm_config.use_v2_model_runner
    reasons = [why for name in sections if (why := why_not_on_a_gpu(name, v2=v2))]
    if device != "cpu" and reasons and os.environ.get(UNTESTED) != "1":
        raise UnsupportedError(
            f"{technique} is not supported on {device} yet: {', '.join(reasons)}. Set "
            f"{UNTESTED}=1 to have it all the same, or {way_out}"
        )
    if device != "cpu":
        _with_cuda_graphs(vllm_config, technique, way_out)
    parallel = vllm_config.parallel_config
    if parallel.worker_cls not in ("auto", WORKERS[device]):
        raise UnsupportedError(
            f"--worker-cls {parallel.worker_cls} is not supported with {technique}, which brings "
            f"a worker of its own: leave it at `auto`, or {way_out}"
        )


def _with_cuda_graphs(vllm_config: VllmConfig, technique: str, way_out: str) -> None:
    compilation = vllm_config.compilation_config
    if compilation.cudagraph_mode is None:
        # Between two parts of the stack Python decides, so that no graph can hold the whole step.
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE
    if compilation.cudagraph_mode.has_full_cudagraphs():
        raise UnsupportedError(
            f"-cc.cudagraph_mode={compilation.cudagraph_mode.name} is not supported with "
            f"{technique}, which decides between two graphs of a step: use PIECEWISE, or {way_out}"
        )
