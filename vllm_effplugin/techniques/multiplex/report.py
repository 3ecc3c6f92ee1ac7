"""What `prepare multiplex` shows and stores: a table, and the frontier plot."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel
from rich.box import SIMPLE_HEAD
from rich.table import Table

from vllm_effplugin.preparation.plot import new_axes, to_png


class PointReport(BaseModel):
    """Groups of one size, merged at one depth, on the held-out texts.

    Attributes:
        depth: layers that each sequence runs alone.
        size: sequences of a group; 1 for running alone.
        mixing: how slots meet.
        accuracy: share of right answers, the mean over random groupings.
        spread: standard deviation over the groupings.
        difference, error: of accuracy to running alone, paired, and its standard error.
        flips: how often a text's class changes with its partners.
        requests_s, ratio, lowest: measured in vLLM; None where it was not.
    """

    depth: int
    size: int
    mixing: str
    accuracy: float
    spread: float
    difference: float
    error: float
    flips: float
    requests_s: float | None = None
    ratio: float | None = None
    lowest: float | None = None

    @property
    def name(self) -> str:
        """For people."""
        return f"N={self.size} l={self.depth}"


def points_table(title: str, reports: Sequence[PointReport], written: Sequence[str]) -> Table:
    """One row per point; those that are written stand out."""
    table = Table(title=title, box=SIMPLE_HEAD)
    for name in ("point", "adapters"):
        table.add_column(name, no_wrap=True)
    for name in ("accuracy", "against alone", "flips", "req/s", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    for report in reports:
        alone = report.size == 1
        table.add_row(
            "alone" if alone else report.name + (" *" if report.name in written else ""),
            "" if alone else report.mixing,
            f"{report.accuracy:.4f}" + ("" if alone else f"±{report.spread:.4f}"),
            "" if alone else f"{report.difference:+.4f}±{report.error:.4f}",
            "" if alone else f"{report.flips:.3f}",
            "" if report.requests_s is None else f"{report.requests_s:.1f}",
            "" if report.ratio is None else f"{report.ratio:.2f}",
            style="bold" if report.name in written else None,
        )
    return table


def frontier_png(reports: Sequence[PointReport], written: Sequence[str]) -> bytes:
    """Accuracy over measured speed, a line per size; stars where the checkpoint is."""
    axes = new_axes("sequences per second, measured, relative to running alone", "accuracy")
    for size in sorted({report.size for report in reports}):
        points = sorted(
            (report.ratio, report.accuracy, report.spread, report.depth)
            for report in reports
            if report.size == size and report.ratio is not None
        )
        if points:
            x, y, spread, depths = zip(*points, strict=True)
            axes.errorbar(x, y, spread, fmt="o-", ms=4, label="alone" if size == 1 else f"N={size}")
            for place, height, depth in zip(x, y, depths, strict=True):
                if size > 1:
                    axes.annotate(
                        f"l={depth}",
                        (place, height),
                        xytext=(8, 6),
                        textcoords="offset points",
                        fontsize=8,
                    )
    stars = [r for r in reports if r.name in written and r.ratio is not None]
    if stars:
        axes.plot(
            [r.ratio for r in stars], [r.accuracy for r in stars], "k*", ms=14, label="written"
        )
    return to_png(axes)
