"""Schedulers that keep cache entries apart that are not the same, and let requests merge."""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from vllm_effplugin.engine.counters import publish_for
from vllm_effplugin.engine.settings import ANSWERS, STATES, efficiency_of
from vllm_effplugin.engine.streamed_rows import GrowingRows, SentRows
from vllm_effplugin.techniques.early_exit.request import cache_policy
from vllm_effplugin.techniques.edge_cloud.config import CloudConfig, EdgeConfig
from vllm_effplugin.techniques.edge_cloud.gather import CloudGather, EdgeGather
from vllm_effplugin.techniques.edge_cloud.request import requested_mode
from vllm_effplugin.techniques.edge_cloud.totals import EDGE_TOTALS, ORIGINS
from vllm_effplugin.techniques.joint_exit import request as exit_request
from vllm_effplugin.techniques.multiplex import request as mux_request
from vllm_effplugin.techniques.multiplex.queue import Admission, Room, Waiting
from vllm_effplugin.techniques.multiplex.totals import QUEUE_TOTALS

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput

FOLLOWED = 0.1
"""Weight of the newest observation in a running mean."""


class _SaltedRequests:
    """Requests whose cache entries are not the model's alone share blocks with their like only.

    The prefix cache finds blocks by a hash over their tokens, which starts from the request's
    `cache_salt`. Such a request gets one that names its policy. A sequence that may leave a
    classifier has no like: where it leaves, entries are missing that nothing makes up for.
    """

    def __init__(self, vllm_config: VllmConfig, **kwargs: Any) -> None:
        super().__init__(vllm_config=vllm_config, **kwargs)  # type: ignore[call-arg]
        self._efficiency = efficiency_of(vllm_config.model_config.hf_config)
        self._shares_blocks = vllm_config.cache_config.enable_prefix_caching

    def add_request(self, request: Request) -> None:
        params = request.sampling_params
        if request.resumable and params is not None:
            # A session that goes on with further input keeps its cache, which must owe nothing.
            params.extra_args = {**(params.extra_args or {}), "exit": False}
        policy = self._policy(request)
        if policy is not None and request.request_id not in self.requests:  # type: ignore[attr-defined]
            request.cache_salt = f"{request.cache_salt or ''}|{policy}"
            request.block_hashes.clear()
            request.update_block_hashes()
        super().add_request(request)  # type: ignore[misc]

    def _policy(self, request: Request) -> str | None:
        """What a request's entries have to be told from others by; None where by nothing."""
        if self._efficiency.early_exit is not None:
            params = request.sampling_params
            return cache_policy(self._efficiency.early_exit, params.extra_args if params else None)
        if not self._shares_blocks:
            return None
        params = request.pooling_params
        extra = params.extra_kwargs if params else None
        joint_exit, multiplex = self._efficiency.joint_exit, self._efficiency.multiplex
        leaves = joint_exit is not None and exit_request.engine_request(extra).exit
        merges = multiplex is not None and (
            mux_request.engine_request(extra).tenant(multiplex) is not None
        )
        return f"incomplete:{request.request_id}" if leaves or merges else None


class _WaitingSteps(_SaltedRequests):
    """Steps that may wait for more tokens to share them (techniques/edge_cloud/gather.py)."""

    @abstractmethod
    def _holds(self) -> bool:
        """Whether the next step waits."""

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        most = self.max_num_scheduled_tokens  # type: ignore[has-type]
        if self._holds():  # no request takes part, as when vLLM is paused
            self.max_num_scheduled_tokens = 0
        try:
            found: SchedulerOutput = super().schedule(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.max_num_scheduled_tokens = most
        return found


class _StreamedStates(_WaitingSteps):
    """Sessions whose input is hidden states, a few positions at a time: the cloud's.

    vLLM's streaming input carries tokens only. So the states come as an extra argument, and are put
    here where a prompt's embeddings are (patches/README.md, "embeddings in streaming input").
    Workers get the new ones only.
    """

    def __init__(self, vllm_config: VllmConfig, **kwargs: Any) -> None:
        super().__init__(vllm_config=vllm_config, **kwargs)
        self._width = vllm_config.model_config.get_hidden_size()
        cloud = self._efficiency.edge_cloud
        assert isinstance(cloud, CloudConfig)
        self._gather = CloudGather(cloud.gather_ms / 1e3)
        self._arrived: dict[str, deque[torch.Tensor]] = {}
        self._states: dict[str, GrowingRows] = {}
        self._sent = SentRows()

    def add_request(self, request: Request) -> None:
        params = request.sampling_params
        # The last call of a session has none, and ends it.
        if request.resumable and params is not None:
            self._gather.arrived(time.monotonic())
            raw = (params.extra_args or {}).pop(STATES, b"")
            states = torch.frombuffer(bytearray(raw), dtype=torch.float32).view(-1, self._width)
            if request.request_id in self.requests:  # type: ignore[attr-defined]
                self._arrived[request.request_id].append(states)
            else:
                self._arrived[request.request_id] = deque()
                self._states[request.request_id] = GrowingRows(states)
                request.prompt_embeds, request.prompt_token_ids = states, None
                request.block_hashes.clear()
                request.update_block_hashes()
        super().add_request(request)

    def _holds(self) -> bool:
        return self._gather.holds(time.monotonic())

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        found = super().schedule(*args, **kwargs)
        self._sent.cut(found)
        return found

    def _update_request_as_session(self, session: Request, update: Any) -> None:
        states = self._arrived[session.request_id].popleft()
        session.prompt_embeds = self._states[session.request_id].add(states)
        # A prompt of embeddings has no ids; the ones that vLLM counts positions by are put up for
        # it.
        session.prompt_token_ids = [0] * session.num_prompt_tokens
        super()._update_request_as_session(session, update)  # type: ignore[misc]
        session.prompt_token_ids = None

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self._arrived.pop(request.request_id, None)
        self._states.pop(request.request_id, None)
        self._sent.forget(request.request_id)
        return super()._free_request(request, *args, **kwargs)  # type: ignore[misc]


@dataclass
class _Report:
    """What a response says of the tokens that its request asked for.

    Attributes:
        origins: of those tokens.
        waited, computed: seconds, as in `Answer`.
    """

    origins: Counter[str] = field(default_factory=Counter)
    waited: float = 0.0
    computed: float = 0.0


class _ParkedRequests(_WaitingSteps):
    """Requests that wait for a token of the cloud: an edge's.

    A running request for which a step gave no token has nothing to compute, and is passed over with
    its cache until it has one. Its token arrives with a later step in which it took no part, as if
    it had (patches/README.md, "tokens from elsewhere").
    """

    def __init__(self, vllm_config: VllmConfig, **kwargs: Any) -> None:
        super().__init__(vllm_config=vllm_config, **kwargs)
        self._reports: dict[str, _Report] = {}
        self.counters = publish_for(self, vllm_config, EDGE_TOTALS, "scheduler")
        edge = self._efficiency.edge_cloud
        assert isinstance(edge, EdgeConfig)
        self._edge = edge
        self._gather = EdgeGather(edge.gather_ms / 1e3)
        self._alone: set[str] = set()
        """Requests that never ask."""

    def add_request(self, request: Request) -> None:
        params = request.sampling_params
        if requested_mode(self._edge, params.extra_args if params else None) == "standalone":
            self._alone.add(request.request_id)
        super().add_request(request)

    def _policy(self, request: Request) -> str | None:
        if request.request_id in self._alone:
            return super()._policy(request)
        # The cloud needs all hidden states, and the cache has none: only what ran in this request's
        # own name may be found there again.
        return f"edge_cloud:{request.request_id}"

    def _holds(self) -> bool:
        return self._gather.holds(*self._ready_and_parked(), time.monotonic())

    def _ready_and_parked(self) -> tuple[int, int]:
        """Requests that could go on and such that wait for the cloud; 0, 0 where none should wait:
        for prompts, and for those that never ask.
        """
        running: list[Request] = self.running  # type: ignore[attr-defined]
        most: int = self.max_num_running_reqs  # type: ignore[attr-defined]
        if self.waiting and len(running) < most:  # type: ignore[attr-defined]
            return 0, 0
        ready = [request for request in running if request.num_tokens > request.num_computed_tokens]
        for request in ready:
            prompt = request.num_computed_tokens < request.num_prompt_tokens
            if prompt or request.request_id in self._alone:
                return 0, 0
        return len(ready), len(running) - len(ready)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> Any:
        own = sum(map(len, model_runner_output.sampled_token_ids))
        for name, answer in getattr(model_runner_output, ANSWERS, {}).items():
            request: Request | None = self.requests.get(name)  # type: ignore[attr-defined]
            if request is None or request.is_finished():
                continue
            self._count(name, answer)
            if answer["token"] is None:  # the step has its own
                own -= 1
                continue
            scheduler_output.num_scheduled_tokens[name] = 1
            request.num_in_flight_tokens += 1
            model_runner_output.req_id_to_index[name] = len(model_runner_output.req_ids)
            model_runner_output.req_ids.append(name)
            model_runner_output.sampled_token_ids.append([answer["token"]])
        self.counters.add("tokens", own, ORIGINS.index("edge"))
        return super().update_from_output(  # type: ignore[misc]
            scheduler_output, model_runner_output
        )

    def _count(self, name: str, answer: Mapping[str, Any]) -> None:
        origin: str = answer["origin"]
        known = origin if origin in ORIGINS else "error"
        self.counters.add("tokens", 1, ORIGINS.index(known))
        report = self._reports.setdefault(name, _Report())
        report.origins[origin] += 1
        report.waited += answer["waited"]
        report.computed += answer["computed"]

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self._alone.discard(request.request_id)
        report = self._reports.pop(request.request_id, _Report())
        found = super()._free_request(request, *args, **kwargs)  # type: ignore[misc]
        if found is None:
            return found
        # vLLM's only field of a response that a scheduler can fill.
        own = request.num_output_tokens - report.origins.total()
        kv_transfer_params, *others = found
        told = {
            "tokens_by_origin": {"edge": own, **report.origins},
            "waited_s": round(report.waited, 6),
            "cloud_s": round(report.computed, 6),
        }
        return ({**(kv_transfer_params or {}), "effplugin": told}, *others)


class _MergingRequests(_SaltedRequests):
    """Starts requests so that those of a step merge well (techniques/multiplex/queue.py).

    vLLM starts waiting requests in order while there is room, and its `max_num_active_reqs` says
    how many may run: lowered for the time of one call, it says how many start.
    """

    def __init__(self, vllm_config: VllmConfig, **kwargs: Any) -> None:
        super().__init__(vllm_config=vllm_config, **kwargs)
        multiplex = self._efficiency.multiplex
        assert multiplex is not None
        self._multiplex = multiplex
        self._layers = vllm_config.model_config.hf_config.num_hidden_layers
        self._admission = Admission(multiplex, self._layers)
        self._tenants: dict[str, str | None] = {}
        self._passed_over: set[str] = set()
        self._held: dict[str, float] = {}
        self.counters = publish_for(self, vllm_config, QUEUE_TOTALS, "scheduler")
        self._last_arrival: float | None = None
        self._gap: float | None = None
        self._layer_token = self._last_output = 0.0
        self._started: deque[float] = deque()

    def add_request(self, request: Request) -> None:
        params = request.pooling_params
        asked = mux_request.engine_request(params.extra_kwargs if params else None)
        self._tenants[request.request_id] = asked.tenant(self._multiplex)
        now = time.monotonic()
        if self._last_arrival is not None:
            # Beyond twice the bound it makes no difference, and a lull would outweigh a burst.
            gap = min(now - self._last_arrival, self._multiplex.max_wait_ms / 500)
            self._gap = gap if self._gap is None else self._gap + FOLLOWED * (gap - self._gap)
        self._last_arrival = now
        super().add_request(request)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self._tenants.pop(request.request_id, None)
        self._passed_over.discard(request.request_id)
        self._held.pop(request.request_id, None)
        return super()._free_request(request, *args, **kwargs)  # type: ignore[misc]

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        most = self.max_num_active_reqs  # type: ignore[has-type]
        running = len(self.running) + self.num_waiting_for_streaming_input  # type: ignore[attr-defined]
        self.max_num_active_reqs = min(most, running + self._starting(most - running))
        try:
            found = super().schedule(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.max_num_active_reqs = most
        self._started.append(time.monotonic())
        return found

    def _starting(self, seats: int) -> int:
        """How many of the waiting requests start."""
        # What runs comes first.
        running: list[Request] = self.running  # type: ignore[attr-defined]
        budget: int = self.max_num_scheduled_tokens  # type: ignore[attr-defined]
        budget -= sum(request.num_tokens - request.num_computed_tokens for request in running)
        first = list(islice(self.waiting, seats + 1))  # type: ignore[attr-defined]
        if seats <= 0 or budget <= 0 or not first:
            return seats
        queue = self._queue(first)
        starts, fits = self._admission.starting(
            queue, Room(budget, seats, not running), self._expected_gap(), self._layer_token
        )
        names = [request.request_id for request in first[:fits]]
        self._count_held(names[:starts], names[starts:])
        if starts:
            self._passed_over = set(names[starts:])
        if starts == fits and (fits == len(queue) or queue[fits].tenant is None):
            # The next one, if there is one, may start in what is left of the step: in parts it
            # could not merge, and it will not.
            return seats
        return starts

    def _count_held(self, starting: list[str], held: list[str]) -> None:
        now = time.monotonic()
        for name in held:
            if name not in self._held:
                self._held[name] = now
                self.counters.add("passed_over" if starting else "held", 1)
        for name in self._held.keys() & starting:
            self.counters.add("held_us", round(1e6 * (now - self._held.pop(name))))

    def _queue(self, requests: Sequence[Request]) -> list[Waiting]:
        now = time.time()
        threshold: int = self.scheduler_config.long_prefill_token_threshold  # type: ignore[attr-defined]
        found = []
        for request in requests:
            length = request.num_tokens - request.num_computed_tokens
            tenant = self._tenants.get(request.request_id)
            if 0 < threshold < length:
                length, tenant = threshold, None  # it runs in parts
            over = request.request_id in self._passed_over
            found.append(Waiting(length, tenant, now - request.arrival_time, over))
        return found

    def _expected_gap(self) -> float:
        """Seconds until the next arrival, taken to be those between arrivals lately."""
        if self._gap is None or self._last_arrival is None:
            return math.inf
        return max(self._gap, time.monotonic() - self._last_arrival)

    def update_from_output(self, scheduler_output: SchedulerOutput, *args: Any) -> Any:
        # With asynchronous scheduling a step begins when the one before it has ended.
        now, began = time.monotonic(), max(self._started.popleft(), self._last_output)
        self._last_output = now
        tokens = scheduler_output.total_num_scheduled_tokens
        if tokens:
            taken = (now - began) / (tokens * self._layers)
            self._layer_token += (FOLLOWED if self._layer_token else 1.0) * (
                taken - self._layer_token
            )
        return super().update_from_output(scheduler_output, *args)  # type: ignore[misc]


class _SaltedScheduler(_SaltedRequests, Scheduler):
    pass


class _SaltedAsyncScheduler(_SaltedRequests, AsyncScheduler):
    pass


class _ParkedScheduler(_ParkedRequests, Scheduler):
    pass


class _StreamedStatesScheduler(_StreamedStates, Scheduler):
    pass


class _StreamedStatesAsyncScheduler(_StreamedStates, AsyncScheduler):
    pass


class _MergingScheduler(_MergingRequests, Scheduler):
    pass


class _MergingAsyncScheduler(_MergingRequests, AsyncScheduler):
    pass


def effplugin_scheduler(vllm_config: VllmConfig, **kwargs: Any) -> Scheduler:
    """The scheduler that vLLM would choose, with what the model needs. For `scheduler_cls`.

    A function, because vLLM decides on asynchronous scheduling only after `scheduler_cls` is set.
    """
    asynchronous = vllm_config.scheduler_config.async_scheduling
    cls: type[Scheduler]
    efficiency = efficiency_of(vllm_config.model_config.hf_config)
    if efficiency.is_edge:
        cls = _ParkedScheduler
    elif efficiency.edge_cloud is not None:
        cls = _StreamedStatesAsyncScheduler if asynchronous else _StreamedStatesScheduler
    elif efficiency.multiplex is not None:
        cls = _MergingAsyncScheduler if asynchronous else _MergingScheduler
    else:
        cls = _SaltedAsyncScheduler if asynchronous else _SaltedScheduler
    return cls(vllm_config=vllm_config, **kwargs)
