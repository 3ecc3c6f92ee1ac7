"""Running totals, and how they get to `/metrics`."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from vllm_effplugin.engine import metrics
from vllm_effplugin.engine.counters import Counters, publish, read
from vllm_effplugin.engine.metrics import TotalsCollector
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


def test_prometheus_shows_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        metrics, "counters_path", lambda *engine: tmp_path / "{}-{}".format(*engine)
    )
    registry = CollectorRegistry()
    collector = TotalsCollector(registry)
    collector.watch("one", "some/model", ExitReporter((10, 20), 30))
    collector.watch("two", "some/model", ExitReporter((5,), 30), replicas=2)
    assert "some/model" not in generate_latest(registry).decode()
    fill(publish(tmp_path / "one-0", exit_totals(2)))
    publish(tmp_path / "two-1", exit_totals(1))
    shown = generate_latest(registry).decode()
    for line in (
        'effplugin_exit_tokens_total{depth="10",engine="0",model_name="some/model"} 0.0',
        'effplugin_exit_tokens_total{depth="20",engine="0",model_name="some/model"} 4.0',
        'effplugin_exit_tokens_total{depth="5",engine="1",model_name="some/model"} 0.0',
        'effplugin_exit_decode_tokens_total{engine="0",model_name="some/model"} 7.0',
        'effplugin_exit_mean_depth{engine="0",model_name="some/model"} 15.0',
        'effplugin_exit_mean_depth{engine="1",model_name="some/model"} 30.0',
        'effplugin_exit_pending_tokens{engine="0",model_name="some/model"} 3.0',
    ):
        assert line in shown
