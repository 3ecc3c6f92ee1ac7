"""What a request may ask of a classifier's exits."""

from __future__ import annotations

import math
from typing import Any

import pytest

from vllm_effplugin.config import parse_efficiency
from vllm_effplugin.errors import ConfigError
from vllm_effplugin.techniques.joint_exit.request import (
    as_prepared,
    engine_request,
    exit_pooling_params,
    parse_sequence_request,
)


def test_the_bias_of_a_request() -> None:
    assert parse_sequence_request(None).bias(-0.5) == -0.5
    assert parse_sequence_request({"exit_bias": 1}).bias(-0.5) == 1.0
    assert parse_sequence_request({"exit": False, "exit_bias": 9.0}).bias(-0.5) == -math.inf
    assert parse_sequence_request({"another_plugins": 3}).exit


@pytest.mark.parametrize(
    "asked",
    [
        {"exit": "no"},
        {"exit": 1},
        {"exit_bias": "0.5"},
        {"exit_bias": math.nan},
        {"exit_bias": 10**400},
        {"exit_tresh": 1},
    ],
)
def test_what_cannot_be_understood(asked: dict[str, Any]) -> None:
    """Named to the caller; in the engine it must harm nobody else."""
    [name] = asked
    with pytest.raises(ConfigError, match=name):
        parse_sequence_request(asked)
    assert engine_request(asked).bias(2.0) == -math.inf


def test_what_leaves_the_decision_to_the_checkpoint() -> None:
    assert as_prepared({})
    assert as_prepared({"exit": True, "exit_bias": None, "exit_report": True})
    assert not as_prepared({"exit": False})
    assert not as_prepared({"exit_bias": 0.0})


def test_offline_parameters() -> None:
    params = exit_pooling_params(exit_bias=0.5)
    assert params.extra_kwargs == {"exit": True, "exit_bias": 0.5, "exit_report": False}
    with pytest.raises(ConfigError, match="exit_bias"):
        exit_pooling_params(exit_bias=math.nan)


@pytest.mark.parametrize(
    ("block", "named"),
    [
        ({"exits": []}, "exits"),
        ({"exits": [{"depth": 6}, {"depth": 3}]}, "increasing depths"),
        ({"exits": [{"depth": 12}]}, "depth 12.*12 layers"),
        ({"exits": [{"depth": 3}], "rule": "hope"}, "rule"),
        (
            {"exits": [{"depth": 3}], "conformal": [{"coverage": 0.9, "thresholds": [0.5]}]},
            "0.9 needs 2 thresholds.*got 1",
        ),
        ({"exits": [{"depth": 3, "temperature": 0}]}, "temperature"),
    ],
)
def test_blocks_that_cannot_work(block: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_efficiency({"joint_exit": block}).validate_for(12)


@pytest.mark.parametrize("other", ["early_exit", "split_after"])
def test_other_sections_beside_it(other: str) -> None:
    sections = {"early_exit": {"exits": [{"depth": 4}]}, "split_after": [4]}
    block = {"joint_exit": {"exits": [{"depth": 3}]}, other: sections[other]}
    with pytest.raises(ConfigError, match=f"joint_exit and efficiency.{other}"):
        parse_efficiency(block).validate_for(12)
