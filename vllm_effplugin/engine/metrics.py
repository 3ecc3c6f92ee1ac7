"""What techniques do, at `/metrics`.

Workers and schedulers count in processes of their own. vLLM's statistics have no field for a
model's own figures (patches/README.md, "statistics of a model"), so each publishes its totals in a
small shared file. Of tensor-parallel ranks, which all do the same, the first one counts.

One process of a server reads the files. With one API server it is that, whenever Prometheus asks.
Several API servers answer with what lies in a folder that vLLM has them share, the way of
Prometheus' own client for many processes: one of them copies the totals there, every second.
"""

from __future__ import annotations

import fcntl
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vllm_effplugin import __version__
from vllm_effplugin.engine.counters import (
    Counters,
    Layout,
    counters_path,
    read,
    shared_by_api_servers,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_effplugin.config import EfficiencyConfig
    from vllm_effplugin.plan import Plan

LABELS = ["model_name", "engine"]
"""Of every sample that an engine counted; a family may have more behind them."""

COPY_S = 1.0
"""How old a figure may be where it is a copy."""


class Families:
    """Metric families by name, made where they are first used."""

    def __init__(self) -> None:
        self._made: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}

    def counter(self, name: str, help: str, *labels: str) -> CounterMetricFamily:
        """A total, which Prometheus calls `{name}_total`."""
        made = self._made.setdefault(
            name, CounterMetricFamily(name, help, labels=[*LABELS, *labels])
        )
        assert isinstance(made, CounterMetricFamily)
        return made

    def gauge(self, name: str, help: str, *labels: str) -> GaugeMetricFamily:
        """A figure that goes up and down."""
        made = self._made.setdefault(name, GaugeMetricFamily(name, help, labels=[*LABELS, *labels]))
        assert isinstance(made, GaugeMetricFamily)
        return made

    def all(self) -> list[Metric]:
        """Those that have been made."""
        return list(self._made.values())


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


@dataclass(frozen=True)
class _Model:
    """What a checkpoint has an engine do."""

    name: str
    techniques: tuple[str, ...]
    layers: int
    depth: int


class TotalsCollector(Collector):
    """Shows what the models that this process serves do, and the totals of their engines.

    Args:
        expose: makes a collector seen; called once, with the first model.
    """

    def __init__(self, expose: Callable[[Collector], None]) -> None:
        self._expose = expose
        self._models: dict[str, _Model] = {}
        self._watched: dict[tuple[str, int, str], _Watched] = {}

    def serve(self, instance: str, name: str, efficiency: EfficiencyConfig, plan: Plan) -> None:
        """Show a model from now on.

        Args:
            instance: its engine's `instance_id`.
            name: as clients call it.
        """
        if not self._models:
            self._expose(self)
        self._models[instance] = _Model(name, efficiency.techniques, len(plan.unit_of), plan.depth)

    def watch(self, instance: str, reporter: Reporter, replicas: int, part: str) -> None:
        """Show a part of the engine of such a model from now on.

        Args:
            replicas: data-parallel engines.
        """
        name = self._models[instance].name
        for engine in range(replicas):
            watched = _Watched(name, engine, instance, part, reporter)
            self._watched[instance, engine, part] = watched

    def collect(self) -> Iterable[Metric]:
        """All families, with samples of each engine that has totals."""
        families = Families()
        for watched in self._watched.values():
            totals = watched.totals()
            if totals is not None:
                labels = [watched.model_name, str(watched.engine)]
                watched.reporter.show(totals, labels, families)
        return [*self._described(), *families.all()]

    def _described(self) -> list[Metric]:
        info = GaugeMetricFamily(
            "effplugin_info",
            "Always 1; what serves a model, and by which techniques.",
            labels=["model_name", "techniques", "version"],
        )
        layers = GaugeMetricFamily(
            "effplugin_layers", "Layers of the model.", labels=["model_name"]
        )
        depth = GaugeMetricFamily(
            "effplugin_sequential_layers",
            "Layers that follow one another, where parallel ones count as one.",
            labels=["model_name"],
        )
        for model in dict.fromkeys(self._models.values()):  # several engines may serve one
            info.add_metric([model.name, ",".join(model.techniques), __version__], 1)
            layers.add_metric([model.name], model.layers)
            depth.add_metric([model.name], model.depth)
        return [info, layers, depth]


def _counter(family: Metric, labels: list[str]) -> Any:
    return Counter(family.name, family.documentation, labels, registry=None)


def _gauge(family: Metric, labels: list[str]) -> Any:
    return Gauge(
        family.name, family.documentation, labels, registry=None, multiprocess_mode="mostrecent"
    )


class Copies:
    """Copies what a collector shows into metrics, for those who ask no collector.

    Args:
        counter, gauge: make the metric of a family, given its labels.
    """

    def __init__(
        self,
        collector: Collector,
        counter: Callable[[Metric, list[str]], Any] = _counter,
        gauge: Callable[[Metric, list[str]], Any] = _gauge,
    ) -> None:
        self._collector = collector
        self._make = {"counter": counter, "gauge": gauge}
        self._metrics: dict[str, Any] = {}
        self._seen: dict[tuple[str, tuple[str, ...]], float] = {}

    def update(self) -> None:
        """Bring the metrics up to date."""
        for family in self._collector.collect():
            for sample in family.samples:
                if family.name not in self._metrics:
                    made = self._make[family.type](family, list(sample.labels))
                    self._metrics[family.name] = made
                metric = self._metrics[family.name].labels(**sample.labels)
                if family.type == "gauge":
                    metric.set(sample.value)
                    continue
                key = (family.name, tuple(sample.labels.values()))
                before = self._seen.get(key, 0.0)
                # An engine that started anew starts from nothing.
                metric.inc(sample.value - before if sample.value >= before else sample.value)
                self._seen[key] = sample.value

    def keep(self, period_s: float = COPY_S) -> None:
        """Do so until this process ends."""

        def run() -> None:
            ended = threading.Event()
            while not ended.wait(period_s):
                self.update()

        threading.Thread(target=run, name="effplugin-metrics", daemon=True).start()


def expose(collector: Collector, registry: CollectorRegistry = REGISTRY) -> None:
    """Have a collector's samples in what `/metrics` answers."""
    folder = shared_by_api_servers()
    if folder is None:
        registry.register(collector)
    elif _first_in(folder):
        Copies(collector).keep()


def _first_in(folder: Path) -> bool:
    """Whether no living process of this server was told so before."""
    # Closed, and so unlocked, with the process.
    lock = os.open(folder / "effplugin.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return False
    return True


COLLECTOR = TotalsCollector(expose)
"""Of this process."""


def serves(vllm_config: VllmConfig, efficiency: EfficiencyConfig, plan: Plan) -> None:
    """Show at `/metrics` what serves a model."""
    if _answers(vllm_config):
        name = str(vllm_config.model_config.served_model_name)
        COLLECTOR.serve(vllm_config.instance_id, name, efficiency, plan)


def watch(vllm_config: VllmConfig, reporter: Reporter, part: str) -> None:
    """Show at `/metrics` what a part of its engine counts."""
    if _answers(vllm_config):
        replicas = vllm_config.parallel_config.data_parallel_size
        COLLECTOR.watch(vllm_config.instance_id, reporter, replicas, part)


def _answers(vllm_config: VllmConfig) -> bool:
    """Whether this process may be one that answers at `/metrics`; who starts API servers is not."""
    return vllm_config.parallel_config._api_process_rank >= 0
