"""The plan: a pure function of the configuration."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_effplugin.config import parse_efficiency
from vllm_effplugin.errors import ConfigError
from vllm_effplugin.plan import Boundary, Plan, build_plan


def plan(layers: int, **block) -> Plan:
    return build_plan(parse_efficiency(block), layers)


def test_without_a_block_every_layer_is_a_unit():
    trivial = build_plan(parse_efficiency(None), 4)
    assert trivial.is_trivial
    assert [unit.layers for unit in trivial.units] == [(0,), (1,), (2,), (3,)]
    assert len(trivial.segments) == 1


@pytest.mark.parametrize(
    ("layer_parallel", "described"),
    [
        ({"start": 2, "end": 6, "group_size": 2}, "0-1 [2 3] [4 5] 6-9"),
        ({"start": 2, "end": 7, "group_size": 2}, "0-1 [2 3] [4 5] 6-9"),
        ({"start": 2, "end": 9, "group_size": 4}, "0-1 [2 3 4 5] [6 7 8] 9"),
        ({"start": 0, "end": 10, "group_size": 3}, "[0 1 2] [3 4 5] [6 7 8] 9"),
        ({"groups": [[1, 2], [5, 6, 7]]}, "0 [1 2] 3-4 [5 6 7] 8-9"),
        ({"groups": []}, "0-9"),
    ],
)
def test_groups(layer_parallel, described):
    assert plan(10, layer_parallel=layer_parallel).describe() == described


def test_boundaries_cut_between_units():
    cut = plan(8, layer_parallel={"groups": [[2, 3]]}, split_after=[5, 3])
    assert cut.describe() == "0-1 [2 3] | 4-5 | 6-7"
    assert [boundary.after for boundary in cut.boundaries] == [3, 5]
    assert not cut.is_trivial


@pytest.mark.parametrize("after", [2, 7, 9, -1])
def test_a_boundary_that_does_not_fit_is_named(after):
    with pytest.raises(ConfigError, match=f"after layer {after}"):
        plan(8, layer_parallel={"groups": [[2, 3]]}, split_after=[after])


@pytest.mark.parametrize(
    ("group", "told"),
    [
        ([1, 2, 3], "move it to depth 1, or move it to depth 4, or move the group"),
        ([0, 1, 2, 3], "move it to depth 4, or move the group"),
        ([2, 3, 4, 5], "move it to depth 2, or move the group"),
    ],
)
def test_a_boundary_inside_a_group_is_told_where_to_go(group, told):
    with pytest.raises(ConfigError, match=f"at depth 3 .*; {told}$"):
        plan(6, layer_parallel={"groups": [group]}, split_after=[2])


def test_a_boundary_twice_is_refused():
    with pytest.raises(ConfigError, match="after layer 3"):
        plan(8, split_after=[3, 3])


@given(
    layers=st.integers(2, 40),
    start=st.integers(0, 38),
    length=st.integers(2, 40),
    size=st.sampled_from([2, 3, 4]),
    cuts=st.sets(st.integers(0, 38), max_size=5),
)
def test_every_layer_runs_once_and_in_order(layers, start, length, size, cuts):
    block = {
        "layer_parallel": {"start": start, "end": start + length, "group_size": size},
        "split_after": sorted(cuts),
    }
    try:
        made = build_plan(parse_efficiency(block), layers)
    except ConfigError:
        return
    assert [layer for segment in made.segments for layer in segment.layers] == list(range(layers))
    assert len(made.boundaries) == len(made.segments) - 1
    for segment, boundary in zip(made.segments, made.boundaries, strict=False):
        assert segment.layers[-1] == boundary.after
    saved = sum(len(unit.layers) - 1 for unit in made.groups)
    assert made.depth == layers - saved


@pytest.mark.parametrize(
    ("block", "described"),
    [
        ({"multiplex": {"depth": 0, "sizes": [2]}}, "- | 0-11"),
        ({"multiplex": {"depth": 5, "sizes": [2]}}, "0-4 | 5-11"),
        (
            {"joint_exit": {"exits": [{"depth": 3}]}, "multiplex": {"depth": 5, "sizes": [2]}},
            "0-2 | 3-4 | 5-11",
        ),
        (
            {"joint_exit": {"exits": [{"depth": 5}]}, "multiplex": {"depth": 5, "sizes": [2]}},
            "0-4 | - | 5-11",
        ),
    ],
)
def test_where_sequences_merge(block: dict[str, Any], described: str) -> None:
    plan = build_plan(parse_efficiency(block), 12)
    assert plan.describe() == described
    assert plan.boundaries[-1] == Boundary(block["multiplex"]["depth"] - 1, "merge")
    assert plan.has_sequences
    assert len(plan.segments) == len(plan.boundaries) + 1
