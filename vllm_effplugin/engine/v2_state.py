"""Runner V2: gives the model a view of the requests behind a batch's rows.

`ModelState` is the interface that vLLM offers for it: the model names a class of it
(`get_model_state_cls`), and the runner tells that which requests come, go, and run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.encoder_only import EncoderOnlyModelState

from vllm_effplugin.engine.batch import Rows

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.worker.gpu.input_batch import InputBatch


class V2Rows:
    """Row source over runner V2's batches."""

    def __init__(self) -> None:
        self.batch: InputBatch | None = None
        self._slots: np.ndarray | None = None

    def forget(self) -> None:
        """A request comes or goes: the slots' requests are others, whatever their numbers."""
        self._slots = None

    def slots(self) -> np.ndarray | None:
        """Slots of the requests of the step that the runner is about to run."""
        if self.batch is None:
            return None
        slots = self.batch.idx_mapping_np
        if self._slots is None or not np.array_equal(slots, self._slots):
            self._slots = slots.astype(np.int64)
        return self._slots

    def rows(self) -> Rows:
        """The rows of that step."""
        batch, slots = self.batch, self.slots()
        assert batch is not None
        assert slots is not None
        lengths = batch.num_scheduled_tokens.astype(np.int64)
        # What a preempted request had generated counts as its prompt here.
        decodes = (lengths == 1) & ~batch.is_prefilling_np
        starts = batch.num_computed_tokens_np.astype(np.int64)
        completes = starts + lengths >= batch.prefill_len_np
        return Rows(slots, starts, lengths, decodes, completes)


class _Rows:
    """Tells a model whose rows change on the way about its requests. Mixed into a model state."""

    model: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._rows = V2Rows()
        self._slot_of: dict[str, int] = {}
        self.model.attach(self._rows)

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)  # type: ignore[misc]
        self._slot_of[new_req_data.req_id] = req_index
        self._rows.forget()
        params = new_req_data.sampling_params or new_req_data.pooling_params
        self.model.admit_request(req_index, params)

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)  # type: ignore[misc]
        slot = self._slot_of.pop(req_id, None)
        if slot is not None:
            self._rows.forget()
            self.model.release_request(slot)

    def preprocess_state(self, input_batch: InputBatch, *args: Any, **kwargs: Any) -> None:
        """Called before `prepare_attn`, and for batches of real requests only."""
        super().preprocess_state(input_batch, *args, **kwargs)  # type: ignore[misc]
        self._rows.batch = input_batch

    def prepare_attn(self, input_batch: InputBatch, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if self._rows.batch is not input_batch:
            self._rows.batch = None  # a dummy run
        return super().prepare_attn(input_batch, *args, **kwargs)  # type: ignore[misc]


class RowsModelState(_Rows, DefaultModelState):
    """Of a decoder."""


class EncoderRowsModelState(_Rows, EncoderOnlyModelState):
    """Of an encoder."""
