"""How a classifier multiplexes sequences."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from vllm_effplugin.errors import ConfigError

MULTIPLEXERS = "multiplexers"
"""The module that holds them, in the engine and in names of a checkpoint's tensors."""

MOST = 16
"""Sequences of a composite; each has that share of the hidden size."""


class MultiplexConfig(BaseModel):
    """Sequences that are merged behind a layer (RevMUX, arXiv 2410.04519)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    depth: int = Field(ge=0, description="Layers that each sequence runs alone.")
    sizes: tuple[Annotated[int, Field(ge=2, le=MOST)], ...] = Field(
        min_length=1, description="Numbers of sequences that may be merged into one."
    )
    max_wait_ms: float = Field(
        2.0,
        ge=0,
        le=1000,
        description="How long a request that finds no partner may be held back for one, while "
        "nothing else runs. At 0 it never is.",
    )
    without_group: Literal["shared", "alone"] = Field(
        "shared",
        description="What requests without `mux_group` do: `shared`, they merge with each other; "
        "`alone`, they run unmerged.",
    )

    @field_validator("sizes")
    @classmethod
    def _increasing(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if list(sizes) != sorted(set(sizes)):
            raise ValueError(f"must be increasing, got {list(sizes)}")
        return sizes

    def tensors(self, hidden_size: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the trained tensors, as in a checkpoint."""
        return {
            f"{MULTIPLEXERS}.{size}.{name}": shape
            for size in self.sizes
            for name, shape in multiplexer_tensors(hidden_size, size).items()
        }

    def check_depth(self, num_layers: int) -> None:
        """Raise ConfigError unless layers are left to run merged."""
        if self.depth >= num_layers:
            raise ConfigError(
                f"efficiency.multiplex: depth {self.depth} leaves none of the model's {num_layers} "
                "layers to run merged"
            )


def multiplexer_tensors(hidden_size: int, size: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one multiplexer's parameters.

    Args:
        hidden_size: `d`.
        size: `N`, sequences that it merges.
    """
    width, wide = hidden_size // size, 3 * hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "down.weight": (width, hidden_size),
        "down.bias": (width,),
        "up.0.weight": (wide, width),
        "up.0.bias": (wide,),
        "up.1.weight": (wide, wide),
        "up.1.bias": (wide,),
        "up.2.weight": (hidden_size, wide),
        "up.2.bias": (hidden_size,),
    }
    for slot in range(size):
        shapes |= {
            f"couplings.{slot}.0.weight": (hidden_size, width),
            f"couplings.{slot}.0.bias": (hidden_size,),
            f"couplings.{slot}.1.weight": (width, hidden_size),
            f"couplings.{slot}.1.bias": (width,),
        }
    return shapes
