"""Every vLLM interface that this package relies on, by name.

`tests/engine/test_contract.py` checks each entry, and `effplugin doctor` all of them: when vLLM
changes one, the failure names it.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

_CPU_WORKER = "vllm.v1.worker.cpu_worker"
_LAUNCHERS = "vllm.entrypoints.launchers"


@dataclass(frozen=True)
class Interface:
    """One interface: where it is, which parameters it must take, and what we use it for.

    `attribute` is a class, a function or a value, dotted for members of a class.
    """

    module: str
    attribute: str
    used_for: str
    parameters: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The dotted name."""
        return f"{self.module}.{self.attribute}"

    @property
    def applies(self) -> bool:
        """Whether it may be looked at: vLLM's CPU worker takes CUDA away from its process."""
        from vllm.platforms import current_platform

        return self.module != _CPU_WORKER or current_platform.is_cpu()

    def violation(self) -> str | None:
        """What is wrong with it in the installed vLLM; None when it is as expected."""
        if not self.applies:
            return None
        try:
            found: Any = importlib.import_module(self.module)
            for part in self.attribute.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError):
            return f"{self.name} is gone (used for {self.used_for})"
        if self.parameters:
            missing = set(self.parameters) - set(_parameters(found))
            if missing:
                return (
                    f"{self.name} no longer takes {', '.join(sorted(missing))} "
                    f"(used for {self.used_for})"
                )
        return None


def _parameters(function: Callable[..., object]) -> Iterable[str]:
    """Parameter names; for a class decorated for compilation, of the constructor it wraps."""
    if inspect.isfunction(function):
        function = inspect.getclosurevars(function).nonlocals.get("old_init", function)
    return inspect.signature(function).parameters


_MODELS = "vllm.model_executor.models"
_LAYERS = "vllm.model_executor.layers"

CONTRACT: tuple[Interface, ...] = (
    Interface(
        f"{_MODELS}.registry",
        "ModelRegistry.register_model",
        "architectures",
        ("model_arch", "model_cls"),
    ),
    Interface(f"{_MODELS}.registry", "ModelRegistry.get_supported_archs", "architectures"),
    Interface(f"{_MODELS}.config", "MODELS_CONFIG_MAP", "start-up checks"),
    Interface(
        f"{_MODELS}.config",
        "VerifyAndUpdateConfig.verify_and_update_config",
        "start-up checks",
        ("vllm_config",),
    ),
    Interface(
        f"{_MODELS}.config",
        "VerifyAndUpdateConfig.verify_and_update_model_config",
        "start-up checks",
        ("model_config",),
    ),
    Interface(
        f"{_MODELS}.config",
        "MambaModelConfig.verify_and_update_config",
        "what vLLM settles for a model with recurrent states",
        ("vllm_config",),
    ),
    Interface("vllm.config", "ModelConfig.get_head_size", "the width of grouped attention"),
    Interface(
        f"{_MODELS}.llama",
        "LlamaModel.__init__",
        "building a trunk from our layers",
        ("vllm_config", "prefix", "layer_type"),
    ),
    Interface(
        f"{_MODELS}.mistral",
        "MistralModel.__init__",
        "building a trunk from our layers",
        ("vllm_config", "prefix", "layer_type"),
    ),
    Interface(
        f"{_MODELS}.qwen2",
        "Qwen2Model.__init__",
        "building a trunk from our layers",
        ("vllm_config", "prefix", "decoder_layer_type"),
    ),
    Interface(
        f"{_MODELS}.qwen3",
        "Qwen3Model.__init__",
        "its constructor adding nothing to Qwen2Model's",
        ("vllm_config", "prefix"),
    ),
    *(
        Interface(
            f"{_MODELS}.{family}",
            f"{name}DecoderLayer.forward",
            "calling a layer with the pair of hidden states and residual",
            ("positions", "hidden_states", "residual"),
        )
        for family, name in (
            ("llama", "Llama"),
            ("mistral", "Mistral"),
            ("qwen2", "Qwen2"),
            ("qwen3", "Qwen3"),
        )
    ),
    *(
        Interface(
            f"{_MODELS}.{family}",
            f"{name}Attention.__init__",
            "attention with the heads of several layers",
            (
                "config",
                "hidden_size",
                "num_heads",
                "num_kv_heads",
                "max_position_embeddings",
                "bias",
                "bias_o_proj",
                "cache_config",
                "prefix",
            ),
        )
        for family, name in (("llama", "Llama"), ("mistral", "Mistral"))
    ),
    Interface(
        f"{_MODELS}.qwen3",
        "Qwen3Attention.__init__",
        "attention with the heads of several layers",
        (
            "hidden_size",
            "num_heads",
            "num_kv_heads",
            "max_position",
            "head_dim",
            "rms_norm_eps",
            "qkv_bias",
            "cache_config",
            "rope_parameters",
            "prefix",
        ),
    ),
    Interface(
        f"{_MODELS}.llama",
        "LlamaMLP.__init__",
        "the MLP of a fused group",
        ("hidden_size", "intermediate_size", "hidden_act", "bias", "prefix"),
    ),
    *(
        Interface(f"{_MODELS}.{family}", f"{name}ForCausalLM.load_weights", "loading", ("weights",))
        for family, name in (
            ("llama", "Llama"),
            ("mistral", "Mistral"),
            ("qwen2", "Qwen2"),
            ("qwen3", "Qwen3"),
        )
    ),
    Interface(
        f"{_MODELS}.mamba2",
        "Mamba2Model.__init__",
        "Mamba-2's trunk",
        ("vllm_config", "prefix"),
    ),
    Interface(
        f"{_MODELS}.mamba2",
        "Mamba2DecoderLayer.forward",
        "calling a layer with the pair of hidden states and residual",
        ("hidden_states", "residual", "kwargs"),
    ),
    Interface(f"{_MODELS}.mamba2", "Mamba2ForCausalLM.load_weights", "loading", ("weights",)),
    Interface(
        f"{_LAYERS}.mamba.mamba_mixer2",
        "MambaMixer2.conv_ssm_forward",
        "updating the states of skipped layers",
        ("projected_states", "output"),
    ),
    Interface(f"{_LAYERS}.mamba.abstract", "MambaBase.get_attn_backend", "layers with states"),
    Interface(f"{_LAYERS}.mamba.abstract", "MambaBase.bind_kv_cache", "states of layers"),
    *(
        Interface(
            f"{_LAYERS}.attention_layer_base",
            f"AttentionLayerBase.{method}",
            "states of gates in the cache's pages",
            names,
        )
        for method, names in (
            ("bind_kv_cache", ("kv_cache",)),
            ("get_attn_backend", ()),
            ("get_kv_cache_spec", ("vllm_config",)),
        )
    ),
    *(
        Interface(module, name, "advancing states of gates", names)
        for module, name, names in (
            (
                f"{_LAYERS}.mamba.ops.cpu.causal_conv1d",
                "causal_conv1d_fn_cpu",
                ("x", "weight", "bias", "conv_states", "query_start_loc", "cache_indices"),
            ),
            (
                "vllm._custom_ops",
                "causal_conv1d_update_cpu_vec",
                ("x", "conv_state", "weight", "bias", "activation", "conv_state_indices"),
            ),
            (
                "vllm._custom_ops",
                "selective_state_update_cpu",
                ("state", "x", "dt", "A", "B", "C", "D", "dt_bias", "state_batch_indices", "out"),
            ),
            (
                "vllm._custom_ops",
                "mamba_chunk_scan_fwd_cpu",
                ("out", "final_states", "x", "dt", "A", "B", "C", "D", "z", "cu_seqlens"),
            ),
        )
    ),
    Interface(f"{_MODELS}.utils", "PPMissingLayer", "the places of grouped layers"),
    Interface(f"{_MODELS}.utils", "maybe_prefix", "module names"),
    Interface(
        "vllm.model_executor.model_loader.default_loader",
        "DefaultModelLoader.Source",
        "the extra tensors of a checkpoint (`model.secondary_weights`)",
        ("model_or_path", "revision", "subfolder", "prefix", "allow_patterns_overrides"),
    ),
    Interface(f"{_LAYERS}.activation", "SiluAndMul", "a group's MLPs"),
    Interface(
        f"{_LAYERS}.layernorm",
        "RMSNorm.__init__",
        "norms whose weight moved into a projection",
        ("hidden_size", "eps", "has_weight"),
    ),
    Interface(
        f"{_LAYERS}.linear",
        "ReplicatedLinear.__init__",
        "projections of the members that a rank owns",
        ("input_size", "output_size", "bias", "prefix", "return_bias"),
    ),
    Interface(
        f"{_LAYERS}.linear",
        "MergedColumnParallelLinear.__init__",
        "projections of the members that a rank owns",
        ("input_size", "output_sizes", "bias", "prefix", "return_bias", "disable_tp"),
    ),
    Interface(f"{_LAYERS}.vocab_parallel_embedding", "ParallelLMHead", "the head"),
    Interface(
        f"{_LAYERS}.logits_processor",
        "LogitsProcessor.__init__",
        "the head",
        ("vocab_size", "scale"),
    ),
    Interface("vllm.distributed", "tensor_model_parallel_all_reduce", "a group's sum"),
    Interface("vllm.distributed", "tensor_model_parallel_all_gather", "the bypass across ranks"),
    Interface("vllm.distributed", "get_tensor_model_parallel_rank", "placing members"),
    Interface("vllm.distributed", "get_tensor_model_parallel_world_size", "placing members"),
    Interface(
        "vllm.compilation.decorators",
        "support_torch_compile",
        "compiling the trunk, or each segment",
        ("dynamic_arg_dims", "enable_if"),
    ),
    Interface("vllm.compilation.backends", "set_model_tag", "compiling each segment", ("tag",)),
    Interface("vllm.platforms", "current_platform.ray_device_key", "refusing Ray where it fails"),
    Interface("vllm.envs", "VLLM_USE_V2_MODEL_RUNNER", "`doctor`"),
    Interface("vllm.triton_utils", "HAS_TRITON", "`doctor`"),
    Interface("vllm", "ModelRegistry", "`doctor`"),
    Interface("vllm", "LLM", "calibration text, `eval`"),
    Interface("vllm", "SamplingParams", "calibration text, `eval`"),
    Interface("vllm.logger", "init_logger", "log lines under vLLM's settings", ("name",)),
    Interface(
        "vllm.v1.attention.backend",
        "subclass_attention_backend",
        "metadata that remembers the batch",
        ("name_prefix", "attention_backend_cls", "builder_cls"),
    ),
    Interface(
        "vllm.v1.attention.backend",
        "AttentionMetadataBuilder.build",
        "attention metadata of some rows",
        ("common_prefix_len", "common_attn_metadata", "fast_build"),
    ),
    Interface(
        "vllm.v1.attention.backend",
        "CommonAttentionMetadata",
        "attention metadata of some rows",
        (
            "query_start_loc",
            "query_start_loc_cpu",
            "seq_lens",
            "num_reqs",
            "num_actual_tokens",
            "max_query_len",
            "max_seq_len",
            "block_table_tensor",
            "slot_mapping",
            "positions",
            "is_prefilling",
            "seq_lens_cpu_upper_bound",
            "req_idx",
            "_num_computed_tokens_cache",
            "_token_to_req_indices_cache",
        ),
    ),
    Interface(
        "vllm.forward_context",
        "ForwardContext",
        "running layers on some rows",
        ("attn_metadata", "slot_mapping", "cudagraph_runtime_mode", "skip_compiled"),
    ),
    Interface("vllm.forward_context", "override_forward_context", "running layers on some rows"),
    Interface("vllm.forward_context", "get_forward_context", "the batch of a step"),
    Interface(
        "vllm.forward_context",
        "set_forward_context",
        "measuring costs, drafting",
        ("attn_metadata", "vllm_config", "num_tokens", "slot_mapping"),
    ),
    Interface(_CPU_WORKER, "CPUWorker.init_device", "drafting"),
    Interface(_CPU_WORKER, "CPUWorker.take_draft_token_ids", "drafting"),
    Interface("vllm.config", "VllmConfig.use_v2_model_runner", "one class per runner"),
    Interface("vllm.config", "ParallelConfig._api_process_rank", "who answers at /metrics"),
    Interface(
        "vllm.v1.worker.gpu.model_states.default",
        "DefaultModelState.add_request",
        "the rows of runner V2",
        ("req_index", "new_req_data"),
    ),
    Interface(
        "vllm.v1.worker.gpu.model_states.default",
        "DefaultModelState.remove_request",
        "the rows of runner V2",
        ("req_id",),
    ),
    Interface(
        "vllm.v1.worker.gpu.model_states.default",
        "DefaultModelState.preprocess_state",
        "the rows of runner V2",
        ("input_batch",),
    ),
    Interface(
        "vllm.v1.worker.gpu.model_states.default",
        "DefaultModelState.prepare_attn",
        "the rows of runner V2",
        ("input_batch",),
    ),
    Interface(
        "vllm.v1.worker.gpu.input_batch",
        "InputBatch",
        "the rows of runner V2",
        (
            "idx_mapping_np",
            "num_computed_tokens_np",
            "num_scheduled_tokens",
            "is_prefilling_np",
            "prefill_len_np",
        ),
    ),
    Interface("vllm.v1.core.sched.output", "NewRequestData", "the rows of runner V2", ("req_id",)),
    Interface(
        "vllm.v1.worker.gpu.model_states", "resolve_model_state_cls", "the rows of runner V2"
    ),
    Interface(
        "vllm.v1.worker.gpu.model_runner",
        "GPUModelRunner._dummy_run",
        "measuring costs",
        ("num_tokens", "context_len"),
    ),
    Interface(
        "vllm.v1.worker.gpu.sample.logits_processor.interface",
        "LogitsProcessor.validate_params",
        "HTTP 400 for bad parameters",
        ("sampling_params",),
    ),
    Interface(
        "vllm.v1.spec_decode.custom_class_proposer",
        "create_custom_proposer",
        "drafting",
        ("vllm_config",),
    ),
    Interface(
        "vllm.config",
        "SpeculativeConfig",
        "drafting",
        ("method", "model", "num_speculative_tokens"),
    ),
    Interface("vllm.v1.outputs", "SamplerOutput", "sampled requests beside drafts"),
    Interface(
        "vllm.v1.sample.metadata",
        "SamplingMetadata",
        "sampled requests beside drafts",
        ("temperature", "all_greedy", "top_k", "top_p"),
    ),
    Interface(
        "vllm.v1.spec_decode.metadata", "SpecDecodeMetadata", "sampled requests beside drafts"
    ),
    Interface(
        "vllm.v1.sample.rejection_sampler", "GREEDY_TEMPERATURE", "sampled requests beside drafts"
    ),
    Interface(
        "vllm.v1.sample.rejection_sampler",
        "RejectionSampler.forward",
        "sampled requests beside drafts",
        ("metadata", "draft_probs", "logits", "sampling_metadata"),
    ),
    Interface(
        "vllm.v1.sample.rejection_sampler",
        "RejectionSampler.apply_logits_processors",
        "sampled requests beside drafts",
        ("logits", "sampling_metadata", "metadata"),
    ),
    Interface(
        "vllm.v1.sample.ops.topk_topp_sampler",
        "apply_top_k_top_p",
        "sampled requests beside drafts",
        ("logits", "k", "p"),
    ),
    Interface("vllm.distributed", "get_tp_group", "one decision for all ranks"),
    Interface(_CPU_WORKER, "CPUWorker.load_model", "the rows of runner V1"),
    Interface(
        _CPU_WORKER,
        "CPUWorker.execute_model",
        "the rows of runner V1",
        ("scheduler_output",),
    ),
    Interface(_CPU_WORKER, "CPUWorker.compile_or_warm_up_model", "measuring costs"),
    Interface(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner._dummy_run",
        "measuring costs",
        ("num_tokens", "force_attention", "profile_seq_lens"),
    ),
    Interface("vllm.v1.worker.gpu_worker", "Worker.load_model", "the rows of runner V1"),
    Interface("vllm.config.compilation", "CUDAGraphMode.PIECEWISE", "graphs between exits"),
    Interface("vllm.config.compilation", "CUDAGraphMode.has_full_cudagraphs", "refusing them"),
    Interface(
        "vllm.config",
        "CompilationConfig",
        "graphs between exits",
        ("cudagraph_mode", "cudagraph_capture_sizes", "compile_ranges_endpoints"),
    ),
    Interface("vllm.forward_context", "BatchDescriptor", "graphs between exits", ("num_tokens",)),
    Interface("vllm.forward_context", "is_forward_context_available", "graphs between exits"),
    Interface(
        "vllm.v1.core.sched.output",
        "SchedulerOutput",
        "the end of requests",
        ("finished_req_ids", "preempted_req_ids"),
    ),
    Interface("vllm.v1.core.sched.scheduler", "Scheduler.add_request", "cache salts", ("request",)),
    Interface("vllm.v1.core.sched.async_scheduler", "AsyncScheduler", "cache salts"),
    Interface(
        "vllm.v1.core.sched.scheduler",
        "Scheduler.schedule",
        "which requests start, when steps wait",
    ),
    Interface(
        "vllm.v1.core.sched.scheduler",
        "Scheduler._free_request",
        "which requests start",
        ("request",),
    ),
    Interface(
        "vllm.v1.core.sched.scheduler",
        "Scheduler.update_from_output",
        "what a step takes",
        ("scheduler_output",),
    ),
    Interface("vllm.v1.request", "Request.update_block_hashes", "cache salts"),
    Interface(
        "vllm.v1.attention.backend",
        "AttentionBackend.get_builder_cls",
        "metadata that remembers the batch",
    ),
    Interface("vllm.sampling_params", "SamplingParams", "what a request asks for", ("extra_args",)),
    Interface("vllm.exceptions", "VLLMValidationError", "HTTP 400 for bad parameters"),
    Interface(
        "vllm.v1.sample.logits_processor.interface",
        "LogitsProcessor.validate_params",
        "HTTP 400 for bad parameters",
        ("sampling_params",),
    ),
    Interface("vllm.sequence", "IntermediateTensors", "the trunk's signature"),
    Interface(
        f"{_MODELS}.adapters", "as_seq_cls_model", "classifiers out of language models", ("cls",)
    ),
    Interface(
        f"{_MODELS}.bert",
        "BertPoolingModel.__init__",
        "BERT's trunk",
        ("vllm_config", "prefix", "embedding_class"),
    ),
    Interface(f"{_MODELS}.bert", "BertForSequenceClassification.load_weights", "BERT's classifier"),
    Interface(
        f"{_MODELS}.bert", "BertLayer.forward", "calling a layer of BERT", ("hidden_states",)
    ),
    Interface(
        f"{_MODELS}.bert",
        "BertEmbedding.forward",
        "what BERT's first layer reads",
        ("input_ids", "position_ids", "inputs_embeds"),
    ),
    Interface(
        f"{_MODELS}.interfaces_base",
        "default_pooling_type",
        "which token a classifier reads",
        ("seq_pooling_type",),
    ),
    Interface(
        f"{_LAYERS}.pooler.seqwise",
        "ClassifierPoolerHead.__init__",
        "answers of the exits",
        ("classifier", "logit_mean", "logit_sigma", "head_dtype", "activation"),
    ),
    Interface(
        f"{_LAYERS}.pooler.seqwise",
        "ClassifierPoolerHead.forward",
        "answers of the exits",
        ("pooled_data", "pooling_metadata"),
    ),
    Interface(
        f"{_LAYERS}.pooler",
        "DispatchPooler.for_seq_cls",
        "the pooler of a classifier",
        ("pooler_config", "pooling", "classifier"),
    ),
    Interface(
        f"{_LAYERS}.pooler",
        "DispatchPooler.__init__",
        "the pooler of a classifier",
        ("poolers_by_task",),
    ),
    Interface(
        f"{_LAYERS}.pooler.activations",
        "get_act_fn",
        "refusing classifiers without softmax",
        ("config", "static_num_labels"),
    ),
    Interface(
        f"{_LAYERS}.pooler.activations", "PoolerClassify", "refusing classifiers without softmax"
    ),
    *(
        Interface(
            "vllm.v1.worker.gpu.model_states.encoder_only",
            f"EncoderOnlyModelState.{method}",
            "the rows of runner V2",
            names,
        )
        for method, names in (
            ("prepare_attn", ("input_batch",)),
            ("preprocess_state", ("input_batch",)),
            ("add_request", ("req_index", "new_req_data")),
            ("remove_request", ("req_id",)),
        )
    ),
    Interface("vllm.v1.pool.metadata", "PoolingMetadata", "reports", ("pooling_params",)),
    *(
        Interface(
            module,
            "PoolingParams",
            "what a request asks for",
            ("extra_kwargs", "task", "use_activation"),
        )
        for module in ("vllm", "vllm.pooling_params")
    ),
    *(
        Interface("vllm.engine.protocol", name, "the cloud's route", names)
        for name, names in (("EngineClient", ()), ("StreamingInput", ("prompt", "sampling_params")))
    ),
    Interface(
        "vllm.v1.engine.async_llm",
        "AsyncLLM.generate",
        "sessions of the cloud",
        ("prompt", "sampling_params", "request_id"),
    ),
    Interface(
        "vllm.inputs.engine",
        "tokens_input",
        "sessions of the cloud",
        ("prompt_token_ids", "cache_salt"),
    ),
    Interface("vllm.sampling_params", "RequestOutputKind.DELTA", "sessions of the cloud"),
    Interface("vllm.tasks", "SupportedTask", "the cloud's route"),
    Interface(
        "vllm.plugins.endpoint_plugins.interface",
        "EndpointPlugin.init_state",
        "the cloud's route",
        ("engine_client", "state", "args"),
    ),
    Interface(
        "vllm.v1.core.sched.scheduler",
        "Scheduler._update_request_as_session",
        "hidden states in streaming input",
        ("session", "update"),
    ),
    Interface(
        "vllm.v1.core.sched.output",
        "SchedulerOutput",
        "hidden states in streaming input",
        ("scheduled_new_reqs", "finished_req_ids"),
    ),
    Interface(
        "vllm.v1.core.sched.output",
        "NewRequestData",
        "hidden states in streaming input",
        ("req_id", "prompt_embeds"),
    ),
    Interface(
        "vllm.v1.outputs",
        "ModelRunnerOutput",
        "tokens from elsewhere",
        ("req_ids", "req_id_to_index", "sampled_token_ids"),
    ),
    *(
        Interface(module, attribute, "vLLM's routes under Ray Serve", names)
        for module, attribute, names in (
            (f"{_LAUNCHERS}.app", "build_app", ("args", "supported_tasks", "model_config")),
            (
                f"{_LAUNCHERS}.api_server.app_state",
                "init_app_state",
                ("engine_client", "state", "args", "supported_tasks"),
            ),
            (f"{_LAUNCHERS}.cli_args", "make_arg_parser", ("parser",)),
            (f"{_LAUNCHERS}.cli_args", "validate_parsed_serve_args", ("args",)),
            (
                f"{_LAUNCHERS}.cli_args",
                "propagate_flash_late_interaction",
                ("args", "engine_args"),
            ),
            (f"{_LAUNCHERS}.launcher", "watchdog_loop", ("server", "engine")),
            ("vllm.tool_parsers", "ToolParserManager.import_tool_parser", ()),
            ("vllm.reasoning", "ReasoningParserManager.import_reasoning_parser", ()),
            ("vllm.entrypoints.serve.utils.api_utils", "cli_env_setup", ()),
            ("vllm.utils.argparse_utils", "FlexibleArgumentParser.error", ("message",)),
            ("vllm.engine.arg_utils", "AsyncEngineArgs.from_cli_args", ("args",)),
            ("vllm.engine.arg_utils", "AsyncEngineArgs.create_engine_config", ("usage_context",)),
            (
                "vllm.v1.engine.async_llm",
                "AsyncLLM.from_vllm_config",
                ("vllm_config", "usage_context", "stat_loggers", "disable_log_stats"),
            ),
            ("vllm.v1.engine.async_llm", "AsyncLLM.get_supported_tasks", ()),
            ("vllm.v1.engine.async_llm", "AsyncLLM.check_health", ()),
            ("vllm.v1.engine.async_llm", "AsyncLLM.reset_mm_cache", ()),
            ("vllm.v1.engine.async_llm", "AsyncLLM.shutdown", ("timeout",)),
            ("vllm.usage.usage_lib", "UsageContext.OPENAI_API_SERVER", ()),
        )
    ),
    Interface("vllm.v1.metrics.loggers", "StatLoggerFactory", "metrics under Ray Serve"),
    *(
        Interface("vllm.v1.metrics.ray_wrappers", name, "metrics under Ray Serve", names)
        for name, names in (
            ("RayPrometheusStatLogger", ()),
            ("RayCounterWrapper.__init__", ("name", "documentation", "labelnames")),
            ("RayGaugeWrapper.__init__", ("name", "documentation", "labelnames")),
        )
    ),
    Interface("vllm.renderers", "BaseRenderer", "requests with options"),
    Interface("vllm", "PoolingRequestOutput", "answers with options", ("outputs",)),
    Interface("vllm.config", "ModelConfig", "classifiers", ("io_processor_plugin",)),
    *(
        Interface("vllm.plugins.io_processors.interface", f"IOProcessor.{method}", used, names)
        for method, used, names in (
            ("parse_data", "HTTP 400 for bad options", ("data",)),
            ("pre_process", "requests with options", ("prompt", "request_id")),
            ("merge_pooling_params", "requests with options", ("params",)),
            ("post_process", "answers with options", ("model_output", "request_id")),
        )
    ),
)


def violations() -> Iterator[str]:
    """What the installed vLLM no longer offers, one line each."""
    for interface in CONTRACT:
        if problem := interface.violation():
            yield problem
