"""Which layers run concurrently, and on which schedule.

The equations are those of CQIL, section 3: for a group of `p` layers with input `x`, member `j`
computes its attention delta `A_j(x)` and its MLP delta `M_j(x + A_j(x) + b_j)`, where the bypass
`b_j` is the sum of the attention deltas of the `min(bypass, j)` members before it, and the
group's output is `x + sum_j (A_j + M_j)`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm_effplugin.errors import ConfigError

GROUP_SIZES = (2, 3, 4)


class LayerParallelConfig(BaseModel):
    """Groups of consecutive layers, as a range cut into groups of one size or as a list."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    start: int | None = Field(None, ge=0, description="First layer of the range.")
    end: int | None = Field(None, ge=1, description="One past the last layer of the range.")
    group_size: int | None = Field(None, description="Layers per group in the range: 2, 3 or 4.")
    groups: tuple[tuple[int, ...], ...] | None = Field(
        None, description="Explicit groups, instead of a range: [[12, 13], [14, 15, 16]]."
    )
    schedule: Literal["bypass", "fused"] = Field(
        "bypass",
        description="`bypass`: each MLP sees its own attention delta and those of the `bypass` "
        "members before it. `fused`: every MLP of the group sees all attention deltas.",
    )
    bypass: int = Field(0, ge=0, description="Bypass distance d, 0 <= d < group size.")
    double_count_bypass: bool = Field(
        False,
        description="Add the bypass to the residual as well, as the released training code does. "
        "Only for checkpoints trained with that code.",
    )
    trained: bool = Field(
        False, description="The grouped layers have tensors of their own in the extra file."
    )

    @model_validator(mode="after")
    def _consistent(self) -> LayerParallelConfig:
        in_range = (self.start, self.end, self.group_size)
        if self.groups is None:
            if None in in_range:
                raise ValueError("give either `groups`, or all of `start`, `end`, `group_size`")
            self._check_range()
        else:
            if any(value is not None for value in in_range):
                raise ValueError("`groups` excludes `start`, `end` and `group_size`")
            self._check_groups(self.groups)
        self._check_schedule()
        return self

    def _check_range(self) -> None:
        assert self.start is not None
        assert self.end is not None
        assert self.group_size is not None
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"`group_size` must be one of {GROUP_SIZES}, got {self.group_size}")
        if self.end <= self.start:
            raise ValueError(f"the range [{self.start}, {self.end}) is empty")
        if self.group_size > self.end - self.start:
            raise ValueError(
                f"`group_size` {self.group_size} is larger than the range "
                f"[{self.start}, {self.end})"
            )

    @staticmethod
    def _check_groups(groups: tuple[tuple[int, ...], ...]) -> None:
        last = -1
        for group in groups:
            if len(group) not in GROUP_SIZES:
                raise ValueError(f"group {list(group)} must have one of {GROUP_SIZES} layers")
            if list(group) != list(range(group[0], group[0] + len(group))):
                raise ValueError(f"group {list(group)} is not a run of consecutive layers")
            if group[0] < 0:
                raise ValueError(f"group {list(group)} has a negative layer")
            if group[0] <= last:
                raise ValueError(f"group {list(group)} overlaps the one before it, or is unsorted")
            last = group[-1]

    def _check_schedule(self) -> None:
        largest = self.group_size or max((len(group) for group in self.groups or ()), default=2)
        if self.schedule == "fused" and self.bypass:
            raise ValueError("`bypass` has no meaning under `schedule: fused`; leave it out")
        if self.bypass >= largest:
            raise ValueError(f"`bypass` {self.bypass} must be below the group size {largest}")
        if self.double_count_bypass and not self.bypass:
            raise ValueError("`double_count_bypass` needs `bypass` >= 1")

    def part(self, num_layers: int, first: int, end: int) -> LayerParallelConfig | None:
        """The same for layers `[first, end)` of a model alone; None where no group is among them.

        Args:
            num_layers: of the model. No group lies across either end.
        """
        groups = tuple(
            tuple(layer - first for layer in group)
            for group in self.resolve_groups(num_layers)
            if first <= group[0] < end
        )
        if not groups:
            return None
        none = {"start": None, "end": None, "group_size": None}
        return LayerParallelConfig.model_validate({**self.model_dump(), **none, "groups": groups})

    def resolve_groups(self, num_layers: int) -> tuple[tuple[int, ...], ...]:
        """The groups of at least two layers, in order.

        A range that its group size does not divide ends with a shorter group; a remainder of a
        single layer stays an ordinary layer.

        Args:
            num_layers: layers of the model.

        Raises:
            ConfigError: when a group lies outside the model.
        """
        if self.groups is not None:
            groups = self.groups
        else:
            assert self.start is not None
            assert self.end is not None
            assert self.group_size is not None
            groups = tuple(
                tuple(range(first, min(first + self.group_size, self.end)))
                for first in range(self.start, self.end, self.group_size)
            )
        for group in groups:
            if group[-1] >= num_layers:
                raise ConfigError(
                    f"efficiency.layer_parallel: group {list(group)} is outside the model, "
                    f"which has {num_layers} layers"
                )
        return tuple(group for group in groups if len(group) > 1)
