"""The workers of `worker.py` on CPU.

Apart from the other, because vLLM's module that is imported here replaces CUDA's streams, events
and pinned memory in the whole process: on a GPU it must never be imported.
"""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_effplugin.engine.worker import CloudWorker, EffpluginWorker


class EffpluginCPUWorker(EffpluginWorker, CPUWorker):
    """The same over vLLM's CPU worker."""


class CloudCPUWorker(CloudWorker, CPUWorker):
    """The same over vLLM's CPU worker."""
