"""Where whole sequences may leave a classifier, and by what rule."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm_effplugin.errors import ConfigError

MEASURES = 4
"""Numbers that a gate sees of a head's softmax."""

NEVER = 1.0
"""The threshold at which no sequence leaves."""

HEADS = "exit_heads"
"""The module that holds them, in the engine and in names of a checkpoint's tensors."""


class SequenceExit(BaseModel):
    """One point between two layers where sequences may leave, with a head of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    depth: int = Field(ge=1, description="Layers that a sequence has run when it may leave here.")
    threshold: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Under the rule `confidence`: a sequence leaves when its most likely class "
        "has this probability; at 1, none does.",
    )
    temperature: float = Field(
        1.0,
        gt=0,
        description="What divides the logits of sequences that leave here, so that probabilities "
        "are what they say. It does not decide who leaves.",
    )


class ConformalLevel(BaseModel):
    """Prediction sets that hold the true class with a stated probability."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    coverage: float = Field(gt=0, lt=1, description="That probability.")
    thresholds: tuple[float, ...] = Field(
        description="Per exit, and for the full model, the probability that puts a class into the "
        "set."
    )


class JointExitConfig(BaseModel):
    """Exits of a classifier from shallow to deep (JEI-DNN, arXiv 2310.09163)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    exits: tuple[SequenceExit, ...] = Field(min_length=1, description="The exits.")
    rule: Literal["joint", "confidence"] = Field(
        "joint",
        description="Who decides. `joint`: gates that were learnt together with the heads. "
        "`confidence`: a threshold on the probability of an exit's most likely class; at 0, every "
        "sequence leaves at the first exit.",
    )
    bias: float = Field(
        0.0,
        description="Added to every gate before its sigmoid; above 0, sequences leave earlier. A "
        "request may state its own (`exit_bias`).",
    )
    conformal: tuple[ConformalLevel, ...] = Field(
        (), description="Prediction sets that are served next to the probabilities."
    )

    @model_validator(mode="after")
    def _consistent(self) -> JointExitConfig:
        depths = [point.depth for point in self.exits]
        if depths != sorted(set(depths)):
            raise ValueError(f"`exits` must have increasing depths, got {depths}")
        for level in self.conformal:
            if len(level.thresholds) != len(depths) + 1:
                raise ValueError(
                    f"`conformal` at {level.coverage:g} needs {len(depths) + 1} thresholds, one "
                    f"per exit and one for the full model, got {len(level.thresholds)}"
                )
        return self

    @property
    def depths(self) -> tuple[int, ...]:
        """Layers before each exit."""
        return tuple(point.depth for point in self.exits)

    def tensors(self, hidden_size: int, classes: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the exits' trained tensors, as in a checkpoint."""
        heads = len(self.exits)
        shapes: dict[str, tuple[int, ...]] = {
            f"{HEADS}.weight": (heads, classes, hidden_size),
            f"{HEADS}.bias": (heads, classes),
        }
        if self.rule == "joint":
            shapes[f"{HEADS}.gate_weight"] = (heads, MEASURES)
            shapes[f"{HEADS}.gate_bias"] = (heads,)
        return shapes

    def check_depths(self, num_layers: int) -> None:
        """Raise ConfigError unless every exit lies inside a model of `num_layers` layers."""
        if self.exits[-1].depth >= num_layers:
            raise ConfigError(
                f"efficiency.joint_exit: an exit at depth {self.exits[-1].depth} is not inside the "
                f"model, which has {num_layers} layers"
            )
