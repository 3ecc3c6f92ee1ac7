"""Where tokens may leave the stack, who decides, and what the skipped layers owe the cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm_effplugin.errors import ConfigError
from vllm_effplugin.techniques.early_exit.shapes import CONVOLUTION, HEAD_SIZE, gate_shape

NEVER = 1.0
"""The threshold at which no token leaves."""

TRAINED_GATES = ("linear", "mlp", "mamba")

POLICIES: dict[str, tuple[str, ...]] = {
    "attention": ("recompute", "propagate", "copy"),
    "state-space": ("recompute", "freeze", "state-only"),
}
"""What the skipped layers of a kind may owe the cache."""


class ExitPoint(BaseModel):
    """One point between two layers where tokens may leave."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    depth: int = Field(ge=1, description="Layers that a token has run when it may leave here.")
    gate: Literal["linear", "mlp", "mamba", "softmax", "rate"] = Field(
        "softmax",
        description="What gives the confidence of a token. `linear` and `mlp` are trained on the "
        "hidden state, `mamba` on those of the tokens before as well, of which it keeps a state; "
        "`softmax` is the probability of the exit's own token, which costs one "
        "run of the language model head. `rate` lets a pseudo-random share leave, whatever the "
        "token: for measurements.",
    )
    threshold: float = Field(
        NEVER,
        ge=0,
        le=1,
        description="A token leaves when its confidence reaches this; at 1 none does. Under "
        "`rate`, the share of tokens that stays.",
    )
    adapter: Literal["none", "linear", "block"] = Field(
        "none",
        description="What runs between the exit's hidden state and the final norm. `linear`: a "
        "matrix, for tokens that leave. `block`: one more layer of the model (Balcony), with a KV "
        "cache of its own, for every token of requests that may leave somewhere.",
    )

    @property
    def has_tensors(self) -> bool:
        """Whether anything of the exit is trained."""
        return self.gate in TRAINED_GATES or self.adapter != "none"

    def tensors(
        self, hidden_size: int, gate_width: int, layer: Mapping[str, tuple[int, ...]]
    ) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the exit's trained tensors, without a prefix.

        Args:
            layer: names and shapes of the tensors of one of the model's layers.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        if self.gate == "linear":
            shapes.update(_linear("gate.layers.0", hidden_size, 1))
        elif self.gate == "mlp":
            shapes.update(_linear("gate.layers.0", hidden_size, gate_width))
            shapes.update(_linear("gate.layers.2", gate_width, 1))
        elif self.gate == "mamba":
            shape = gate_shape(gate_width)
            shapes.update(_linear("gate.reduce", hidden_size, gate_width))
            shapes["gate.project.weight"] = (shape.inner + shape.channels + shape.heads, gate_width)
            shapes["gate.conv_weight"] = (shape.channels, CONVOLUTION)
            shapes["gate.conv_bias"] = (shape.channels,)
            shapes.update({f"gate.{name}": (shape.heads,) for name in ("log_a", "D", "dt_bias")})
            shapes["gate.norm_weight"] = (shape.inner,)
            shapes.update(_linear("gate.logit", gate_width + shape.inner, 1))
        if self.adapter == "linear":
            shapes["adapter.correction.weight"] = (hidden_size, hidden_size)
        elif self.adapter == "block":
            shapes.update({f"adapter.{name}": shape for name, shape in layer.items()})
        return shapes


def _linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


class EarlyExitConfig(BaseModel):
    """Exits from shallow to deep."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    exits: tuple[ExitPoint, ...] = Field((), description="The exits.")
    cache: Literal["recompute", "propagate", "copy", "freeze", "state-only"] = Field(
        "recompute",
        description="What the layers that a token skipped owe the cache. `recompute`: they "
        "run later, together with the request's next token that goes deeper; exact. `propagate`: "
        "their keys and values are taken from the exit's hidden state. `copy`: from the last "
        "layer that ran. Of state-space layers, `freeze`: nothing, their states stay as they "
        "were; `state-only`: the states take in the exit's hidden state.",
    )
    max_pending: int = Field(
        16,
        ge=1,
        description="Most tokens of a request that left and whose debts to the cache wait: to run "
        "the skipped layers (`recompute`), or to have their approximate entries written together.",
    )
    compaction: Literal["auto", "always"] = Field(
        "auto",
        description="`auto`: tokens leave the batch where that saves time, by costs measured at "
        "start-up. `always`: wherever they may. Under `recompute` the tokens generated are the "
        "same. Under the other policies a token that might have left, but ran on, has exact "
        "cache entries: with `auto`, what a request generates may depend on the others.",
    )
    shadow: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the tokens that leave which run all layers nevertheless, to see "
        "whether their exit agrees with the full model. The tokens generated are the same.",
    )
    gate_width: int = Field(
        64,
        ge=1,
        description="Hidden units of `mlp` gates; channels of `mamba` gates, a multiple of 16.",
    )

    @model_validator(mode="after")
    def _sorted(self) -> EarlyExitConfig:
        depths = [point.depth for point in self.exits]
        if depths != sorted(set(depths)):
            raise ValueError(f"`exits` must have increasing depths, got {depths}")
        if self.has_states and self.gate_width % (HEAD_SIZE // 2):
            raise ValueError(
                f"`gate_width` of `mamba` gates must be a multiple of {HEAD_SIZE // 2}, got "
                f"{self.gate_width}"
            )
        return self

    @property
    def has_tensors(self) -> bool:
        """Whether anything of the exits is trained."""
        return any(point.has_tensors for point in self.exits)

    @property
    def has_blocks(self) -> bool:
        """Whether an exit has a layer of its own."""
        return any(point.adapter == "block" for point in self.exits)

    @property
    def has_states(self) -> bool:
        """Whether a gate keeps a state."""
        return any(point.gate == "mamba" for point in self.exits)

    @property
    def sees_all_tokens(self) -> bool:
        """Whether something of an exit has to run on every token of requests that may leave."""
        return self.has_blocks or self.has_states

    @property
    def written_together(self) -> int:
        """Tokens of a request whose approximate entries may be written together."""
        return self.max_pending if self.cache in ("propagate", "copy") else 1

    def tensors(
        self, hidden_size: int, layer: Mapping[str, tuple[int, ...]]
    ) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all trained tensors of the exits, as in a checkpoint.

        Args:
            layer: names and shapes of the tensors of one of the model's layers.
        """
        return {
            f"model.exits.{index}.{name}": shape
            for index, point in enumerate(self.exits)
            for name, shape in point.tensors(hidden_size, self.gate_width, layer).items()
        }

    def check_depths(self, num_layers: int, *, at_end: bool = False) -> None:
        """Raise ConfigError unless every exit lies inside a model of `num_layers` layers.

        Args:
            at_end: whether the last may lie behind all of them.
        """
        if self.exits and self.exits[-1].depth >= num_layers + at_end:
            raise ConfigError(
                f"efficiency.early_exit: an exit at depth {self.exits[-1].depth} is not inside "
                f"the model, which has {num_layers} layers"
            )
