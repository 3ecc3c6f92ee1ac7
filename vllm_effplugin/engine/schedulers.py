"""Schedulers that keep cache entries apart that are not the same."""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from vllm_effplugin.engine.settings import efficiency_of
from vllm_effplugin.techniques.early_exit.request import cache_policy
from vllm_effplugin.techniques.joint_exit.request import engine_request


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
        may_leave = engine_request(params.extra_kwargs if params else None).exit
        return f"joint_exit:{request.request_id}" if may_leave else None


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
