"""Which part of a split model a checkpoint is."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from vllm_effplugin.techniques.edge_cloud.contexts import Limits

Mode = Literal["standalone", "collaborative", "cloud"]
Transport = Literal["fp32", "fp16", "int8"]


class CloudConfig(BaseModel):
    """The upper layers of a model, fed with hidden states (CE-CoLLM, arXiv 2411.02829)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Literal["cloud"]
    model: str = Field(
        min_length=1,
        max_length=128,
        description="Names the unsplit model's weights: an edge of another one is turned away.",
    )
    partition: int = Field(ge=1, description="Layers of the unsplit model that the edge runs.")
    limits: Limits = Field(default_factory=Limits, description="What clients may take.")
    gather_ms: float = Field(
        2.0, ge=0, le=100, description="A step waits until so long after the last question."
    )


class EdgeConfig(BaseModel):
    """The lower layers. The last exit of `early_exit` lies behind them all: where its gate is not
    sure, the token is the cloud's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Literal["edge"]
    model: str = Field(min_length=1, max_length=128, description="Names the unsplit model.")
    layers: int = Field(ge=2, description="Of the unsplit model.")
    mode: Mode = Field(
        "collaborative",
        description="`standalone` never asks the cloud, `collaborative` where no exit is sure, "
        "`cloud` for every token. A request may choose another one.",
    )
    transport: Transport = Field("fp16", description="Of hidden states on their way up.")
    deadline_s: float = Field(
        1.0, gt=0, description="For a token of the cloud; the edge takes its own when it is over."
    )
    gather_ms: float = Field(
        50.0,
        ge=0,
        le=1000,
        description="Longest time that less than a third of the requests wait for those which are "
        "at the cloud, to share a step with them.",
    )


SplitConfig = Annotated[CloudConfig | EdgeConfig, Field(discriminator="role")]
