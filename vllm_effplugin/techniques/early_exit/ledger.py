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


class Ledger:
    """Debts of up to `slots` requests.

    Args:
        slots: most requests at a time.
        exits: number of exits.
        max_pending: most positions of a request that may wait.
        block_size: positions of a block of the KV cache.
    """

    def __init__(self, slots: int, exits: int, max_pending: int, block_size: int) -> None:
        self.owed = np.zeros((slots, exits), dtype=np.int64)
        self._max_pending = max_pending
        self._block_size = block_size

    def open(self, slot: int) -> None:
        """A new request: owes nothing, whatever position it starts from."""
        self.owed[slot] = np.iinfo(np.int64).max

    def begin(self, slots: Ints, starts: Ints, exits: Ints) -> None:
        """Rows are scheduled from `starts` on; whatever waited from there on is run again.

        Rows for which `exits` is false never leave and owe nothing. They are not followed while
        no other request is in the batch.
        """
        owed = np.where(exits[:, None], self.owed[slots], np.iinfo(np.int64).max)
        self.owed[slots] = np.minimum(owed, starts[:, None])

    def has_pending(self, slots: Ints, starts: Ints) -> Ints:
        """Rows for which positions before `starts` wait."""
        return self.owed[slots, -1] < starts

    def must_finish(self, slots: Ints, positions: Ints) -> Ints:
        """Rows that have to run all layers at `positions`: block or waiting room is full."""
        fills = (positions + 1) % self._block_size == 0
        return fills | (positions + 1 - self.owed[slots, -1] > self._max_pending)

    def passed(self, slots: Ints, exits: int, positions: Ints) -> None:
        """Rows ran everything up to `positions` behind the first `exits` exits."""
        self.owed[slots, :exits] = positions[:, None] + 1
