"""The `efficiency` block: one optional section per technique."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_effplugin.errors import ConfigError
from vllm_effplugin.techniques.early_exit.config import POLICIES, EarlyExitConfig
from vllm_effplugin.techniques.edge_cloud.config import EdgeConfig, SplitConfig
from vllm_effplugin.techniques.joint_exit.config import JointExitConfig
from vllm_effplugin.techniques.layer_parallel.config import LayerParallelConfig
from vllm_effplugin.techniques.multiplex.config import MultiplexConfig

LANGUAGE_MODELS: dict[str, str] = {
    "LlamaForCausalLM": "EfficientLlamaForCausalLM",
    "MistralForCausalLM": "EfficientMistralForCausalLM",
    "Qwen2ForCausalLM": "EfficientQwen2ForCausalLM",
    "Qwen3ForCausalLM": "EfficientQwen3ForCausalLM",
}
STATE_SPACE_MODELS: dict[str, str] = {"Mamba2ForCausalLM": "EfficientMamba2ForCausalLM"}
CLASSIFIERS: dict[str, str] = {
    "LlamaForSequenceClassification": "EfficientLlamaForSequenceClassification",
    "MistralForSequenceClassification": "EfficientMistralForSequenceClassification",
    "Qwen2ForSequenceClassification": "EfficientQwen2ForSequenceClassification",
    "Qwen3ForSequenceClassification": "EfficientQwen3ForSequenceClassification",
    "BertForSequenceClassification": "EfficientBertForSequenceClassification",
}
ARCHITECTURES = LANGUAGE_MODELS | STATE_SPACE_MODELS | CLASSIFIERS
"""Stock architecture name -> ours, as written to `architectures` in `config.json`."""


class EfficiencyConfig(BaseModel):
    """What an efficient checkpoint does differently from its base model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = Field(1, description="Version of this block's layout.")
    layer_parallel: LayerParallelConfig | None = Field(
        None, description="Adjacent layers that run concurrently (CQIL)."
    )
    early_exit: EarlyExitConfig | None = Field(
        None, description="Points where tokens may leave the stack (DYNAMAX)."
    )
    joint_exit: JointExitConfig | None = Field(
        None, description="Points where whole sequences may leave a classifier (JEI-DNN)."
    )
    multiplex: MultiplexConfig | None = Field(
        None, description="Sequences that a classifier merges (RevMUX)."
    )
    edge_cloud: SplitConfig | None = Field(
        None, description="The part of a split model that this is (CE-CoLLM)."
    )
    split_after: tuple[int, ...] = Field(
        (),
        description="Compile the stack in segments that end after these layers. Computes the "
        "same; measures what segmentation costs.",
    )

    @property
    def techniques(self) -> tuple[str, ...]:
        """Names of the sections that are there."""
        names = ("layer_parallel", "early_exit", "joint_exit", "multiplex", "edge_cloud")
        return tuple(name for name in names if getattr(self, name) is not None)

    @property
    def has_tensors(self) -> bool:
        """Whether there has to be a file of extra tensors."""
        trained = self.layer_parallel is not None and self.layer_parallel.trained
        exits = self.early_exit is not None and self.early_exit.has_tensors
        return trained or exits or self.joint_exit is not None or self.multiplex is not None

    def validate_for(self, num_layers: int) -> None:
        """Check what depends on the model: layer indices lie inside it.

        Args:
            num_layers: `num_hidden_layers` of the base model.

        Raises:
            ConfigError: naming the field and the value.
        """
        if self.layer_parallel is not None:
            self.layer_parallel.resolve_groups(num_layers)
        if self.early_exit is not None:
            self.early_exit.check_depths(num_layers, at_end=self.is_edge)
            if self.split_after and self.early_exit.exits:
                raise ConfigError("efficiency.split_after has no meaning with exits; leave it out")
            if self.layer_parallel is not None:
                self._check_parallel_exits(self.early_exit)
        if self.joint_exit is not None:
            self.joint_exit.check_depths(num_layers)
        if self.multiplex is not None:
            self.multiplex.check_depth(num_layers)
            self._check_composition(self.multiplex)
        if self.edge_cloud is not None:
            self._check_split(num_layers)
        for section in ("joint_exit", "multiplex"):
            for other in ("early_exit", "layer_parallel", "split_after"):
                if getattr(self, section) is not None and getattr(self, other):
                    raise ConfigError(
                        f"efficiency.{section} and efficiency.{other} are not supported together: "
                        "leave one of them out"
                    )

    @staticmethod
    def _check_parallel_exits(early_exit: EarlyExitConfig) -> None:
        """Exits of a model with groups of layers, whose cache entries are as wide as the group."""
        if early_exit.exits and early_exit.cache != "recompute":
            raise ConfigError(
                f"efficiency.early_exit: cache policy {early_exit.cache!r} is not supported with "
                "efficiency.layer_parallel, whose groups have wider cache entries: use `recompute`"
            )
        if early_exit.sees_all_tokens:
            raise ConfigError(
                "efficiency.early_exit: gates `mamba` and adapters `block` are not supported with "
                "efficiency.layer_parallel: use `linear` or `mlp`, and `linear` or `none`"
            )

    def check_kind(self, architecture: str) -> None:
        """Check what depends on the kind of the model's layers.

        Args:
            architecture: of the model, ours or stock.

        Raises:
            ConfigError: naming the setting and the way out.
        """
        state_space = architecture in (*STATE_SPACE_MODELS, *STATE_SPACE_MODELS.values())
        kind = "state-space" if state_space else "attention"
        if self.edge_cloud is not None and architecture not in (
            *LANGUAGE_MODELS,
            *LANGUAGE_MODELS.values(),
        ):
            raise ConfigError(
                f"efficiency.edge_cloud is not supported on {architecture}: only language models "
                "with attention are split"
            )
        if state_space and self.layer_parallel is not None:
            raise ConfigError(
                f"efficiency.layer_parallel is not supported on {architecture}, whose layers have "
                "no attention: leave it out"
            )
        if self.early_exit is None:
            return
        policies = POLICIES[kind]
        if self.early_exit.cache not in policies:
            raise ConfigError(
                f"efficiency.early_exit: cache policy {self.early_exit.cache!r} is not supported "
                f"on {architecture}, which has {kind} layers: use one of {', '.join(policies)}"
            )
        if state_space and self.early_exit.has_blocks:
            raise ConfigError(
                "efficiency.early_exit: the adapter `block` is not supported on "
                f"{architecture}: use `linear` or `none`"
            )

    @property
    def is_edge(self) -> bool:
        """Whether these are the lower layers of a split model."""
        return isinstance(self.edge_cloud, EdgeConfig)

    def _check_split(self, num_layers: int) -> None:
        assert self.edge_cloud is not None
        others = ["joint_exit", "multiplex"]
        if not self.is_edge:
            others.append("early_exit")
        for other in others:
            if getattr(self, other) is not None:
                raise ConfigError(
                    f"efficiency.edge_cloud of role `{self.edge_cloud.role}` and "
                    f"efficiency.{other} are not supported together: leave one of them out"
                )
        if not isinstance(self.edge_cloud, EdgeConfig):
            return
        exits = self.early_exit.exits if self.early_exit is not None else ()
        if len(exits) < 2 or exits[-1].depth != num_layers:
            raise ConfigError(
                "efficiency.edge_cloud of role `edge` needs two exits or more in "
                f"efficiency.early_exit, the last of them behind all {num_layers} layers"
            )
        assert self.early_exit is not None
        if self.early_exit.cache != "recompute":
            raise ConfigError(
                f"efficiency.early_exit: cache policy {self.early_exit.cache!r} is not supported "
                "on an edge, whose cloud needs every token's exact hidden state: use `recompute`"
            )
        if self.early_exit.sees_all_tokens:
            raise ConfigError(
                "efficiency.early_exit: gates `mamba` and adapters `block` are not supported on "
                "an edge yet: use `linear` or `mlp`, and `linear` or `none`"
            )
        if self.edge_cloud.layers <= num_layers:
            raise ConfigError(
                f"efficiency.edge_cloud: {self.edge_cloud.layers} layers in all leave none for "
                f"the cloud of an edge that has {num_layers}"
            )

    def _check_composition(self, multiplex: MultiplexConfig) -> None:
        """Sequences that have merged cannot leave one by one."""
        behind = [
            d for d in (self.joint_exit.depths if self.joint_exit else ()) if d > multiplex.depth
        ]
        if behind:
            raise ConfigError(
                f"efficiency.joint_exit: exits at depths {behind} lie behind depth "
                f"{multiplex.depth}, where efficiency.multiplex merges sequences: move it behind "
                "them, or leave them out"
            )


def parse_efficiency(block: Any) -> EfficiencyConfig:
    """Validate an `efficiency` block as found in `config.json` or `--hf-overrides`.

    Args:
        block: the JSON object, or None for a checkpoint without one (a trivial plan).

    Raises:
        ConfigError: naming every field that is unknown or has an impossible value.
    """
    if block is None:
        return EfficiencyConfig()
    if isinstance(block, EfficiencyConfig):
        return block
    if not isinstance(block, Mapping):
        raise ConfigError(f"`efficiency` must be a JSON object, got {type(block).__name__}")
    try:
        return EfficiencyConfig.model_validate(dict(block))
    except ValidationError as error:
        problems = "; ".join(
            f"efficiency.{'.'.join(str(part) for part in item['loc'])}: "
            f"{item['msg'].removeprefix('Value error, ')}"
            for item in error.errors()
        )
        raise ConfigError(problems) from None


def efficient_architecture(stock: str) -> str:
    """Our architecture name for a stock one.

    Raises:
        ConfigError: for a family that is not supported, naming those that are.
    """
    if stock in ARCHITECTURES.values():
        return stock
    if stock not in ARCHITECTURES:
        raise ConfigError(
            f"architecture {stock!r} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[stock]
