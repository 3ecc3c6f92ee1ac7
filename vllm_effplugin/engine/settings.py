"""What a model's configuration asks of the engine, and vLLM's settings that follow from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_effplugin.config import EfficiencyConfig, parse_efficiency
from vllm_effplugin.plan import Plan, build_plan

if TYPE_CHECKING:
    from vllm.config import VllmConfig

EXIT_PARAMS = "vllm_effplugin.engine.params:ExitParamsV1"
VERIFYING_EXIT_PARAMS = "vllm_effplugin.engine.params:VerifyingExitParamsV1"
EXIT_PARAMS_V2 = "vllm_effplugin.engine.params_v2:ExitParamsV2"
SCHEDULER = "vllm_effplugin.engine.schedulers.effplugin_scheduler"
WORKERS = {
    "cpu": "vllm_effplugin.engine.cpu_worker.EffpluginCPUWorker",
    "cuda": "vllm_effplugin.engine.worker.EffpluginWorker",
}
CLOUD_WORKERS = {
    "cpu": "vllm_effplugin.engine.cpu_worker.CloudCPUWorker",
    "cuda": "vllm_effplugin.engine.worker.CloudWorker",
}
CLOUD_PARAMS = "vllm_effplugin.engine.params:CloudParamsV1"
EDGE_PARAMS = {
    mode: f"vllm_effplugin.engine.params:{mode.capitalize()}EdgeParamsV1"
    for mode in ("standalone", "collaborative", "cloud")
}
ANSWERS = "effplugin_answers"
"""Attribute of a step's output: for requests that were parked the token that they go on with, and
where it is from; without a token for those that should have been, and were not.
"""

CLOUD_URL, CLOUD_KEY = "EFFPLUGIN_CLOUD_URL", "EFFPLUGIN_CLOUD_API_KEY"
"""Environment variables of an edge: where its cloud is, and the key that opens it."""

STATES = "effplugin_states"
"""Extra argument that carries hidden states, fp32 as bytes, to the cloud of a split model."""

IO_PROCESSOR = "effplugin"
"""Our name in the group `vllm.io_processor_plugins`."""

UNTESTED = "EFFPLUGIN_UNTESTED"
"""Environment variable that admits what was built and is not good enough: exits on some GPUs."""

VERIFY = {
    "method": "custom_class",
    "model": "vllm_effplugin.engine.v1_drafter.ExitProposer",
    "num_speculative_tokens": 4,
}
"""`--speculative-config` of a server that verifies early exits; the number is free."""


def why_not_on_a_gpu(technique: str, *, v2: bool) -> str:
    """Why a technique that changes rows inside the model is there on demand only; "" if it is not.

    Args:
        technique: name of its section in the efficiency block.
        v2: whether vLLM's model runner V2 runs it.
    """
    if technique == "joint_exit":
        return "" if v2 else "runner V1 has not run it there"
    return {
        "early_exit": "it makes decoding slower there",
        "multiplex": "merging has not run there",
    }[technique]


def efficiency_of(hf_config: Any) -> EfficiencyConfig:
    """The validated `efficiency` block of a Hugging Face configuration; empty without one."""
    return parse_efficiency(getattr(hf_config, "efficiency", None))


def plan_for(hf_config: Any) -> Plan:
    """The plan of a Hugging Face configuration with (or without) an `efficiency` block."""
    return build_plan(efficiency_of(hf_config), hf_config.num_hidden_layers)


def verifies(vllm_config: VllmConfig) -> bool:
    """Whether the server verifies early exits."""
    speculative = vllm_config.speculative_config
    return speculative is not None and speculative.model == VERIFY["model"]
