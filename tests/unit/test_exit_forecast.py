"""What exits are forecast to save, where it can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_effplugin.techniques.early_exit.config import EarlyExitConfig
from vllm_effplugin.techniques.early_exit.forecast import Machine, forecast

SIZES = [1, 8, 64]


def machine(
    weights: float, token: float, overhead: float = 0.0, fill: bool = False, entries: float = 0.0
) -> Machine:
    """Three segments of ten layers that read their weights and compute on tokens.

    Args:
        entries: seconds of any number of tokens' cache entries, under `fill`.
    """
    part = [weights + token * size for size in SIZES]
    return Machine(
        sizes=SIZES,
        plain=[3 * second for second in part],
        whole=[3 * second for second in part],
        head=[0.5] * len(SIZES),
        segments=[part, part, part],
        overhead=overhead,
        fill=[[entries] * len(SIZES)] * 2 if fill else None,
        steps={batch: 3 * (weights + token * batch) + 1 for batch in (1, 8)},
        block_size=32,
        num_layers=30,
        depths=[10, 20],
        blocks=[False, False],
    )


def test_blocks_cost_what_a_layer_costs() -> None:
    """Of two exits with a layer each, one is left out: 31 layers in all, 11 up to the other."""
    layer = np.array([1.0 + 0.1 * size for size in SIZES])
    with_blocks = machine(10, 1).model_copy(
        update={
            "plain": (30 * layer).tolist(),
            "whole": (32 * layer).tolist(),
            "segments": [(11 * layer).tolist(), (11 * layer).tolist(), (10 * layer).tolist()],
            "steps": {1: 30 * 1.1},
            "blocks": [True, True],
        }
    )
    costs = with_blocks.costs([0], 16)
    assert costs.whole.at(8) == pytest.approx(31 * 1.8)
    assert [part.at(8) for part in costs.segments] == pytest.approx([11 * 1.8, 20 * 1.8])

    exits = [{"depth": 10, "gate": "linear", "threshold": 0.5, "adapter": "block"}]
    block = EarlyExitConfig.model_validate({"exits": exits})
    result = forecast(with_blocks, block, [0], np.full((4, 64), -1), 1)
    assert result.speed == pytest.approx(30 / 31)
    assert result.layer_tokens == pytest.approx(31 / 30)


def config(cache: str, *depths: int, pending: int = 1000) -> EarlyExitConfig:
    exits = [{"depth": depth, "gate": "linear", "threshold": 0.5} for depth in depths]
    return EarlyExitConfig.model_validate({"exits": exits, "cache": cache, "max_pending": pending})


def test_nothing_fires_nothing_changes() -> None:
    fires = np.full((4, 64), -1)
    result = forecast(machine(1, 0.1), config("recompute", 10, 20), [0, 1], fires, 8)
    assert result.speed == pytest.approx(1)
    assert result.layer_tokens == pytest.approx(1)


@pytest.mark.parametrize("fires", [-1, 0, 1])
def test_softmax_gates_run_the_head(fires: int) -> None:
    """At each exit that a token comes to, whether it leaves or not."""
    exits = [{"depth": depth, "gate": "softmax", "threshold": 0.5} for depth in (10, 20)]
    softmax = EarlyExitConfig.model_validate({"exits": exits, "cache": "propagate"})
    measured = machine(1, 0.1, fill=True)
    result = forecast(measured, softmax, [0, 1], np.full((4, 64), fires), 1)
    stack = {-1: 3 * 1.1 + 1, 0: 1.1 + 0.5, 1: 2 * 1.1 + 1}[fires]
    assert result.speed == pytest.approx((3 * 1.1 + 1) / (stack + 1), rel=0.02)


def test_all_leave_under_propagate() -> None:
    """Steps of 3 * 1.1 + 1 become 1.1 + 1, but for the first ones, before that is known."""
    fires = np.zeros((4, 64), dtype=int)
    result = forecast(machine(1, 0.1, fill=True), config("propagate", 10, 20), [0, 1], fires, 1)
    assert result.speed == pytest.approx((3 * 1.1 + 1) / (1.1 + 1), rel=0.02)
    assert result.layer_tokens == pytest.approx(1 / 3, rel=0.02)


def test_under_recompute_layers_run_later_in_one_go() -> None:
    """Where only weights cost, 31 of 32 tokens are free behind the exit; no layer is saved."""
    fires = np.zeros((4, 64), dtype=int)
    result = forecast(machine(1, 0.0), config("recompute", 10), [0], fires, 1)
    mean = 1 + 2 / 32
    assert result.speed == pytest.approx((3 + 1) / (mean + 1), rel=0.02)
    assert result.layer_tokens == pytest.approx(1, rel=0.02)


def test_waiting_room_forces_layers_to_run() -> None:
    fires = np.zeros((4, 64), dtype=int)
    wide = forecast(machine(1, 0.0), config("recompute", 10), [0], fires, 1)
    narrow = forecast(machine(1, 0.0), config("recompute", 10, pending=1), [0], fires, 1)
    assert narrow.speed < wide.speed
    assert narrow.speed == pytest.approx(4 / (2 + 1), rel=0.05)


def test_exits_left_out_merge_their_segments() -> None:
    fires = np.zeros((4, 64), dtype=int)
    result = forecast(machine(1, 0.1, fill=True), config("propagate", 20), [1], fires, 1)
    assert result.layer_tokens == pytest.approx(2 / 3, rel=0.02)


def test_what_does_not_pay_is_not_done() -> None:
    """Half the rows leave, and cutting the batch costs more than they save."""
    fires = np.tile([0, -1], (4, 32))
    fires[1::2] = fires[1::2, ::-1]
    result = forecast(
        machine(1, 0.0, overhead=5, fill=True), config("propagate", 10), [0], fires, 8
    )
    assert result.speed == pytest.approx(1)
    assert result.layer_tokens == pytest.approx(1)


@pytest.mark.parametrize("pending", [1, 4])
def test_entries_are_paid_for_as_often_as_they_are_written(pending: int) -> None:
    fires = np.zeros((4, 64), dtype=int)
    measured = machine(1, 0.1, fill=True, entries=0.8)
    result = forecast(measured, config("propagate", 10, pending=pending), [0], fires, 1)
    assert result.speed == pytest.approx((3 * 1.1 + 1) / (1.1 + 0.8 / pending + 1), rel=0.02)
