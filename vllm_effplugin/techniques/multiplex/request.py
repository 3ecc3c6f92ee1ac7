"""What a caller may ask of a multiplexing classifier, per request."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from vllm_effplugin.errors import ConfigError
from vllm_effplugin.techniques.multiplex.config import MultiplexConfig
from vllm_effplugin.techniques.wishes import parse_wishes

if TYPE_CHECKING:
    from vllm.pooling_params import PoolingParams

logger = logging.getLogger(f"vllm.{__name__}")  # below `vllm`, so that its log settings apply

SHARED = ""
"""The tenant of requests that name none."""


class MultiplexRequest(BaseModel):
    """Fields of `PoolingParams.extra_kwargs`, and of `data` in a request to `/pooling`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    mux: bool = Field(True, description="Whether the sequence may be merged with others.")
    mux_group: str | None = Field(
        None,
        min_length=1,
        max_length=256,
        description="With whom: sequences are merged with those that say the same. A tenant's "
        "name, or a hash of its key.",
    )
    mux_report: bool = Field(
        False,
        description="Append to the probabilities how many sequences ran as one, this included.",
    )

    def tenant(self, config: MultiplexConfig) -> str | None:
        """With whom the sequence merges; None with nobody."""
        if not self.mux:
            return None
        if self.mux_group is None:
            return SHARED if config.without_group == "shared" else None
        return self.mux_group


def parse_multiplex_request(extra: Mapping[str, Any] | None) -> MultiplexRequest:
    """Our fields among a request's extra arguments, which start with `mux`; defaults without.

    Raises:
        ConfigError: naming the field and what is wrong with it.
    """
    return parse_wishes(MultiplexRequest, "mux", extra)


def engine_request(extra: Mapping[str, Any] | None) -> MultiplexRequest:
    """The same where no error may be raised: what cannot be understood runs alone.

    Only programs that build their own `PoolingParams` get here with such.
    """
    try:
        return parse_multiplex_request(extra)
    except ConfigError as error:
        logger.error("a request's %s: it runs unmerged", error)
        return MultiplexRequest(mux=False)


def multiplex_pooling_params(
    *, mux: bool = True, mux_group: str | None = None, mux_report: bool = False
) -> PoolingParams:
    """Pooling parameters for `LLM.classify` with what a request asks.

    Raises:
        ConfigError: naming the field and what is wrong with it.
    """
    from vllm import PoolingParams

    asked = {"mux": mux, "mux_group": mux_group, "mux_report": mux_report}
    parse_multiplex_request(asked)
    return PoolingParams(extra_kwargs=asked)
