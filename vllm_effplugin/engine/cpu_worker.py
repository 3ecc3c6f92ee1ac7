"""The workers of `worker.py` on CPU.

Apart from the other, because vLLM's module that is imported here replaces CUDA's streams, events
and pinned memory in the whole process: on a GPU it must never be imported.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_effplugin.engine.settings import verifies
from vllm_effplugin.engine.v1_verifier import Verifier
from vllm_effplugin.engine.worker import CloudWorker, EffpluginWorker


class EffpluginCPUWorker(EffpluginWorker, CPUWorker):
    """The same over vLLM's CPU worker."""

    def load_model(self, **kwargs: Any) -> None:
        super().load_model(**kwargs)
        if verifies(self.vllm_config):
            self.model_runner.rejection_sampler = Verifier(self.model_runner.rejection_sampler)


class CloudCPUWorker(CloudWorker, CPUWorker):
    """The same over vLLM's CPU worker."""
