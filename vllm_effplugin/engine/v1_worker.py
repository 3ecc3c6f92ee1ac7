"""Runner V1: gives the model a view of the requests behind a batch's rows.

A model that treats requests differently has to know which request each row belongs to, and when
requests end. Runner V2 tells it through `ModelState` (`add_request`, `remove_request`,
`prepare_attn`). Runner V1 has no such interface, so a subclass of its worker reads the runner's
tables (patches/README.md, "rows of runner V1"). It is named in `worker_cls`, which is vLLM's
setting for that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_effplugin.engine.admission import EXIT_PARAMS, VERIFYING_EXIT_PARAMS
from vllm_effplugin.engine.batch import Rows

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

DUMMY_CONTEXT = 128
"""Positions of a request, where there is room for them, while costs are measured."""


class V1Rows:
    """Row source over runner V1's persistent batch.

    Args:
        runner: the model runner.
        admit: called with a slot and the request's sampling parameters when it gets the slot.
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

    def rows(self) -> Rows:
        """The rows of that step."""
        batch = self._runner.input_batch
        count = batch.num_reqs
        slots = self.slots()
        starts = batch.num_computed_tokens_cpu[:count].astype(np.int64)
        lengths = np.diff(self._runner.query_start_loc.np[: count + 1]).astype(np.int64)
        decodes = (
            (lengths == 1)
            & (starts >= batch.num_prompt_tokens[:count])
            & (starts + 1 >= batch.num_tokens_no_spec[:count])
        )
        return Rows(slots, starts, lengths, decodes)

    def _slot(self, request: str) -> int:
        slot = self._slot_of.get(request)
        if slot is None:
            slot = self._slot_of[request] = self._free.pop()
            self._admit(slot, self._runner.requests[request].sampling_params)
        return slot


class EffpluginCPUWorker(CPUWorker):
    """vLLM's CPU worker, whose model knows the requests behind its rows."""

    def init_device(self) -> None:
        # With speculative decoding the runner refuses all custom logits processors. Ours only
        # validates, which the front end does; a new list, because in one process it shares this.
        model = self.vllm_config.model_config
        if self.vllm_config.speculative_config is not None:
            model.logits_processors = [
                name
                for name in model.logits_processors or []
                if name not in (EXIT_PARAMS, VERIFYING_EXIT_PARAMS)
            ]
        super().init_device()

    def load_model(self, **kwargs: Any) -> None:
        super().load_model(**kwargs)
        model = self.model_runner.get_model()
        self._rows = V1Rows(self.model_runner, model.admit_request, model.release_request)
        model.attach(self._rows)

    def take_draft_token_ids(self) -> Any:
        # Where a request comes near the model's length limit, the runner does not draft and hands
        # out zeros for all requests. They would be verified in vain, and keep tokens from leaving.
        if isinstance(self.model_runner._draft_token_ids, torch.Tensor):
            return None
        return super().take_draft_token_ids()

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        self._rows.release(
            scheduler_output.finished_req_ids | (scheduler_output.preempted_req_ids or set())
        )
        return super().execute_model(scheduler_output)

    def compile_or_warm_up_model(self) -> Any:
        times = super().compile_or_warm_up_model()
        self.model_runner.get_model().measure_costs(self._run_dummy)
        return times

    def _run_dummy(self, tokens: int) -> bool:
        """Run the model, attention included, on so many tokens of requests that are none.

        Returns:
            whether as many requests as there may be can have so many tokens; nothing ran if not.
        """
        requests = min(tokens, self.scheduler_config.max_num_seqs)
        longest = tokens // requests + tokens % requests
        if longest > self.model_config.max_model_len:
            return False
        # Without a length of its own, each request would be taken to have all the tokens behind it,
        # and attention would read the block table beyond its end.
        context = min(max(longest, DUMMY_CONTEXT), self.model_config.max_model_len)
        self.model_runner._dummy_run(
            tokens,
            cudagraph_runtime_mode=CUDAGraphMode.NONE,
            force_attention=True,
            profile_seq_lens=context,
        )
        return True

    # --- For `LLM.collective_rpc` ----------------------------------------------------------------

    @property
    def _exits(self) -> Any:
        return self.model_runner.get_model().model.exit_loop

    def exit_costs(self) -> dict[str, Any]:
        """What the exits' costs were measured to be."""
        return self._exits.describe_costs()

    def exit_counters(self) -> dict[str, Any]:
        """What the exits did since the start."""
        return self._exits.counters.as_dict()

    def exit_layers(self) -> int:
        """Layers of the model."""
        return self._exits.num_layers

    def set_exit_shadow(self, share: float) -> None:
        """From now on, compare this share of the tokens that leave with the full model."""
        self._exits.shadow = share
