"""The checks of `params.py`, for runner V2."""

from __future__ import annotations

from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor

from vllm_effplugin.engine.params import validate_exit_params


class ExitParamsV2(LogitsProcessor):
    """Early exit's parameters."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        validate_exit_params(sampling_params, verify=False)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        return False

    def apply(self, logits: Any, ctx: Any) -> Any:
        return logits
