"""Checks of per-request parameters where a request arrives, so that a bad one gets HTTP 400.

vLLM asks the classes named in `logits_processors` to validate a request's parameters before it is
admitted. These do nothing else. Each runner has an interface of its own (`params_v2.py`).
"""

from __future__ import annotations

import json
import os
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as V1LogitsProcessor

from vllm_effplugin.engine.settings import CLOUD_URL, STATES, VERIFY
from vllm_effplugin.errors import ConfigError
from vllm_effplugin.techniques.early_exit.request import parse_exit_request
from vllm_effplugin.techniques.edge_cloud.config import EdgeConfig
from vllm_effplugin.techniques.edge_cloud.request import check_sampling, requested_mode


def validate_exit_params(params: SamplingParams, *, verify: bool) -> None:
    """Check what a request asks of early exit.

    Args:
        verify: whether the server can verify drafts.

    Raises:
        VLLMValidationError: naming the parameter.
    """
    try:
        request = parse_exit_request(params.extra_args)
        if request.exit == "verify" and not verify:
            raise ConfigError(
                'exit: "verify" needs a server started with --speculative-config '
                f"'{json.dumps(VERIFY)}'"
            )
    except ConfigError as error:
        raise VLLMValidationError(str(error)) from None


class ExitParamsV1(V1LogitsProcessor):
    """Early exit's parameters, for runner V1."""

    verify = False

    def __init__(self, *_: Any) -> None:
        pass

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        validate_exit_params(sampling_params, verify=cls.verify)

    def apply(self, logits: Any) -> Any:
        return logits

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        pass


class StandaloneEdgeParamsV1(ExitParamsV1):
    """An edge's, by the mode of the server."""

    config = EdgeConfig(role="edge", model="any", layers=2, mode="standalone")

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        super().validate_params(sampling_params)
        try:
            mode = requested_mode(cls.config, sampling_params.extra_args)
            check_sampling(sampling_params, mode)
            if mode != "standalone" and not os.environ.get(CLOUD_URL):
                raise ConfigError(f"cloud_mode: {mode!r} needs a server with {CLOUD_URL} set")
        except ConfigError as error:
            raise VLLMValidationError(str(error)) from None


class CollaborativeEdgeParamsV1(StandaloneEdgeParamsV1):
    config = EdgeConfig(role="edge", model="any", layers=2, mode="collaborative")


class CloudEdgeParamsV1(StandaloneEdgeParamsV1):
    config = EdgeConfig(role="edge", model="any", layers=2, mode="cloud")


class CloudParamsV1(ExitParamsV1):
    """The cloud of a split model takes hidden states from its own route, and nothing else."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        if not isinstance((sampling_params.extra_args or {}).get(STATES), bytes):
            raise VLLMValidationError(
                "this is the upper part of a split model, which reads hidden states and no text: "
                "ask its edge"
            )


class VerifyingExitParamsV1(ExitParamsV1):
    """The same where drafts can be verified."""

    verify = True
