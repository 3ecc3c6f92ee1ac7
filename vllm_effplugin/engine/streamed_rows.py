"""Hidden states that reach an engine's workers a few positions at a time.

vLLM hands a session's whole prompt to its workers with each piece of input: for hidden states that
would copy and send, for each token, all that came before it. So a step carries new rows only, and
workers keep what they had.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


class GrowingRows:
    """A matrix that grows at its end, at a cost that follows what is added.

    Args:
        first: `[n, d]`.
    """

    def __init__(self, first: torch.Tensor) -> None:
        self._room, self._count = first, len(first)

    @property
    def all(self) -> torch.Tensor:
        """All rows so far; a view that later rows leave as it is."""
        return self._room[: self._count]

    def add(self, rows: torch.Tensor) -> torch.Tensor:
        """Append `[n, d]`; all rows."""
        count = self._count + len(rows)
        if count > len(self._room):
            room = self._room.new_empty(max(count, 2 * len(self._room)), self._room.shape[1])
            room[: self._count] = self.all
            self._room = room
        self._room[self._count : count] = rows
        self._count = count
        return self.all


class SentRows:
    """The scheduler's side: which rows a request's workers have."""

    def __init__(self) -> None:
        self._sent: dict[str, int] = {}

    def cut(self, output: SchedulerOutput) -> None:
        """Leave in a step's new requests the rows that no step before it had."""
        for data in output.scheduled_new_reqs:
            if data.prompt_embeds is not None:
                sent, count = self._sent.get(data.req_id, 0), len(data.prompt_embeds)
                # A view would be sent with all that it is a part of.
                data.prompt_embeds = data.prompt_embeds[sent:].clone()
                self._sent[data.req_id] = count

    def forget(self, name: str) -> None:
        """A request is over."""
        self._sent.pop(name, None)


class ReceivedRows:
    """A worker's side: the rows of each request so far."""

    def __init__(self) -> None:
        self._rows: dict[str, GrowingRows] = {}

    def complete(self, output: SchedulerOutput) -> None:
        """Put back into a step's new requests what `SentRows.cut` left out."""
        for name in output.finished_req_ids:
            self._rows.pop(name, None)
        for data in output.scheduled_new_reqs:
            if data.prompt_embeds is not None:
                known = self._rows.get(data.req_id)
                if known is None:
                    self._rows[data.req_id] = GrowingRows(data.prompt_embeds)
                else:
                    data.prompt_embeds = known.add(data.prompt_embeds)
