"""Units, segments and boundaries.

A plan is an ordered list of segments with a boundary between any two of them. A segment is a run
of units that is compiled together; a unit is one layer or one group of layers that run
concurrently. The set of rows in a batch changes only at a boundary.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_effplugin.config import EfficiencyConfig
from vllm_effplugin.errors import ConfigError


@dataclass(frozen=True)
class Unit:
    """One layer, or one group of consecutive layers that share their input."""

    layers: tuple[int, ...]

    @property
    def first(self) -> int:
        """Index of the first layer; it names the unit's modules and its KV cache."""
        return self.layers[0]

    @property
    def is_group(self) -> bool:
        """Whether the unit runs more than one layer."""
        return len(self.layers) > 1


@dataclass(frozen=True)
class Boundary:
    """A point after layer `after` where rows may leave or join the batch.

    `kind` names what happens there. `split` does nothing: rows pass unchanged. At an `exit`
    tokens may leave, at a `sequence_exit` whole prompts; at a `merge` whole prompts become one,
    which may be before the first layer, and where some have just left.
    """

    after: int
    kind: str = "split"


@dataclass(frozen=True)
class Segment:
    """Units that run back to back on the same rows."""

    units: tuple[Unit, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """Every layer of the segment, in order."""
        return tuple(layer for unit in self.units for layer in unit.layers)


@dataclass(frozen=True)
class Plan:
    """`segments[i]` is followed by `boundaries[i]`, except the last."""

    segments: tuple[Segment, ...]
    boundaries: tuple[Boundary, ...] = ()

    @property
    def units(self) -> tuple[Unit, ...]:
        """All units, in order."""
        return tuple(unit for segment in self.segments for unit in segment.units)

    @property
    def groups(self) -> tuple[Unit, ...]:
        """The units that run several layers."""
        return tuple(unit for unit in self.units if unit.is_group)

    @property
    def depth(self) -> int:
        """Sequential steps: the number of units."""
        return len(self.units)

    @property
    def has_exits(self) -> bool:
        """Whether tokens may leave somewhere."""
        return any(boundary.kind == "exit" for boundary in self.boundaries)

    @property
    def has_sequences(self) -> bool:
        """Whether whole prompts leave or merge somewhere."""
        kinds = ("sequence_exit", "merge")
        return any(boundary.kind in kinds for boundary in self.boundaries)

    @property
    def is_trivial(self) -> bool:
        """Whether the plan is the stock model: every layer alone, no boundary."""
        return not self.groups and not self.boundaries

    @property
    def unit_of(self) -> dict[int, Unit]:
        """For each layer the unit it belongs to, in layer order."""
        return {layer: unit for unit in self.units for layer in unit.layers}

    def describe(self) -> str:
        """One line for logs: `0-11 [12 13] [14 15] 16-29`; `|` marks a boundary."""
        return " | ".join(_describe_segment(segment) or "-" for segment in self.segments)


def _describe_segment(segment: Segment) -> str:
    parts: list[str] = []
    run: list[int] = []

    def close_run() -> None:
        if run:
            parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
            run.clear()

    for unit in segment.units:
        if unit.is_group:
            close_run()
            parts.append("[" + " ".join(map(str, unit.layers)) + "]")
        else:
            run.append(unit.first)
    close_run()
    return " ".join(parts)


def build_plan(config: EfficiencyConfig, num_layers: int) -> Plan:
    """Turn a configuration into the plan that the model executes.

    Args:
        config: the validated `efficiency` block.
        num_layers: layers of the base model.

    Raises:
        ConfigError: a group or boundary outside the model, or a boundary inside a group.
    """
    groups = config.layer_parallel.resolve_groups(num_layers) if config.layer_parallel else ()
    starts = {group[0]: group for group in groups}
    units: list[Unit] = []
    layer = 0
    while layer < num_layers:
        unit = Unit(starts.get(layer, (layer,)))
        units.append(unit)
        layer = unit.layers[-1] + 1

    exits = config.early_exit.exits if config.early_exit else ()
    if config.is_edge:
        exits = exits[:-1]  # behind the last layer there is nothing to be cut off
    sequence_exits = config.joint_exit.exits if config.joint_exit else ()
    boundaries = (
        *(Boundary(layer) for layer in config.split_after),
        *(Boundary(point.depth - 1, "exit") for point in exits),
        *(Boundary(point.depth - 1, "sequence_exit") for point in sequence_exits),
        *((Boundary(config.multiplex.depth - 1, "merge"),) if config.multiplex else ()),
    )
    boundaries = tuple(sorted(boundaries, key=lambda boundary: boundary.after))
    segments: list[Segment] = []
    rest = units
    for boundary in boundaries:
        if boundary.kind == "merge" and boundary.after == rest[0].first - 1:
            segments.append(Segment(()))
            continue
        cut = next((i for i, u in enumerate(rest) if u.layers[-1] == boundary.after), None)
        if cut is None or cut + 1 == len(rest):
            raise ConfigError(_misplaced(boundary, units, num_layers))
        segments.append(Segment(tuple(rest[: cut + 1])))
        rest = rest[cut + 1 :]
    segments.append(Segment(tuple(rest)))
    return Plan(tuple(segments), boundaries)


def _misplaced(boundary: Boundary, units: list[Unit], num_layers: int) -> str:
    # Depths are what the user gave, except in `split_after`.
    where = f"{boundary.kind} boundary at depth {boundary.after + 1} (after layer {boundary.after})"
    for unit in units:
        if boundary.after in unit.layers[:-1]:
            around = (unit.first, unit.layers[-1] + 1)
            ways = [f"move it to depth {depth}" for depth in around if 0 < depth < num_layers]
            ways_out = ", or ".join([*ways, "move the group"])
            return f"{where} lies inside the group {list(unit.layers)}; {ways_out}"
    return f"{where} must lie inside the model of {num_layers} layers, once per layer"
