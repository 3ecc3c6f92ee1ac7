"""What a caller may ask of an edge, per request."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_effplugin.errors import ConfigError
from vllm_effplugin.techniques.edge_cloud.config import EdgeConfig, Mode

NAME = "cloud_mode"


class EdgeRequest(BaseModel):
    """Fields of `vllm_xargs` (HTTP) or `SamplingParams.extra_args` (offline)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    cloud_mode: Mode | None = Field(None, description="Instead of the server's mode.")


def requested_mode(config: EdgeConfig, extra_args: Mapping[str, Any] | None) -> Mode:
    """The mode of a request.

    Raises:
        ConfigError: naming the field and what is wrong with it.
    """
    given = {k: v for k, v in (extra_args or {}).items() if k.split("_")[0] == "cloud"}
    try:
        return EdgeRequest.model_validate(given).cloud_mode or config.mode
    except ValidationError as error:
        problems = "; ".join(f"{item['loc'][0]}: {item['msg']}" for item in error.errors())
        raise ConfigError(problems) from None


# What a cloud cannot draw a token with, or say of one. vLLM's name of each, and its neutral value
# besides None and nothing at all.
_EDGE_ONLY: Mapping[str, Any] = {
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_tokens": 0,
    "logprobs": None,
    "logprob_token_ids": None,
    "prompt_logprobs": None,
    "logit_bias": None,
    "allowed_token_ids": None,
    "bad_words": None,
    "structured_outputs": None,
    "thinking_token_budget": None,
    "trace_decode_token_ids": None,
}
SAMPLED_BY = ("temperature", "top_p", "top_k", "min_p", "seed")
"""What a cloud draws a token with."""


def check_sampling(params: Any, mode: Mode) -> None:
    """Refuse what only the edge could heed.

    Args:
        params: vLLM's sampling parameters.

    Raises:
        ConfigError: naming the parameter.
    """
    if mode == "standalone":
        return
    for name, neutral in _EDGE_ONLY.items():
        # `logprobs` is 0 where those of the tokens themselves are wanted.
        if getattr(params, name, neutral) not in (neutral, None, [], {}):
            raise ConfigError(
                f"{name} is not supported where the cloud may give tokens: leave it out, or ask "
                f'for "{NAME}": "standalone"'
            )


def sampling_for_the_cloud(params: Any) -> dict[str, Any]:
    """What the ASKs of a request say of how tokens are drawn; empty for the most likely ones."""
    if params.temperature == 0:
        return {}
    found = {name: getattr(params, name) for name in SAMPLED_BY}
    return {name: value for name, value in found.items() if value is not None and value != -1}


def drawn_at(sampling: Mapping[str, Any], position: int) -> dict[str, Any]:
    """What the ASK for the token behind a position says.

    The cloud starts a generator for each token. With the request's seed alone it would draw the
    same numbers for all of them.
    """
    seed = sampling.get("seed")
    if seed is None:
        return dict(sampling)
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return {**sampling, "seed": int.from_bytes(digest) >> 1}
