"""From a configuration to what the engine executes. Pure: no torch, no vLLM, no I/O."""

from vllm_effplugin.plan.plan import Boundary, Plan, Segment, Unit, build_plan

__all__ = ["Boundary", "Plan", "Segment", "Unit", "build_plan"]
