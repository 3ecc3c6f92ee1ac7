"""Workers of a model with exits, and of the cloud; named in `worker_cls`, vLLM's setting for that.

That of a model with exits measures costs at the end of start-up, answers `LLM.collective_rpc`, and
shows runner V1's rows. What they add for CPUs is in `cpu_worker.py`.
"""

from __future__ import annotations

import time
from copy import copy
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from vllm.v1.worker.gpu_worker import Worker

from vllm_effplugin.engine.settings import ANSWERS, EXIT_PARAMS, VERIFYING_EXIT_PARAMS
from vllm_effplugin.engine.streamed_rows import ReceivedRows
from vllm_effplugin.engine.v1_rows import V1Rows
from vllm_effplugin.errors import UnsupportedError
from vllm_effplugin.techniques.joint_exit.config import JointExitConfig

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput

    from vllm_effplugin.techniques.edge_cloud.desk import Desk, Question

PAUSE_S = 0.001
"""As vLLM's own loop pauses where it has nothing to run."""

DUMMY_CONTEXT = 128
"""Positions of a request, where there is room for them, while costs are measured."""


class CloudWorker(Worker):
    """vLLM's GPU worker, for sessions whose input is hidden states."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._rows = ReceivedRows()

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        self._rows.complete(scheduler_output)
        return super().execute_model(scheduler_output)


class EffpluginWorker(Worker):
    """vLLM's GPU worker, whose model knows the requests behind its rows."""

    _v1_rows: V1Rows | None = None

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
        if not self.use_v2_model_runner:
            model = self.model_runner.get_model()
            self._v1_rows = V1Rows(self.model_runner, model.admit_request, model.release_request)
            model.attach(self._v1_rows)
        elif not self._exits.attached:
            raise UnsupportedError(
                "vLLM's model runner V2 did not ask the model for its state, without which nothing "
                "can leave early: `effplugin doctor` names what changed in vLLM"
            )

    def take_draft_token_ids(self) -> Any:
        # Runner V1: where a request comes near the model's length limit, it does not draft and
        # hands out zeros for all requests. They would be verified in vain, and keep tokens from
        # leaving.
        drafts = getattr(self.model_runner, "_draft_token_ids", None)
        if self._v1_rows is not None and isinstance(drafts, torch.Tensor):
            return None
        return super().take_draft_token_ids()

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        if self._v1_rows is not None:
            self._v1_rows.release(
                scheduler_output.finished_req_ids | (scheduler_output.preempted_req_ids or set())
            )
        desk = self._desk
        if desk is None:
            return super().execute_model(scheduler_output)
        desk.unpark(scheduler_output.preempted_req_ids or ())
        desk.close(scheduler_output.finished_req_ids)
        output = super().execute_model(scheduler_output)
        if output is None:  # tokens are sampled next
            return None
        if desk.waits:
            # Nothing ran. An engine in its caller's process would come back at once, for ever, and
            # leave the link's thread no time to hear the cloud.
            time.sleep(PAUSE_S)
        return self._answered(output, desk)

    def sample_tokens(self, grammar_output: Any) -> Any:
        output = super().sample_tokens(grammar_output)
        desk = self._desk
        return output if desk is None else self._answered(output, desk)

    @property
    def _desk(self) -> Desk | None:
        return getattr(self._exits, "desk", None) if self._v1_rows is not None else None

    def _answered(self, output: ModelRunnerOutput, desk: Desk) -> ModelRunnerOutput:
        """A step's output with the answers that came, and without the tokens that are asked for."""
        answers = desk.answers()
        for name, answer in answers.items():
            # The runner holds its own token; the request is not in its batch, which is made anew
            # from this.
            self.model_runner.requests[name].output_token_ids[-1] = answer.token
        given = {name: asdict(answer) for name, answer in answers.items()}
        questions: dict[str, Question] = self._exits.questions
        output = copy(output)  # an empty one is shared, and the scheduler adds what came
        output.req_ids, output.req_id_to_index = list(output.req_ids), dict(output.req_id_to_index)
        output.sampled_token_ids = list(output.sampled_token_ids)
        for name, question in questions.items():
            place = output.req_id_to_index[name]
            tokens = output.sampled_token_ids[place]
            if not tokens:
                continue
            refused = desk.park(name, question, tokens[-1])
            if refused is None:
                output.sampled_token_ids[place] = []
            else:
                given[name] = asdict(refused)
        questions.clear()
        desk.flush()
        setattr(output, ANSWERS, given)
        return output

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
        if self.use_v2_model_runner:
            self.model_runner._dummy_run(tokens, context_len=context - longest)
            return True
        self.model_runner._dummy_run(tokens, force_attention=True, profile_seq_lens=context)
        return True

    # --- For `LLM.collective_rpc` ----------------------------------------------------------------

    @property
    def _exits(self) -> Any:
        return self.model_runner.get_model().loop

    def loop_counters(self) -> dict[str, Any]:
        """What the model did since the start."""
        return self._exits.counters.as_dict()

    def exit_costs(self) -> dict[str, Any]:
        """What the exits' costs were measured to be."""
        return self._exits.describe_costs()

    def exit_layers(self) -> int:
        """Layers of the model."""
        return self._exits.num_layers

    def set_classifier_exits(self, config: str, tensors: str) -> None:
        """From now on, classify with other heads, gates and rule at the same depths.

        Args:
            config: of the exits, as JSON.
            tensors: file of their tensors.
        """
        self._exits.exits.replace(
            JointExitConfig.model_validate_json(config), load_file(tensors, str(self.device))
        )

    def set_group_sizes(self, sizes: list[int]) -> None:
        """From now on, merge groups of these sizes only.

        Args:
            sizes: some of those of the checkpoint.
        """
        self._exits.merge.sizes = tuple(sizes)

    def set_exit_shadow(self, share: float) -> None:
        """From now on, compare this share of the tokens that leave with the full model."""
        self._exits.shadow = share
