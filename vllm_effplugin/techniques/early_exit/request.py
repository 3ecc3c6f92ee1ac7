"""What a caller may ask of early exit, per request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_effplugin.errors import ConfigError
from vllm_effplugin.techniques.early_exit.config import NEVER, EarlyExitConfig


class ExitRequest(BaseModel):
    """Fields of `vllm_xargs` (HTTP) or `SamplingParams.extra_args` (offline)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    exit: bool | Literal["verify"] = Field(
        True,
        description="Whether tokens may leave early. Under `verify` those that would are drafts, "
        "which the full model checks before the caller sees them.",
    )
    exit_threshold: float | None = Field(
        None, ge=0, le=1, description="Confidence at which they do, instead of the checkpoint's."
    )
    exit_min_layer: int | None = Field(
        None, ge=0, description="Layers that every token has to run at least."
    )


def parse_exit_request(extra_args: Mapping[str, Any] | None) -> ExitRequest:
    """Our fields among a request's extra arguments, which start with `exit`; defaults without.

    HTTP clients may send booleans and numbers as strings, which is what `vllm_xargs` allows. Of
    JSON's booleans vLLM makes 0 and 1.

    Raises:
        ConfigError: naming the field and what is wrong with it.
    """
    given = {k: v for k, v in (extra_args or {}).items() if k.split("_")[0] == "exit"}
    wish = given.get("exit")
    if wish in ("true", "false"):
        given["exit"] = wish == "true"
    elif isinstance(wish, int) and wish in (0, 1):
        given["exit"] = bool(wish)
    for name, convert in (("exit_threshold", float), ("exit_min_layer", int)):
        value = given.get(name)
        if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
            try:
                given[name] = convert(value)
            except (ValueError, OverflowError):
                raise ConfigError(f"{name}: not a usable number") from None
    try:
        return ExitRequest.model_validate(given)
    except ValidationError as error:
        problems = "; ".join(f"{item['loc'][0]}: {item['msg']}" for item in error.errors())
        raise ConfigError(problems) from None


def thresholds(config: EarlyExitConfig, request: ExitRequest) -> list[float]:
    """The confidence at which a request's tokens leave, for each exit."""
    if request.exit is not True:
        return [NEVER] * len(config.exits)
    return _wanted(config, request)


def draft_thresholds(config: EarlyExitConfig, request: ExitRequest) -> list[float]:
    """The confidence at which a request's tokens are drafted, for each exit."""
    if request.exit != "verify":
        return [NEVER] * len(config.exits)
    return _wanted(config, request)


def _wanted(config: EarlyExitConfig, request: ExitRequest) -> list[float]:
    least = request.exit_min_layer or 0
    wanted = request.exit_threshold
    return [
        NEVER if point.depth < least else point.threshold if wanted is None else wanted
        for point in config.exits
    ]


def cache_policy(config: EarlyExitConfig, extra_args: Mapping[str, Any] | None) -> str | None:
    """What a request's cache entries have to be told from others by; None where by nothing.

    Approximate ones differ by policy and thresholds. Where exits have layers or states of their
    own, requests that use none leave those without entries.
    """
    request = parse_exit_request(extra_args)
    leave, draft = thresholds(config, request), draft_thresholds(config, request)
    leaves = any(threshold < NEVER for threshold in leave)
    if leaves and config.cache != "recompute":
        return f"early_exit:{config.cache}:{','.join(map(str, leave))}"
    if config.sees_all_tokens and (leaves or any(threshold < NEVER for threshold in draft)):
        return "early_exit:blocks"
    return None
