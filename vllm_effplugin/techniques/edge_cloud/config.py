"""Which part of a split model a checkpoint is."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from vllm_effplugin.techniques.edge_cloud.contexts import Limits


class CloudConfig(BaseModel):
    """The upper layers of a model, fed with hidden states (CE-CoLLM, arXiv 2411.02829)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Literal["cloud"] = "cloud"
    model: str = Field(
        min_length=1,
        max_length=128,
        description="Names the unsplit model's weights: an edge of another one is turned away.",
    )
    partition: int = Field(ge=1, description="Layers of the unsplit model that the edge runs.")
    limits: Limits = Field(default_factory=Limits, description="What clients may take.")
