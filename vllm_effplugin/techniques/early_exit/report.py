"""What `prepare early-exit` shows and stores: tables and the frontier plot."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel
from rich.table import Table

from vllm_effplugin.preparation.plot import new_axes, to_png
from vllm_effplugin.techniques.early_exit.config import NEVER
from vllm_effplugin.techniques.early_exit.forecast import Forecast
from vllm_effplugin.techniques.early_exit.thresholds import Promise


class ExitReport(BaseModel):
    """One exit on held-out text.

    Attributes:
        depth: layers before it.
        own_agreement: share of all tokens for which it would say what the full model says.
        threshold: chosen; 1 where the exit is left out.
        leaves: share of all tokens that leave there.
        right: share of those that agree with the full model.
    """

    depth: int
    own_agreement: float
    threshold: float
    leaves: float
    right: float | None


class Point(BaseModel):
    """A point of the frontier, on held-out text."""

    agreement: float
    forecasts: list[Forecast]


def exits_table(reports: Sequence[ExitReport]) -> Table:
    """One row per exit."""
    table = Table(title="Exits on held-out text")
    for name in ("depth", "agrees by itself", "threshold", "tokens leave", "of these agree"):
        table.add_column(name, justify="right")
    for report in reports:
        table.add_row(
            str(report.depth),
            f"{report.own_agreement:.3f}",
            "left out" if report.threshold >= NEVER else f"{report.threshold:.3f}",
            f"{report.leaves:.3f}",
            "" if report.right is None else f"{report.right:.3f}",
        )
    return table


def forecast_table(promise: Promise, forecasts: Sequence[Forecast], confidence: float) -> Table:
    """Agreement, and speed per batch size."""
    table = Table(
        title=f"Agreement {promise.agreement:.4f} on held-out text, at least "
        f"{promise.at_least:.4f} with {confidence:.0%} confidence"
    )
    for name in ("batch", "speed expected", "layer-tokens"):
        table.add_column(name, justify="right")
    for item in forecasts:
        table.add_row(str(item.batch), f"{item.speed:.3f}", f"{item.layer_tokens:.3f}")
    return table


def frontier_png(
    points: Sequence[Point], promise: Promise | None, forecasts: Sequence[Forecast]
) -> bytes:
    """Expected speed over agreement, a line per batch size; stars where the promise is kept."""
    axes = new_axes(
        "agreement with the full model, held-out text",
        "expected tokens/s, relative to the full model",
    )
    agreement = [point.agreement for point in points]
    for index, item in enumerate(points[0].forecasts if points else ()):
        speeds = [point.forecasts[index].speed for point in points]
        [line] = axes.plot(agreement, speeds, "o-", ms=4, label=f"batch {item.batch}")
        if promise is not None and forecasts:
            axes.plot(promise.agreement, forecasts[index].speed, "*", ms=14, color=line.get_color())
    axes.axhline(1, color="gray", lw=1)
    return to_png(axes)
