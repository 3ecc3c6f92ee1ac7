"""Runner V1: gives the model a view of the requests behind a batch's rows.

A model that treats requests differently has to know which request each row belongs to, and when
requests end. Runner V2 tells it through `ModelState` (v2_state.py). Runner V1 has no such
interface, so a subclass of its worker (worker.py) shows the runner's tables to the model
(patches/README.md, "rows of runner V1").
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_effplugin.engine.batch import Rows


class V1Rows:
    """Row source over runner V1's persistent batch.

    Args:
        runner: the model runner.
        admit: called with a slot and the request's parameters when it gets the slot.
        release: called with the slot when the request has ended or lost its cache.
    """

    def __init__(self, runner: Any, admit: Any, release: Any) -> None:
        self._runner = runner
        self._admit, self._release = admit, release
        self._slot_of: dict[str, int] = {}
        self._free = list(range(runner.max_num_reqs - 1, -1, -1))
        self._ids: list[str] = []
        self._slots = np.zeros(0, dtype=np.int64)

    def release(self, requests: set[str]) -> None:
        """Requests that ended or lost their cache."""
        for request in requests:
            slot = self._slot_of.pop(request, None)
            if slot is not None:
                self._free.append(slot)
                self._release(slot)
                self._ids = []

    def slots(self) -> np.ndarray:
        """Slots of the requests of the step that the runner is about to run."""
        batch = self._runner.input_batch
        ids = batch.req_ids[: batch.num_reqs]
        if ids != self._ids:
            self._slots = np.array([self._slot(request) for request in ids], dtype=np.int64)
            self._ids = list(ids)
        return self._slots

    def names(self) -> list[str]:
        """Ids of the same requests."""
        batch = self._runner.input_batch
        return list(batch.req_ids[: batch.num_reqs])

    def rows(self) -> Rows:
        """The rows of that step."""
        batch = self._runner.input_batch
        count = batch.num_reqs
        slots = self.slots()
        starts = batch.num_computed_tokens_cpu[:count].astype(np.int64)
        ends = self._runner.query_start_loc.np
        lengths = np.subtract(ends[1 : count + 1], ends[:count], dtype=np.int64)
        decodes = (
            (lengths == 1)
            & (starts >= batch.num_prompt_tokens[:count])
            & (starts + 1 >= batch.num_tokens_no_spec[:count])
        )
        completes = starts + lengths >= batch.num_prompt_tokens[:count]
        return Rows(slots, starts, lengths, decodes, completes)

    def _slot(self, request: str) -> int:
        slot = self._slot_of.get(request)
        if slot is None:
            slot = self._slot_of[request] = self._free.pop()
            state = self._runner.requests[request]
            self._admit(slot, state.sampling_params or state.pooling_params)
        return slot
