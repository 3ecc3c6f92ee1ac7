"""What a request may ask of a multiplexing classifier."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_effplugin.config import parse_efficiency
from vllm_effplugin.errors import ConfigError
from vllm_effplugin.techniques.multiplex.config import MultiplexConfig
from vllm_effplugin.techniques.multiplex.request import (
    SHARED,
    engine_request,
    multiplex_pooling_params,
    parse_multiplex_request,
)

SHARING = MultiplexConfig(depth=4, sizes=(2,))
KEYED = MultiplexConfig(depth=4, sizes=(2,), without_group="alone")


def test_with_whom_a_sequence_merges() -> None:
    assert parse_multiplex_request(None).tenant(SHARING) == SHARED
    assert parse_multiplex_request(None).tenant(KEYED) is None
    named = parse_multiplex_request({"mux_group": "acme", "exit": False})
    assert named.tenant(SHARING) == named.tenant(KEYED) == "acme"
    assert parse_multiplex_request({"mux": False, "mux_group": "acme"}).tenant(SHARING) is None


@pytest.mark.parametrize(
    "asked", [{"mux": "no"}, {"mux": 1}, {"mux_group": ""}, {"mux_group": 7}, {"mux_grup": "acme"}]
)
def test_what_cannot_be_understood(asked: dict[str, Any]) -> None:
    """Named to the caller; in the engine it runs alone."""
    [name] = asked
    with pytest.raises(ConfigError, match=name):
        parse_multiplex_request(asked)
    assert engine_request(asked).tenant(SHARING) is None


def test_offline_parameters() -> None:
    params = multiplex_pooling_params(mux_group="acme")
    assert params.extra_kwargs == {"mux": True, "mux_group": "acme", "mux_report": False}
    with pytest.raises(ConfigError, match="mux_group"):
        multiplex_pooling_params(mux_group="")


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        ({"depth": 4, "sizes": []}, "sizes"),
        ({"depth": 4, "sizes": [1]}, "sizes.0"),
        ({"depth": 4, "sizes": [4, 2]}, "increasing"),
        ({"depth": -1, "sizes": [2]}, "depth"),
        ({"depth": 4, "sizes": [2], "max_wait_ms": -1}, "max_wait_ms"),
        ({"depth": 4, "sizes": [2], "without_group": "some"}, "without_group"),
    ],
)
def test_a_wrong_block(block: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=f"multiplex.*{problem}|{problem}"):
        parse_efficiency({"multiplex": block})


@pytest.mark.parametrize(
    ("depth", "others", "problem"),
    [
        (12, {}, "depth 12 leaves none"),
        (2, {"joint_exit": {"exits": [{"depth": 3}]}}, r"\[3\]"),
        (4, {"layer_parallel": {"groups": [[1, 2]]}}, "layer_parallel"),
        (4, {"split_after": [2]}, "split_after"),
    ],
)
def test_what_does_not_go_together(depth: int, others: dict[str, Any], problem: str) -> None:
    block = {"multiplex": {"depth": depth, "sizes": [2]}, **others}
    with pytest.raises(ConfigError, match=problem):
        parse_efficiency(block).validate_for(12)


def test_exits_may_be_where_sequences_merge() -> None:
    exits = {"exits": [{"depth": 3}, {"depth": 6}]}
    parse_efficiency({"joint_exit": exits, "multiplex": {"depth": 6, "sizes": [2]}}).validate_for(
        12
    )
