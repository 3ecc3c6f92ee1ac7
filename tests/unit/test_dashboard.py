"""The Grafana dashboard is what Grafana and Prometheus can read."""

from __future__ import annotations

import json
from itertools import combinations
from typing import Any

import promql_parser
import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from tests.dashboard import FILE, queries


def test_grafanas_own_types_hold_all_of_it() -> None:
    """A field that they do not know would be lost."""
    written = json.loads(FILE.read_text(encoding="utf-8"))
    read = json.loads(JSONEncoder().encode(Dashboard.from_json(written)))

    def compare(before: Any, after: Any, where: str) -> None:
        if isinstance(before, dict):
            for name, value in before.items():
                assert name in after, f"{where}.{name}"
                compare(value, after[name], f"{where}.{name}")
        elif isinstance(before, list):
            assert len(before) == len(after), where
            for i, (one, other) in enumerate(zip(before, after, strict=True)):
                compare(one, other, f"{where}[{i}]")
        else:
            assert before == after, where

    compare(written, read, "dashboard")


def test_prometheus_parses_every_query() -> None:
    asked = list(queries())
    assert len(asked) >= 40
    for panel, query in asked:
        assert promql_parser.parse(query), panel["title"]
        # One panel shows several models; a total without a rate says nothing.
        assert "model_name" in query, panel["title"]
        assert query.count("_total{") == query.count("rate("), panel["title"]


def test_panels_do_not_overlap() -> None:
    places = [panel["gridPos"] for panel in json.loads(FILE.read_text(encoding="utf-8"))["panels"]]
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above, (one, other)


def test_a_wrong_query_is_noticed() -> None:
    with pytest.raises(ValueError, match="unclosed"):
        promql_parser.parse("sum by (model_name) (rate(effplugin_exit_tokens_total[1m])")
