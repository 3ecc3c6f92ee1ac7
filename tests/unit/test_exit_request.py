"""What callers may ask of early exit."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_effplugin.config import parse_efficiency
from vllm_effplugin.errors import ConfigError
from vllm_effplugin.techniques.early_exit.config import EarlyExitConfig
from vllm_effplugin.techniques.early_exit.request import (
    cache_policy,
    draft_thresholds,
    parse_exit_request,
    thresholds,
)

EXITS = [{"depth": 4, "threshold": 0.7}, {"depth": 8, "threshold": 0.9}]


def early_exit(**fields: Any) -> EarlyExitConfig:
    """Two exits, and further fields."""
    config = parse_efficiency({"early_exit": {"exits": EXITS, **fields}}).early_exit
    assert config is not None
    return config


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, [0.7, 0.9]),
        (None, [0.7, 0.9]),
        ({"other": 1}, [0.7, 0.9]),
        ({"exit": False}, [1, 1]),
        ({"exit": "false"}, [1, 1]),
        ({"exit": 0}, [1, 1]),  # what vLLM makes of JSON's `false`
        ({"exit": 1}, [0.7, 0.9]),
        ({"exit": "verify", "exit_threshold": 0.5}, [1, 1]),
        ({"exit": True, "exit_threshold": 0.5}, [0.5, 0.5]),
        ({"exit_threshold": "0.5"}, [0.5, 0.5]),
        ({"exit_threshold": 0}, [0, 0]),
        ({"exit_min_layer": 5}, [1, 0.9]),
        ({"exit_min_layer": "8", "exit_threshold": 0.1}, [1, 0.1]),
        ({"exit_min_layer": 9}, [1, 1]),
    ],
)
def test_thresholds(asked: dict[str, Any] | None, expected: list[float]) -> None:
    assert thresholds(early_exit(), parse_exit_request(asked)) == expected


def test_drafts_take_the_thresholds_that_exits_would() -> None:
    asked = parse_exit_request({"exit": "verify", "exit_min_layer": 5})
    assert draft_thresholds(early_exit(), asked) == [1, 0.9]
    assert draft_thresholds(early_exit(), parse_exit_request({})) == [1, 1]
    assert draft_thresholds(early_exit(), parse_exit_request({"exit": False})) == [1, 1]


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"exit": "perhaps"}, "exit"),
        ({"exit": 2}, "exit"),
        ({"exit": 1.0}, "exit"),
        ({"exit_threshold": 1.5}, "exit_threshold"),
        ({"exit_threshold": -0.1}, "exit_threshold"),
        ({"exit_threshold": "high"}, "exit_threshold.*not a usable number"),
        ({"exit_threshold": True}, "exit_threshold"),
        ({"exit_threshold": 10**400}, "exit_threshold"),
        ({"exit_threshold": float("nan")}, "exit_threshold"),
        ({"exit_min_layer": 2.5}, "exit_min_layer"),
        ({"exit_min_layer": -1}, "exit_min_layer"),
        ({"exit_treshold": 0.5}, "exit_treshold"),
    ],
)
def test_wrong_values_are_named(asked: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_exit_request(asked)


def test_only_approximate_requests_have_a_policy() -> None:
    assert cache_policy(early_exit(), None) is None
    approximate = early_exit(cache="propagate")
    assert cache_policy(approximate, {"exit": False}) is None
    assert cache_policy(approximate, {"exit_threshold": 1}) is None
    assert cache_policy(approximate, {"exit_min_layer": 9}) is None
    policies = {
        cache_policy(approximate, None),
        cache_policy(approximate, {"exit_threshold": 0.5}),
        cache_policy(approximate, {"exit_min_layer": 5}),
        cache_policy(early_exit(cache="copy"), None),
    }
    assert len(policies) == 4
    assert None not in policies


def test_requests_that_need_the_exits_layers_share_among_themselves() -> None:
    exits = [{**point, "adapter": "block"} for point in EXITS]
    exact = early_exit(exits=exits)
    assert cache_policy(exact, {"exit": False}) is None
    assert cache_policy(exact, {"exit_min_layer": 9}) is None
    needing = [None, {"exit_threshold": 0.5}, {"exit": "verify"}]
    assert {cache_policy(exact, extra) for extra in needing} == {"early_exit:blocks"}
    approximate = early_exit(exits=exits, cache="propagate")
    assert cache_policy(approximate, {"exit": "verify"}) == "early_exit:blocks"
    assert "propagate" in str(cache_policy(approximate, None))


@pytest.mark.parametrize(
    ("block", "named"),
    [
        ({"exits": [{"depth": 8}, {"depth": 4}]}, "increasing depths"),
        ({"exits": [{"depth": 4}, {"depth": 4}]}, "increasing depths"),
        ({"exits": [{"depth": 0}]}, "depth"),
        ({"exits": [{"depth": 4, "threshold": 2}]}, "threshold"),
        ({"exits": [{"depth": 4, "gate": "magic"}]}, "gate"),
        ({"exits": [], "cache": "forget"}, "cache"),
        ({"exits": [], "max_pending": 0}, "max_pending"),
    ],
)
def test_impossible_blocks_are_named(block: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_efficiency({"early_exit": block})


def test_an_exit_outside_the_model_is_refused() -> None:
    efficiency = parse_efficiency({"early_exit": {"exits": EXITS}})
    efficiency.validate_for(9)
    with pytest.raises(ConfigError, match="depth 8"):
        efficiency.validate_for(8)
