"""Groups of a step, and where their tokens lie."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_effplugin.techniques.multiplex.grouping import OVERHEAD, form_groups, lay_out


def cost(lengths: list[int], groups: list[tuple[int, ...]]) -> float:
    alone = set(range(len(lengths))) - {row for group in groups for row in group}
    return sum(lengths[row] for row in alone) + sum(
        max(lengths[row] for row in group) * (1 + OVERHEAD) for group in groups
    )


def best(lengths: list[int], rows: tuple[int, ...], sizes: tuple[int, ...]) -> float:
    """By trying everything."""
    if not rows:
        return 0.0
    first, rest = rows[0], rows[1:]
    found = lengths[first] + best(lengths, rest, sizes)
    for size in sizes:
        for others in itertools.combinations(rest, size - 1):
            left = tuple(row for row in rest if row not in others)
            own = max(lengths[row] for row in (first, *others)) * (1 + OVERHEAD)
            found = min(found, own + best(lengths, left, sizes))
    return found


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), max_size=6),
    sizes=st.sampled_from([(2,), (3,), (4,), (2, 3), (2, 4)]),
)
def test_no_grouping_is_cheaper(lengths: list[int], sizes: tuple[int, ...]) -> None:
    groups = form_groups(lengths, ["one"] * len(lengths), sizes)
    rows = [row for group in groups for row in group]
    assert len(rows) == len(set(rows))
    assert all(len(group) in sizes for group in groups)
    assert cost(lengths, groups) == pytest.approx(best(lengths, tuple(range(len(lengths))), sizes))


@given(
    requests=st.lists(st.tuples(st.integers(1, 90), st.sampled_from(["a", "b", None])), max_size=30)
)
def test_tenants_stay_among_themselves(requests: list[tuple[int, str | None]]) -> None:
    lengths, tenants = [length for length, _ in requests], [tenant for _, tenant in requests]
    for group in form_groups(lengths, tenants, (2, 3)):
        assert len({tenants[row] for row in group}) == 1
        assert tenants[group[0]] is not None


def test_similar_lengths_go_together() -> None:
    assert form_groups([10, 90, 11, 91], ["x"] * 4, (2,)) == [(0, 2), (1, 3)]
    # A tiny one is not worth a composite of three hundred.
    assert form_groups([300, 1], ["x"] * 2, (2,)) == []


def test_it_does_not_depend_on_what_else_is_equal() -> None:
    """Every rank, and the scheduler, come to the same."""
    lengths = [7] * 9
    assert form_groups(lengths, ["x"] * 9, (4,)) == form_groups(lengths, ["x"] * 9, (4,))
    assert len(form_groups(lengths, ["x"] * 9, (4,))) == 2


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=10),
    sizes=st.sampled_from([(2,), (3,), (2, 4)]),
    last=st.booleans(),
)
def test_every_token_finds_its_place(
    lengths: list[int], sizes: tuple[int, ...], last: bool
) -> None:
    groups = form_groups(lengths, ["x"] * len(lengths), sizes)
    batch = lay_out(np.array(lengths), groups, last=last)
    starts = np.cumsum(lengths) - lengths
    tokens = [list(range(s, s + n)) for s, n in zip(starts, lengths, strict=True)]
    assert batch.rows.tolist() == sorted(batch.rows.tolist())
    assert batch.sources.tolist() == [t for row in batch.rows for t in tokens[row]]
    assert int(batch.lengths.sum()) == len(batch.sources)
    # Every place of the new batch is written once.
    written = [batch.single_targets, *(part.targets for part in batch.merged.values())]
    assert sorted(np.concatenate(written).tolist()) == list(range(len(batch.sources)))
    read: dict[int, int] = dict(
        zip(batch.singles.tolist(), batch.single_reads.tolist(), strict=True)
    )
    for row in batch.singles:
        at = read[row]
        assert batch.sources[at] == tokens[row][-1 if last else 0]
    for size, part in batch.merged.items():
        assert part.members.shape == (size, len(part.targets))
        for group, reads in zip(part.rows.tolist(), part.reads.tolist(), strict=True):
            for slot, (row, at) in enumerate(zip(group, reads, strict=True)):
                read[row] = at
                # The member's own token is what the composite merges where it is read.
                [place] = np.flatnonzero(part.targets == at)
                assert part.members[slot, place] == tokens[row][-1 if last else 0]
                own = part.members[slot]
                assert [t for t in own.tolist() if t in tokens[row]] == tokens[row]
    assert sorted(read) == list(range(len(lengths)))
