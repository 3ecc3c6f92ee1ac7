"""When it pays to run fewer rows."""

from __future__ import annotations

import pytest

from vllm_effplugin.techniques.early_exit.costs import FIRST, Column, Costs, Preference

SIZES = (1, 2, 4, 8)


def column(weights: float, token: float) -> Column:
    """A part that reads its weights once and then takes a time per token."""
    return Column(SIZES, [weights + token * size for size in SIZES])


PENDING = 4


def costs(weights: float, token: float, overhead: float = 0.0, fill: float | None = None) -> Costs:
    """Three equal segments; entries cost `fill` per token."""
    part = column(weights, token)
    whole = column(3 * weights, 3 * token)
    fills = None if fill is None else [column(0, fill)] * 2
    return Costs(whole, [part] * 3, overhead, fills, PENDING)


def test_times_are_linear_between_and_beyond_the_sizes() -> None:
    part = Column(SIZES, [1, 2, 3, 7])
    assert [part.at(n) for n in (0, 1, 2, 3, 4, 6, 8, 10)] == [0, 1, 2, 2.5, 3, 5, 7, 9]


def test_everything_behind_an_exit_is_saved_when_every_row_leaves() -> None:
    table = costs(weights=1, token=0.1, fill=0)
    assert table.gain(0, tokens=4, staying=0, leaving=4) == pytest.approx(2 * 1.4)
    assert table.gain(1, tokens=4, staying=0, leaving=4) == pytest.approx(1.4)


def test_under_recompute_only_the_weights_are_saved() -> None:
    """What a token skips runs later in a larger batch."""
    table = costs(weights=1, token=0.1)
    assert table.gain(0, tokens=4, staying=0, leaving=4) == pytest.approx(2)
    assert table.gain(0, tokens=4, staying=2, leaving=2) == pytest.approx(0)


def test_cutting_a_batch_costs_its_overhead() -> None:
    table = costs(weights=0, token=1, overhead=3, fill=0.5)
    assert table.gain(0, tokens=4, staying=2, leaving=2) == pytest.approx(4 - 1 - 3)
    assert table.gain(0, tokens=4, staying=0, leaving=4) == pytest.approx(8 - 2)


def test_saved_share_of_a_step() -> None:
    table = costs(weights=1, token=0, fill=0)
    assert table.saved(4, [4, 0]) == pytest.approx(2 / 3)
    assert table.saved(4, [0, 4]) == pytest.approx(1 / 3)
    assert table.saved(4, [0, 0]) == pytest.approx(0)


def test_rows_that_fired_earlier_leave_when_it_pays() -> None:
    """Two of four rows are not worth a cut; all four at the next exit are."""
    table = costs(weights=1, token=0, overhead=1, fill=0)
    assert table.saved(4, [2, 0]) == pytest.approx(0)
    assert table.saved(4, [2, 2]) == pytest.approx(1 / 3)


def test_segments_that_cost_more_than_the_whole_are_a_loss() -> None:
    part = column(1.1, 0)
    table = Costs(column(3, 0), [part] * 3, 0, [column(0, 0)] * 2, PENDING)
    assert table.saved(4, [0, 0]) == pytest.approx(-0.1)


def test_entries_that_wait_together_are_cheaper() -> None:
    part = column(1, 0.1)
    table = Costs(column(3, 0.3), [part] * 3, 0, [Column(SIZES, [1.0, 1.1, 1.3, 1.7])] * 2, PENDING)
    # Where some stay they are written step by step, where none does four steps at a time.
    assert table.owed(0, staying=1, leaving=2) == pytest.approx(1.1)
    assert table.owed(0, staying=0, leaving=2) == pytest.approx(1.7 / PENDING)


def preferring(times: int = 20) -> Preference:
    """Has looked at steps of one row, which leaves: 1 second is expected instead of 3."""
    preference = Preference(costs(weights=1, token=0, overhead=1, fill=0))
    for _ in range(times):
        preference.learn(1, [1, 0], in_segments=False, seconds=3.0)
    return preference


def test_what_pays_is_remembered_by_size() -> None:
    """That all rows of small steps leave says nothing of large ones; nor does one lucky step."""
    preference = preferring()
    for _ in range(20):
        preference.learn(32, [16, 0], in_segments=False)
    assert preference.segments(1)
    assert not preference.segments(32)
    preference.learn(32, [4, 0], in_segments=False)
    assert not preference.segments(32)
    for _ in range(5):
        preference.learn(1, [0, 0], in_segments=True)
    assert preference.segments(1)
    for _ in range(20):
        preference.learn(1, [0, 0], in_segments=True)
    assert not preference.segments(1)
    assert Preference(None).segments(32)


def test_only_some_steps_are_looked_at() -> None:
    preference = Preference(costs(weights=1, token=0))
    assert [preference.looks() for _ in range(9)] == [*[False] * 3, True] * 2 + [False]
    assert not any(Preference(None).looks() for _ in range(9))


def test_the_first_steps_run_as_one_graph() -> None:
    """So that there is something to compare with."""
    assert not preferring(times=FIRST - 1).segments(1)
    assert preferring(times=FIRST).segments(1)


def test_segments_that_are_slower_than_expected_are_left() -> None:
    """Expected 1 second instead of 3; takes 3.3."""
    preference = preferring()
    preference.learn(1, [1, 0], in_segments=True, seconds=100.0)  # something was compiled
    assert preference.segments(1)
    looks = 0
    while preference.segments(1) and looks < 100:
        preference.learn(1, [1, 0], in_segments=True, seconds=3.3)
        looks += 1
    assert 3 < looks < 20


def test_what_was_slow_is_tried_again() -> None:
    preference = preferring()
    for _ in range(50):
        preference.learn(1, [1, 0], in_segments=True, seconds=3.3)
    for _ in range(50):
        preference.learn(1, [1, 0], in_segments=False, seconds=3.0)
    assert not preference.segments(1)
    for _ in range(1000):
        preference.learn(1, [1, 0], in_segments=False, seconds=3.0)
    assert preference.segments(1)


def test_a_machine_that_is_slower_altogether_changes_nothing() -> None:
    preference = preferring()
    for _ in range(200):
        preference.learn(1, [1, 0], in_segments=False, seconds=6.0)
    for _ in range(200):
        preference.learn(1, [1, 0], in_segments=True, seconds=2.0)
    assert preference.segments(1)
