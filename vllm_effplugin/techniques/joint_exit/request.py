"""What a caller may ask of a classifier with exits, per request."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from vllm_effplugin.errors import ConfigError
from vllm_effplugin.techniques.wishes import parse_wishes

if TYPE_CHECKING:
    from vllm.pooling_params import PoolingParams

logger = logging.getLogger(f"vllm.{__name__}")  # below `vllm`, so that its log settings apply


class SequenceExitRequest(BaseModel):
    """Fields of `PoolingParams.extra_kwargs`, and of `data` in a request to `/pooling`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    exit: bool = Field(True, description="Whether the sequence may leave early.")
    exit_bias: float | None = Field(
        None,
        allow_inf_nan=False,
        description="Added to every gate before its sigmoid, instead of the checkpoint's own; "
        "above 0, the sequence leaves earlier.",
    )
    exit_report: bool = Field(
        False,
        description="Append to the probabilities the number of layers that ran, and whether the "
        "checkpoint's own rule decided.",
    )

    def bias(self, default: float) -> float:
        """What is added to the gates; minus infinity for a sequence that may not leave."""
        if not self.exit:
            return -math.inf
        return default if self.exit_bias is None else self.exit_bias


def parse_sequence_request(extra: Mapping[str, Any] | None) -> SequenceExitRequest:
    """Our fields among a request's extra arguments, which start with `exit`; defaults without.

    Raises:
        ConfigError: naming the field and what is wrong with it.
    """
    given = dict(extra or {})
    if isinstance(given.get("exit_bias"), int) and not isinstance(given["exit_bias"], bool):
        try:
            given["exit_bias"] = float(given["exit_bias"])
        except OverflowError:
            raise ConfigError("exit_bias: not a usable number") from None
    return parse_wishes(SequenceExitRequest, "exit", given)


def engine_request(extra: Mapping[str, Any] | None) -> SequenceExitRequest:
    """The same where no error may be raised: what cannot be understood gets the full model.

    Only programs that build their own `PoolingParams` get here with such; HTTP requests and
    `exit_pooling_params` are checked before.
    """
    try:
        return parse_sequence_request(extra)
    except ConfigError as error:
        logger.error("a request's %s: it runs the full model", error)
        return SequenceExitRequest(exit=False)


def as_prepared(extra: Mapping[str, Any]) -> bool:
    """Whether a request leaves it to the checkpoint when to leave."""
    return extra.get("exit", True) is True and extra.get("exit_bias") is None


def exit_pooling_params(
    *, exit: bool = True, exit_bias: float | None = None, exit_report: bool = False
) -> PoolingParams:
    """Pooling parameters for `LLM.classify` with what a request asks of the exits.

    Raises:
        ConfigError: naming the field and what is wrong with it.
    """
    from vllm import PoolingParams

    asked = {"exit": exit, "exit_bias": exit_bias, "exit_report": exit_report}
    parse_sequence_request(asked)
    return PoolingParams(extra_kwargs=asked)
