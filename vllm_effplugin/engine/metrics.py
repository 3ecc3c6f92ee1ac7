"""What exits did, at `/metrics`.

Workers count in processes of their own. vLLM's statistics have no field for a model's own figures
(patches/README.md, "statistics of a model"), so a worker publishes its totals in a small shared
file, and a Prometheus collector in the API server's process reads it when it is asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vllm_effplugin.techniques.early_exit.counters import Counters, counters_path, read

_LABELS = ["model_name", "engine"]

_COUNTERS = {
    "decoded": ("decode_tokens", "Decoded tokens that might have left early."),
    "left": ("compacted_rows", "Tokens that left the batch, so that deeper layers ran without."),
    "recomputed": ("recomputed_tokens", "Waiting tokens that deeper layers ran later."),
    "layer_tokens": ("layer_tokens", "Layers run times tokens, prompts included."),
    "full_layer_tokens": ("full_layer_tokens", "What layer_tokens would be without exits."),
    "shadowed": ("shadow_tokens", "Tokens that left and ran all layers for comparison."),
    "shadow_agreed": ("shadow_agreed_tokens", "Of these, those on which exit and model agree."),
}


@dataclass(frozen=True)
class _Watched:
    """One engine whose totals are shown."""

    model_name: str
    engine: int
    instance: str
    depths: Sequence[int]
    num_layers: int

    def totals(self) -> Counters | None:
        try:
            return read(counters_path(self.instance, self.engine), len(self.depths))
        except (OSError, ValueError):
            return None  # not started yet, gone, or on another machine


class ExitCollector(Collector):
    """Shows the totals of the engines that this process started.

    Args:
        registry: where it is registered with the first of them.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._registry = registry
        self._watched: dict[tuple[str, int], _Watched] = {}

    def watch(
        self,
        instance: str,
        model_name: str,
        depths: Sequence[int],
        num_layers: int,
        replicas: int = 1,
    ) -> None:
        """Show an engine from now on.

        Args:
            instance: the engine's `instance_id`.
            depths: its exits.
            replicas: data-parallel engines.
        """
        if not self._watched:
            self._registry.register(self)
        for engine in range(replicas):
            watched = _Watched(model_name, engine, instance, tuple(depths), num_layers)
            self._watched[instance, engine] = watched

    def collect(self) -> Iterable[Metric]:
        """All families, with a sample per engine that has totals."""
        exits = CounterMetricFamily(
            "effplugin_exit_tokens", "Tokens whose gate fired.", labels=[*_LABELS, "depth"]
        )
        counters = {
            name: CounterMetricFamily(f"effplugin_exit_{public}", help, labels=_LABELS)
            for name, (public, help) in _COUNTERS.items()
        }
        depth = GaugeMetricFamily(
            "effplugin_exit_mean_depth",
            "Layers per token since the start, those of exits and drafts included.",
            labels=_LABELS,
        )
        backlog = GaugeMetricFamily(
            "effplugin_exit_pending_tokens",
            "Tokens that wait for the layers that they skipped.",
            labels=_LABELS,
        )
        for watched in self._watched.values():
            totals = watched.totals()
            if totals is None:
                continue
            labels = [watched.model_name, str(watched.engine)]
            for layers, count in zip(watched.depths, totals.exits, strict=True):
                exits.add_metric([*labels, str(layers)], count)
            for name, family in counters.items():
                family.add_metric(labels, totals[name])
            full = totals["full_layer_tokens"]
            share = totals["layer_tokens"] / full if full else 1.0
            depth.add_metric(labels, watched.num_layers * share)
            backlog.add_metric(labels, totals["pending"])
        return [exits, *counters.values(), depth, backlog]


COLLECTOR = ExitCollector()
"""Of this process; registered with the first engine that has exits."""
