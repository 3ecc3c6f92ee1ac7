"""Running totals, and how they get to `/metrics`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from vllm_effplugin import __version__
from vllm_effplugin.config import EfficiencyConfig, parse_efficiency
from vllm_effplugin.engine import metrics
from vllm_effplugin.engine.counters import Counters, counters_path, publish, read
from vllm_effplugin.engine.metrics import Copies, TotalsCollector
from vllm_effplugin.plan import Plan, build_plan
from vllm_effplugin.techniques.early_exit.totals import ExitReporter, exit_totals


def fill(counters: Counters) -> None:
    counters.add("decoded", 7)
    counters.add("layer_tokens", 150)
    counters.add("full_layer_tokens", 300)
    counters.add("exits", 4, 1)
    counters.set("pending", 3)


def test_another_process_reads_what_is_published(tmp_path: Path) -> None:
    path = tmp_path / "totals"
    counters = publish(path, exit_totals(2))
    seen = read(path, exit_totals(2))
    assert seen.as_dict() == Counters(exit_totals(2)).as_dict()
    fill(counters)
    assert seen.as_dict() == counters.as_dict()
    assert seen.numbers("exits") == [0, 4]
    assert path.stat().st_mode & 0o777 == 0o600
    assert publish(path, exit_totals(2))["decoded"] == 0, "a new engine starts from nothing"


def test_files_of_killed_processes_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of living ones, of others and of new processes stay."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    living, killed, new = (counters_path(name, 0) for name in ("living", "killed", "new"))
    totals = publish(living, exit_totals(2))
    other = tmp_path / "vllm-effplugin-999999-any-0-worker.counters"
    for path in (killed, new, other):
        path.write_bytes(bytes(8))
    pipe = counters_path("pipe", 0)
    os.mkfifo(pipe)
    for path in (living, killed, other, pipe):
        os.utime(path, (0, 0))
    publish(tmp_path / "any", exit_totals(2))
    assert not killed.exists()
    assert all(path.exists() for path in (living, new, other, pipe))
    del totals
    publish(tmp_path / "any", exit_totals(2))
    assert not living.exists()


def test_totals_of_another_engine_are_not_read(tmp_path: Path) -> None:
    publish(tmp_path / "totals", exit_totals(2))
    with pytest.raises(ValueError, match="11 totals"):
        read(tmp_path / "totals", exit_totals(3))
    with pytest.raises(OSError, match="missing"):
        read(tmp_path / "missing", exit_totals(2))


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "totals").symlink_to(victim)
    publish(tmp_path / "totals", exit_totals(2))
    assert victim.read_text() == "precious"


def model(**sections: object) -> tuple[EfficiencyConfig, Plan]:
    efficiency = parse_efficiency(sections)
    return efficiency, build_plan(efficiency, 30)


def watched(path: Path, monkeypatch: pytest.MonkeyPatch, expose: Any) -> TotalsCollector:
    """A collector of two engines' totals, of which one has two replicas."""
    monkeypatch.setattr(metrics, "counters_path", lambda *engine: path / "{}-{}".format(*engine))
    collector = TotalsCollector(expose)
    exits = [{"depth": depth, "gate": "softmax", "threshold": 0.5} for depth in (10, 20)]
    collector.serve("one", "some/model", *model(early_exit={"exits": exits}))
    collector.watch("one", ExitReporter((10, 20)), 1, "worker")
    exits = [{"depth": 5, "gate": "softmax", "threshold": 0.5}]
    groups = {"groups": [[10, 11], [20, 21, 22]]}
    collector.serve("two", "other", *model(early_exit={"exits": exits}, layer_parallel=groups))
    collector.watch("two", ExitReporter((5,)), 2, "worker")
    return collector


def test_prometheus_shows_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = CollectorRegistry()
    watched(tmp_path, monkeypatch, registry.register)
    assert "effplugin_exit" not in generate_latest(registry).decode()
    fill(publish(tmp_path / "one-0", exit_totals(2)))
    publish(tmp_path / "two-1", exit_totals(1))
    shown = generate_latest(registry).decode().splitlines()
    both = f'techniques="layer_parallel,early_exit",version="{__version__}"'
    for line in (
        'effplugin_exit_tokens_total{depth="10",engine="0",model_name="some/model"} 0.0',
        'effplugin_exit_tokens_total{depth="20",engine="0",model_name="some/model"} 4.0',
        'effplugin_exit_tokens_total{depth="5",engine="1",model_name="other"} 0.0',
        'effplugin_exit_decode_tokens_total{engine="0",model_name="some/model"} 7.0',
        'effplugin_exit_layer_tokens_total{engine="0",model_name="some/model"} 150.0',
        'effplugin_exit_pending_tokens{engine="0",model_name="some/model"} 3.0',
        f'effplugin_info{{model_name="other",{both}}} 1.0',
        'effplugin_layers{model_name="other"} 30.0',
        'effplugin_sequential_layers{model_name="other"} 27.0',
    ):
        assert line in shown
    assert not any('engine="0",model_name="other"' in line for line in shown), "it has no totals"


def test_copies_follow_totals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For several API servers, and for Ray, which know metrics but no collectors."""
    registry = CollectorRegistry()
    copies = Copies(
        watched(tmp_path, monkeypatch, lambda collector: None),
        lambda family, labels: Counter(family.name, "-", labels, registry=registry),
        lambda family, labels: Gauge(family.name, "-", labels, registry=registry),
    )

    def shown(name: str, **labels: str) -> float | None:
        copies.update()
        labels = {"model_name": "some/model", "engine": "0", **labels}
        return registry.get_sample_value(f"effplugin_exit_{name}", labels)

    assert shown("decode_tokens_total") is None
    counters = publish(tmp_path / "one-0", exit_totals(2))
    for twice in (1, 2):
        fill(counters)
        assert shown("decode_tokens_total") == 7 * twice
        assert shown("decode_tokens_total") == 7 * twice, "nothing happened in between"
        assert shown("tokens_total", depth="20") == 4 * twice
        assert shown("pending_tokens") == 3
    counters.set("pending", 0)
    assert shown("pending_tokens") == 0
    fill(publish(tmp_path / "one-0", exit_totals(2)))  # the engine started anew
    assert shown("decode_tokens_total") == 21


def test_one_of_several_processes_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Copies] = []
    monkeypatch.setattr(Copies, "keep", lambda copies: kept.append(copies))
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    registry = CollectorRegistry()
    for _ in range(2):  # a lock belongs to an open file, so that one process may stand for two
        metrics.expose(TotalsCollector(registry.register), registry)
    assert len(kept) == 1
    assert not list(registry.collect())
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR")
    metrics.expose(watched(tmp_path, monkeypatch, lambda collector: None), registry)
    assert len(kept) == 1
    assert list(registry.collect())


def test_where_totals_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """API servers of one engine have an `instance` each, and a folder together."""
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    assert counters_path("a", 0) != counters_path("b", 0)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    assert counters_path("a", 0) == counters_path("b", 0)
    assert len({counters_path("a", i, part) for i in (0, 1) for part in ("worker", "link")}) == 4
