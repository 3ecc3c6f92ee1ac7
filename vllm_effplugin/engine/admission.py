"""What runs while vLLM builds its configuration: checks, and the settings that techniques need."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.model_executor.models.config import MambaModelConfig, VerifyAndUpdateConfig
from vllm.platforms import current_platform

from vllm_effplugin.config.checkpoint import check_extra_tensors
from vllm_effplugin.engine import refusals
from vllm_effplugin.engine.metrics import Reporter, serves, watch
from vllm_effplugin.engine.sequence_totals import sequence_reporter
from vllm_effplugin.engine.settings import (
    CLOUD_PARAMS,
    CLOUD_WORKERS,
    EDGE_PARAMS,
    EXIT_PARAMS,
    EXIT_PARAMS_V2,
    IO_PROCESSOR,
    SCHEDULER,
    VERIFYING_EXIT_PARAMS,
    WORKERS,
    efficiency_of,
    plan_for,
    verifies,
)
from vllm_effplugin.techniques.early_exit.totals import ExitReporter
from vllm_effplugin.techniques.edge_cloud.config import CloudConfig, EdgeConfig
from vllm_effplugin.techniques.edge_cloud.totals import CloudReporter, EdgeReporter, LinkReporter
from vllm_effplugin.techniques.multiplex.totals import QueueReporter

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = init_logger(f"vllm.{__name__}")  # below `vllm`, so that vLLM's log settings apply


class EfficiencyAdmission(VerifyAndUpdateConfig):
    """Checks that run while vLLM builds its configuration, before any process is started."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Check the `efficiency` block, and a local checkpoint's extra tensors.

        Raises:
            ConfigError, CheckpointError: naming the field or the tensor.
            UnsupportedError: a technique's section on a model that it is not for.
        """
        efficiency = efficiency_of(model_config.hf_config)
        efficiency.validate_for(model_config.hf_config.num_hidden_layers)
        efficiency.check_kind(model_config.hf_config.architectures[0])
        refusals.on_wrong_model(model_config.hf_config)
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
        efficiency = efficiency_of(vllm_config.model_config.hf_config)
        refusals.anywhere(vllm_config, plan)
        if efficiency.techniques:
            serves(vllm_config, efficiency, plan)
        if plan.groups:
            refusals.with_groups(vllm_config, plan)
        if plan.has_exits:
            assert efficiency.early_exit is not None
            refusals.with_exits(vllm_config, plan)
            _bring_loop(
                vllm_config,
                ExitReporter([boundary.after + 1 for boundary in plan.boundaries]),
            )
            params = VERIFYING_EXIT_PARAMS if verifies(vllm_config) else EXIT_PARAMS
            if isinstance(efficiency.edge_cloud, EdgeConfig):
                refusals.on_an_edge(vllm_config, efficiency.edge_cloud.mode)
                # What a step gives decides who takes part in the next one.
                vllm_config.scheduler_config.async_scheduling = False
                params = EDGE_PARAMS[efficiency.edge_cloud.mode]
                watch(vllm_config, EdgeReporter(), "scheduler")
                watch(vllm_config, LinkReporter(), "link")
            _check_parameters(
                vllm_config, EXIT_PARAMS_V2 if vllm_config.use_v2_model_runner else params
            )
        if isinstance(efficiency.edge_cloud, CloudConfig):
            refusals.with_streamed_states(vllm_config)
            vllm_config.model_config.enable_prompt_embeds = True
            vllm_config.scheduler_config.scheduler_cls = SCHEDULER
            vllm_config.parallel_config.worker_cls = CLOUD_WORKERS[current_platform.device_type]
            _check_parameters(vllm_config, CLOUD_PARAMS)
            watch(vllm_config, CloudReporter(), "cloud")
        if plan.has_sequences:
            refusals.with_sequences(vllm_config)
            _bring_loop(vllm_config, sequence_reporter(efficiency, len(plan.unit_of)))
            if efficiency.multiplex is not None:
                watch(vllm_config, QueueReporter(), "scheduler")
            if vllm_config.model_config.io_processor_plugin is None:
                vllm_config.model_config.io_processor_plugin = IO_PROCESSOR
        if not plan.is_trivial:
            logger.info("%d layers in %d steps: %s", len(plan.unit_of), plan.depth, plan.describe())


class StateSpaceAdmission(EfficiencyAdmission, MambaModelConfig):
    """The same for a model with recurrent states, after what vLLM itself settles for one."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        MambaModelConfig.verify_and_update_config(vllm_config)
        if plan_for(vllm_config.model_config.hf_config).has_exits:
            refusals.with_skipped_states(vllm_config)
        EfficiencyAdmission.verify_and_update_config(vllm_config)


def _bring_loop(vllm_config: VllmConfig, reporter: Reporter) -> None:
    """What a model needs whose rows change on the way."""
    vllm_config.parallel_config.worker_cls = WORKERS[current_platform.device_type]
    vllm_config.scheduler_config.scheduler_cls = SCHEDULER
    watch(vllm_config, reporter, "worker")


def _check_parameters(vllm_config: VllmConfig, params: str) -> None:
    """Have requests' parameters checked by a class where they arrive."""
    processors = vllm_config.model_config.logits_processors or []
    if params not in processors:
        vllm_config.model_config.logits_processors = [*processors, params]
