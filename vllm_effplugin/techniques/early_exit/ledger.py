"""What each request owes the KV cache under `recompute`: pure bookkeeping, on the host.

A token that leaves at exit `e` owes the layers behind `e`. They run later, when a token of the
same request goes past `e`: it takes the waiting ones along, because its attention reads their
keys and values. So behind every exit, what is computed is a prefix of the request's positions,
and `owed[slot, e]` is the first position that is not. Deeper exits wait for more: `owed` does not
increase with `e`.

Waiting tokens always lie in the request's last block: the position that fills a block runs all
layers and takes along what waits. Every full block is exact, so it may enter the prefix cache.

Arrays have one entry per row of the batch; `slots` names the rows' requests.
"""

from __future__ import annotations

import numpy as np

Ints = np.ndarray

NOTHING = np.iinfo(np.int64).max
"""Owed by a request of which nothing waits."""


class Ledger:
    """Debts of up to `slots` requests.

    Args:
        slots: most requests at a time.
        exits: number of exits.
        max_pending: most positions of a request that may wait.
        block_size: positions of a block of the KV cache.
    """

    def __init__(self, slots: int, exits: int, max_pending: int, block_size: int) -> None:
        self.owed = np.full((slots, exits), NOTHING)
        self._backlog = np.zeros(slots, dtype=np.int64)
        self._max_pending = max_pending
        self.block_size = block_size

    def open(self, slot: int) -> None:
        """A new request: owes nothing, whatever position it starts from."""
        self.owed[slot] = NOTHING
        self._backlog[slot] = 0

    @property
    def backlog(self) -> int:
        """Tokens that wait."""
        return int(self._backlog.sum())

    def has_pending(self, slots: Ints) -> Ints:
        """Rows of which positions wait."""
        return self.owed[slots, -1] != NOTHING

    def joining(self, slots: Ints, exit: int, firsts: Ints) -> Ints:
        """Positions before `firsts` that wait at an exit, and have to go along behind it."""
        return firsts - np.minimum(self.owed[slots, exit], firsts)

    def must_finish(self, slots: Ints, positions: Ints) -> Ints:
        """Rows that have to run all layers at `positions`: block or waiting room is full."""
        fills = (positions + 1) % self.block_size == 0
        first = np.minimum(self.owed[slots, -1], positions)
        return fills | (positions + 1 - first > self._max_pending)

    def leave(self, slots: Ints, exit: int, firsts: Ints, lasts: Ints) -> None:
        """Rows leave at an exit, up to which positions `firsts` to `lasts` ran."""
        self.owed[slots, :exit] = NOTHING
        self.owed[slots, exit:] = np.minimum(self.owed[slots, exit:], firsts[:, None])
        self._backlog[slots] = lasts + 1 - self.owed[slots, -1]

    def settle(self, slots: Ints) -> None:
        """Rows ran all layers, and so did what waited of them."""
        self.owed[slots] = NOTHING
        self._backlog[slots] = 0
