"""Candidate partitions measured by Ray actors, each with the model of its own.

Local processes by default; the cluster that `RAY_ADDRESS` names otherwise. Its nodes need this
package and the model directory under the same path.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from vllm_effplugin.techniques.layer_parallel.config import LayerParallelConfig
from vllm_effplugin.techniques.layer_parallel.search import (
    EVALUATION_THREADS,
    DamageMeter,
    Evaluator,
    Groups,
    LocalEvaluator,
)

logger = logging.getLogger(__name__)

LoadModel = Callable[[Path], Any]


@contextmanager
def open_evaluator(
    model_dir: Path,
    load_model: LoadModel,
    tokens: Tensor,
    execution: LayerParallelConfig,
    *,
    use_ray: bool,
) -> Iterator[Evaluator]:
    """An evaluator for one search; a Ray that it started is shut down afterwards.

    Args:
        model_dir: the model's checkpoint directory.
        load_model: loads it in fp32; a module-level function, as Ray sends it by name.
        tokens: `[B, S]` calibration token ids.
        execution: schedule and bypass of the groups.
        use_ray: False measures in this process, and so does True without Ray installed.
    """
    if use_ray and importlib.util.find_spec("ray") is None:
        logger.warning("Ray is not installed: the search runs in this process")
        use_ray = False
    if not use_ray:
        yield LocalEvaluator(DamageMeter(load_model(model_dir), tokens, execution))
        return

    import ray

    started = not ray.is_initialized()
    if started:
        address = os.environ.get("RAY_ADDRESS")
        local = {} if address else {"include_dashboard": False}
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
    try:
        yield RayEvaluator(model_dir, load_model, tokens, execution)
    finally:
        if started:
            ray.shutdown()


class RayEvaluator:
    """One actor per `EVALUATION_THREADS` CPUs of the cluster; see `open_evaluator`."""

    def __init__(
        self,
        model_dir: Path,
        load_model: LoadModel,
        tokens: Tensor,
        execution: LayerParallelConfig,
    ) -> None:
        import ray

        cpus = int(ray.cluster_resources().get("CPU", 1))
        # Ray sets OMP_NUM_THREADS=1 in its workers; the meter sets its own number of threads.
        actor_class = ray.remote(num_cpus=min(EVALUATION_THREADS, cpus))(_Worker)
        shared = ray.put(tokens)
        self._actors = [
            actor_class.remote(str(model_dir.absolute()), load_model, shared, execution)
            for _ in range(max(1, cpus // EVALUATION_THREADS))
        ]
        self.num_layers: int = ray.get(self._actors[0].num_layers.remote())

    def measure(self, candidates: Sequence[Groups]) -> Iterator[float]:
        """Yield the damage of each candidate, nats per token."""
        from ray.util import ActorPool

        pool = ActorPool(self._actors)
        yield from pool.map(lambda actor, groups: actor.kl.remote(groups), list(candidates))

    def cosine(self) -> tuple[float, ...]:
        """See `DamageMeter.cosine`."""
        import ray

        return ray.get(self._actors[0].cosine.remote())


class _Worker:
    """The actor: a `DamageMeter` behind Ray."""

    def __init__(
        self, model_dir: str, load_model: LoadModel, tokens: Tensor, execution: LayerParallelConfig
    ) -> None:
        self._meter = DamageMeter(load_model(Path(model_dir)), tokens, execution)

    def num_layers(self) -> int:
        return self._meter.num_layers

    def kl(self, groups: Groups) -> float:
        return self._meter.kl(groups)

    def cosine(self) -> tuple[float, ...]:
        return self._meter.cosine()
