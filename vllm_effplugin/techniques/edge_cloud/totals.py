"""What edge and cloud count, and how `/metrics` shows it."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client.metrics_core import CounterMetricFamily

from vllm_effplugin.engine.counters import Counters, Layout
from vllm_effplugin.engine.metrics import Families, Reporter

ORIGINS = ("edge", "cloud", "link", "deadline", "full", "error")
"""Whose a token is: the edge's, the cloud's, or why it is the edge's although the cloud was asked.
`error` stands for all else that a cloud may say."""

EDGE_TOTALS = Layout((), {"tokens": len(ORIGINS)})
"""An edge's tokens by origin."""

LINK_TOTALS = Layout(
    (
        "questions",
        "waited_us",
        "computed_us",
        "exchanges",
        "bytes_up",
        "bytes_down",
        "uploaded",
        "repeated",
        "failures",
        "up",
        "waiting",
    ),
    {},
)
"""What went over an edge's link.

`questions` were asked, and waited for `waited_us`, of which the cloud's engine took `computed_us`.
`exchanges` are messages, `failures` those that were lost, bytes those of bodies; `uploaded` are
positions, `repeated` those that went once more. `up` and `waiting` (questions without an answer)
are no totals.
"""

REFUSALS = ("full", "too_long", "gap", "model", "session", "frame", "engine")
"""What a cloud's errors are called."""

CLOUD_TOTALS = Layout(
    (
        "opened",
        "closed",
        "evicted",
        "forgotten",
        "received",
        "repeated",
        "computed",
        "recomputed",
        "tokens",
        "engine_us",
        "bytes_in",
        "bytes_out",
        "replays",
        "sessions",
        "live",
        "positions",
    ),
    {"refusals": len(REFUSALS)},
)
"""What a cloud did.

Sessions that were `opened`, `closed`, `evicted` (from the engine) and `forgotten`; positions that
came (`received`), came once more (`repeated`), were `computed` by the engine, and once more
(`recomputed`); `tokens` given, for which questions waited `engine_us` on the engine; `replays` that
were asked for. `sessions` held, those `live` in the engine, and `positions` held are no totals.
"""


class EdgeReporter(Reporter):
    """Shows where an edge's tokens come from."""

    layout = EDGE_TOTALS

    def show(self, totals: Counters, labels: list[str], families: Families) -> None:
        family = families.counter(
            "effplugin_edge_tokens",
            "Tokens of an edge: its own, the cloud's, and its own for want of the cloud's.",
            "origin",
        )
        _by_name(family, labels, ORIGINS, totals.numbers("tokens"))


class LinkReporter(Reporter):
    """Shows an edge's link."""

    layout = LINK_TOTALS

    def show(self, totals: Counters, labels: list[str], families: Families) -> None:
        for name, help in {
            "questions": "Tokens that the cloud was asked for.",
            "exchanges": "Messages to the cloud.",
            "failures": "Messages to the cloud that were lost.",
        }.items():
            families.counter(f"effplugin_edge_{name}", help).add_metric(labels, totals[name])
        for name, help in {
            "waited": "Seconds that questions waited.",
            "computed": "Of these, those that the cloud's engine took.",
        }.items():
            family = families.counter(f"effplugin_edge_{name}_seconds", help)
            family.add_metric(labels, totals[f"{name}_us"] / 1e6)
        sent = families.counter("effplugin_edge_bytes", "Bodies of messages.", "direction")
        _by_name(sent, labels, ("up", "down"), [totals["bytes_up"], totals["bytes_down"]])
        positions = families.counter("effplugin_edge_positions", "Positions that went up.", "event")
        _by_name(
            positions, labels, ("uploaded", "repeated"), [totals["uploaded"], totals["repeated"]]
        )
        for name, of, help in (
            ("up", "up", "Whether the cloud is there."),
            ("waiting_questions", "waiting", "Questions without an answer; their requests wait."),
        ):
            families.gauge(f"effplugin_edge_{name}", help).add_metric(labels, totals[of])


class CloudReporter(Reporter):
    """Shows a cloud."""

    layout = CLOUD_TOTALS

    def show(self, totals: Counters, labels: list[str], families: Families) -> None:
        for name, events in {
            "sessions": ("opened", "closed", "evicted", "forgotten"),
            "positions": ("received", "repeated", "computed", "recomputed"),
        }.items():
            help = f"{name.capitalize()} by what happened to them."
            family = families.counter(f"effplugin_cloud_{name}", help, "event")
            _by_name(family, labels, events, [totals[event] for event in events])
        for name, help in {
            "tokens": "Tokens given.",
            "replays": "Replays asked for.",
        }.items():
            families.counter(f"effplugin_cloud_{name}", help).add_metric(labels, totals[name])
        families.counter(
            "effplugin_cloud_engine_seconds", "Seconds that questions waited on the engine."
        ).add_metric(labels, totals["engine_us"] / 1e6)
        sent = families.counter("effplugin_cloud_bytes", "Bodies of messages.", "direction")
        _by_name(sent, labels, ("in", "out"), [totals["bytes_in"], totals["bytes_out"]])
        refused = families.counter("effplugin_cloud_refusals", "Errors by their code.", "code")
        _by_name(refused, labels, REFUSALS, totals.numbers("refusals"))
        for name, of, help in (
            ("sessions_held", "sessions", "Sessions held."),
            ("sessions_computed", "live", "Of these, those with a cache in the engine."),
            ("positions_held", "positions", "Positions whose hidden states are in memory."),
        ):
            families.gauge(f"effplugin_cloud_{name}", help).add_metric(labels, totals[of])


def _by_name(
    family: CounterMetricFamily, labels: list[str], names: Sequence[str], counts: Sequence[int]
) -> None:
    for name, count in zip(names, counts, strict=True):
        family.add_metric([*labels, name], count)
