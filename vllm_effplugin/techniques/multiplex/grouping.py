"""Which sequences of a step run as one, and where their tokens lie. Pure.

A composite is as long as its longest member, so that members of similar length waste least. Groups
live for one step: whoever knows the step's requests can form them, and so the scheduler, which
decides who is in a step, and the model, which runs it, need to exchange nothing else. After a
preemption or an abort there is nothing to mend.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

OVERHEAD = 0.04
"""Of merging a token and taking it apart, relative to running it through the merged layers. Three
squares of the hidden size against more than ten per layer: a third of a layer, over some ten."""


def form_groups(
    lengths: Sequence[int], tenants: Sequence[Hashable | None], sizes: Sequence[int]
) -> list[tuple[int, ...]]:
    """The groups with the smallest cost; whoever is in none runs alone.

    The cost of a composite is its length, of a sequence alone its own. Sorted by length, the
    members of a group of the best grouping stand side by side, so that one pass finds it.

    Args:
        lengths: of the sequences.
        tenants: sequences merge with those of the same tenant only; None never merges.
        sizes: numbers of members that a group may have.

    Returns:
        tuples of indices, which take the slots in this order: the shortest first, so that it does
        not matter in what order a runner keeps sequences of different lengths.
    """
    rows_of: dict[Hashable, list[int]] = defaultdict(list)
    for row, tenant in enumerate(tenants):
        if tenant is not None:
            rows_of[tenant].append(row)
    found: list[tuple[int, ...]] = []
    for rows in rows_of.values():
        rows.sort(key=lambda row: (lengths[row], row))
        found += _groups_of(rows, lengths, sizes)
    return sorted(found)


def _groups_of(
    rows: Sequence[int], lengths: Sequence[int], sizes: Sequence[int]
) -> list[tuple[int, ...]]:
    """Of one tenant's rows by increasing length."""
    cost = [0.0]
    taken = [0]
    for end, row in enumerate(rows, start=1):
        best, members = cost[end - 1] + lengths[row], 1
        for size in sizes:
            if size <= end:
                merged = cost[end - size] + lengths[row] * (1 + OVERHEAD)
                if merged < best:
                    best, members = merged, size
        cost.append(best)
        taken.append(members)
    found = []
    end = len(rows)
    while end:
        if taken[end] > 1:
            found.append(tuple(rows[end - taken[end] : end]))
        end -= taken[end]
    return found


@dataclass(frozen=True)
class Merged:
    """The composites of one size in a batch of composites and single sequences.

    Attributes:
        members: `[N, C]` the token of each member at each of the composites' `C` tokens, among the
            tokens before merging; -1 where the member has ended.
        targets: `[C]` where those tokens lie in the new batch.
        rows: `[G, N]` rows of the members, before merging.
        reads: `[G, N]` tokens of the new batch at which the members are read.
    """

    members: np.ndarray
    targets: np.ndarray
    rows: np.ndarray
    reads: np.ndarray


@dataclass(frozen=True)
class Batch:
    """A batch of composites and single sequences.

    A composite takes the place of its longest member, whose positions and cache slots it has.

    Attributes:
        rows: `[K]` rows that stay, increasing.
        lengths: `[K]` their numbers of tokens.
        sources: for each token of the new batch, the token before merging whose position and slot
            it has.
        singles: rows that run alone.
        single_targets: where the tokens of those lie in the new batch.
        single_reads: tokens of the new batch at which they are read.
        merged: composites by number of members.
    """

    rows: np.ndarray
    lengths: np.ndarray
    sources: np.ndarray
    singles: np.ndarray
    single_targets: np.ndarray
    single_reads: np.ndarray
    merged: dict[int, Merged]


def lay_out(lengths: np.ndarray, groups: Sequence[tuple[int, ...]], *, last: bool) -> Batch:
    """Where everything lies once groups are merged.

    Args:
        lengths: `[R]` tokens of each row.
        groups: of rows.
        last: whether a sequence is read at its last token, or at its first.
    """
    starts = np.cumsum(lengths) - lengths
    longest = [max(group, key=lambda row: lengths[row]) for group in groups]
    grouped = np.zeros(len(lengths), dtype=bool)
    grouped[[row for group in groups for row in group]] = True
    singles = np.flatnonzero(~grouped)
    rows = np.sort(np.concatenate([singles, np.array(longest, dtype=np.int64)]))
    kept = lengths[rows]
    new_starts = dict(zip(rows.tolist(), (np.cumsum(kept) - kept).tolist(), strict=True))

    def tokens(row: int, start: int) -> np.ndarray:
        return start + np.arange(lengths[row])

    def read(row: int, start: int) -> int:
        return start + (int(lengths[row]) - 1 if last else 0)

    of_size: dict[int, list[tuple[tuple[int, ...], int]]] = defaultdict(list)
    for group, carrier in zip(groups, longest, strict=True):
        of_size[len(group)].append((group, carrier))
    merged = {}
    for size, those in sorted(of_size.items()):
        members = []
        for group, carrier in those:
            part = np.full((size, lengths[carrier]), -1, dtype=np.int64)
            for slot, row in enumerate(group):
                part[slot, : lengths[row]] = tokens(row, starts[row])
            members.append(part)
        merged[size] = Merged(
            members=np.concatenate(members, axis=1),
            targets=np.concatenate([tokens(carrier, new_starts[carrier]) for _, carrier in those]),
            rows=np.array([group for group, _ in those]),
            reads=np.array(
                [[read(row, new_starts[carrier]) for row in group] for group, carrier in those]
            ),
        )
    nothing = np.zeros(0, dtype=np.int64)
    return Batch(
        rows=rows,
        lengths=kept,
        sources=np.concatenate([nothing, *(tokens(row, starts[row]) for row in rows)]),
        singles=singles,
        single_targets=np.concatenate(
            [nothing, *(tokens(row, new_starts[row]) for row in singles.tolist())]
        ),
        single_reads=np.array([read(row, new_starts[row]) for row in singles.tolist()], np.int64),
        merged=merged,
    )
