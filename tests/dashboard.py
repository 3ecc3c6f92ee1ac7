"""The Grafana dashboard's queries, and whether a server answers them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parents[1] / "deploy" / "grafana" / "dashboards" / "effplugin.json"


def queries() -> Iterator[tuple[dict[str, Any], str]]:
    """Every panel's queries, with Grafana's variables filled in."""
    for panel in json.loads(FILE.read_text(encoding="utf-8"))["panels"]:
        for target in panel.get("targets", ()):
            query = target["expr"].replace("$__rate_interval", "1m").replace("$model", ".*")
            yield panel, query


def named() -> set[str]:
    """Our metrics in them."""
    return {name for _, query in queries() for name in re.findall(r"\beffplugin_\w+", query)}


def check(shown: Mapping[str, float], *groups: str) -> None:
    """What a server shows is on the dashboard, and what the dashboard asks of it, it shows.

    Args:
        shown: its samples at `/metrics`.
        groups: beginnings of the names that the server's model has.
    """
    found = {sample.partition("{")[0] for sample in shown if sample.startswith("effplugin_")}
    known = named()
    assert found <= known, "not on the dashboard"
    asked = {name for name in known if name.startswith(tuple(f"effplugin_{g}" for g in groups))}
    assert asked, "no such panels"
    general = {name for name in known if name.count("_") == 1} | {"effplugin_sequential_layers"}
    assert found == asked | general
