"""What a technique did, at `/metrics`.

Workers and schedulers count in processes of their own. vLLM's statistics have no field for a
model's own figures (patches/README.md, "statistics of a model"), so each publishes its totals in a
small shared file, and a Prometheus collector in the API server's process reads it when it is asked.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vllm_effplugin.engine.counters import Counters, Layout, counters_path, read

LABELS = ["model_name", "engine"]
"""Of every sample; a family may have more behind them."""


class Families:
    """Metric families by name, made where they are first used."""

    def __init__(self) -> None:
        self._counters: dict[str, CounterMetricFamily] = {}
        self._gauges: dict[str, GaugeMetricFamily] = {}

    def counter(self, name: str, help: str, *labels: str) -> CounterMetricFamily:
        """A total."""
        if name not in self._counters:
            self._counters[name] = CounterMetricFamily(name, help, labels=[*LABELS, *labels])
        return self._counters[name]

    def gauge(self, name: str, help: str, *labels: str) -> GaugeMetricFamily:
        """A figure that goes up and down."""
        if name not in self._gauges:
            self._gauges[name] = GaugeMetricFamily(name, help, labels=[*LABELS, *labels])
        return self._gauges[name]

    def all(self) -> list[Metric]:
        """Those that have been made."""
        return [*self._counters.values(), *self._gauges.values()]


class Reporter(ABC):
    """How a technique shows its totals."""

    layout: Layout

    @abstractmethod
    def show(self, totals: Counters, labels: list[str], families: Families) -> None:
        """Add one engine's samples.

        Args:
            labels: values of `LABELS`.
        """


@dataclass(frozen=True)
class _Watched:
    """A part of an engine, whose totals are shown."""

    model_name: str
    engine: int
    instance: str
    part: str
    reporter: Reporter

    def totals(self) -> Counters | None:
        try:
            path = counters_path(self.instance, self.engine, self.part)
            return read(path, self.reporter.layout)
        except (OSError, ValueError):
            return None  # not started yet, gone, or on another machine


class TotalsCollector(Collector):
    """Shows the totals of the engines that this process started.

    Args:
        registry: where it is registered with the first of them.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._registry = registry
        self._watched: dict[tuple[str, int, str], _Watched] = {}

    def watch(
        self,
        instance: str,
        model_name: str,
        reporter: Reporter,
        replicas: int = 1,
        part: str = "worker",
    ) -> None:
        """Show a part of an engine from now on.

        Args:
            instance: the engine's `instance_id`.
            replicas: data-parallel engines.
        """
        if not self._watched:
            self._registry.register(self)
        for engine in range(replicas):
            watched = _Watched(model_name, engine, instance, part, reporter)
            self._watched[instance, engine, part] = watched

    def collect(self) -> Iterable[Metric]:
        """All families, with samples of each engine that has totals."""
        families = Families()
        for watched in self._watched.values():
            totals = watched.totals()
            if totals is not None:
                labels = [watched.model_name, str(watched.engine)]
                watched.reporter.show(totals, labels, families)
        return families.all()


COLLECTOR = TotalsCollector()
"""Of this process; registered with the first engine that counts."""
