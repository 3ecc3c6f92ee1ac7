"""Schedulers that keep cache entries apart that are not the same."""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from vllm_effplugin.engine.admission import efficiency_of
from vllm_effplugin.techniques.early_exit.request import cache_policy


class _SaltedRequests:
    """Requests whose cache entries are not the model's alone share blocks with their like only.

    The prefix cache finds blocks by a hash over their tokens, which starts from the request's
    `cache_salt`. Such a request gets one that names its policy.
    """

    def __init__(self, vllm_config: VllmConfig, **kwargs: Any) -> None:
        super().__init__(vllm_config=vllm_config, **kwargs)  # type: ignore[call-arg]
        early_exit = efficiency_of(vllm_config.model_config.hf_config).early_exit
        assert early_exit is not None
        self._early_exit = early_exit

    def add_request(self, request: Request) -> None:
        params = request.sampling_params
        if request.resumable and params is not None:
            # A session that goes on with further input keeps its cache, which must owe nothing.
            params.extra_args = {**(params.extra_args or {}), "exit": False}
        policy = cache_policy(self._early_exit, params.extra_args if params else None)
        if policy is not None and request.request_id not in self.requests:  # type: ignore[attr-defined]
            request.cache_salt = f"{request.cache_salt or ''}|{policy}"
            request.block_hashes.clear()
            request.update_block_hashes()
        super().add_request(request)  # type: ignore[misc]


class _SaltedScheduler(_SaltedRequests, Scheduler):
    pass


class _SaltedAsyncScheduler(_SaltedRequests, AsyncScheduler):
    pass


def salted_scheduler(vllm_config: VllmConfig, **kwargs: Any) -> Scheduler:
    """The scheduler that vLLM would choose, with salted requests. For `scheduler_cls`.

    A function, because vLLM decides on asynchronous scheduling only after `scheduler_cls` is set.
    """
    asynchronous = vllm_config.scheduler_config.async_scheduling
    cls = _SaltedAsyncScheduler if asynchronous else _SaltedScheduler
    return cls(vllm_config=vllm_config, **kwargs)
