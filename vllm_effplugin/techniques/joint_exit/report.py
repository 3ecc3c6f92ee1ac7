"""What `prepare classify` shows and stores: a table, per-exit figures and the frontier plot."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from vllm_effplugin.preparation.plot import new_axes, to_png
from vllm_effplugin.techniques.joint_exit.candidates import Answers, Candidate, difference
from vllm_effplugin.techniques.joint_exit.measure import Speed
from vllm_effplugin.techniques.joint_exit.uncertainty import calibration_error

FINAL = "final"


class MethodReport(BaseModel):
    """One operating point on the held-out sequences.

    Attributes:
        method: `final` for the full model.
        name: of the operating point.
        accuracy: share of right answers.
        difference, error: of accuracy to the full model, paired, and its standard error.
        layers: mean depth of a token, the whole model being 1.
        ece: expected calibration error.
        requests_s, ratio: measured in vLLM; None where it was not.
        same: share of the measured sequences for which vLLM gave the same class.
    """

    method: str
    name: str
    accuracy: float
    difference: float
    error: float
    layers: float
    ece: float
    requests_s: float | None = None
    ratio: float | None = None
    same: float | None = None


class ExitFigures(BaseModel):
    """What sequences get at one exit.

    Attributes:
        depth: layers before it.
        share: of all sequences.
        accuracy, ece, confidence: of those; None where there are none.
    """

    depth: int
    share: float
    accuracy: float | None
    ece: float | None
    confidence: float | None


def method_report(
    candidate: Candidate | None, full: Answers, labels: Tensor, speed: Speed | None, rows: int
) -> MethodReport:
    """The figures of an operating point; of the full model without one.

    Args:
        rows: how many sequences were measured, the first ones.
    """
    answers = full if candidate is None else candidate.answers
    gained, error = difference(answers, full)
    same = None
    if speed is not None:
        expected = answers.probabilities[:rows].argmax(-1).tolist()
        same = sum(a == b for a, b in zip(expected, speed.classes, strict=True)) / rows
    return MethodReport(
        method=FINAL if candidate is None else candidate.method,
        name="the full model" if candidate is None else candidate.name,
        accuracy=answers.accuracy,
        difference=gained,
        error=error,
        layers=1.0 if candidate is None else candidate.layers,
        ece=answers.calibration_error(labels),
        requests_s=None if speed is None else speed.requests_s,
        ratio=None if speed is None else speed.ratio,
        same=same,
    )


def exit_figures(candidate: Candidate, labels: Tensor, num_layers: int) -> list[ExitFigures]:
    """Figures of each exit, and of the full model for what runs to the end."""
    figures = []
    for exit, depth in enumerate([*candidate.config.depths, num_layers]):
        here = candidate.answers.exits == exit
        own = candidate.answers.probabilities[here]
        some = bool(here.any())
        figures.append(
            ExitFigures(
                depth=depth,
                share=float(here.float().mean()),
                accuracy=float(candidate.answers.right[here].float().mean()) if some else None,
                ece=calibration_error(own.numpy(), labels[here].numpy()) if some else None,
                confidence=float(own.amax(-1).mean()) if some else None,
            )
        )
    return figures


def methods_table(title: str, reports: Sequence[MethodReport], chosen: str | None) -> Table:
    """One row per operating point; the one that is written stands out."""
    table = Table(title=title, box=SIMPLE_HEAD)
    for name in ("method", "operating point"):
        table.add_column(name, no_wrap=True)
    for name in ("accuracy", "against full", "layers", "ECE", "req/s", "ratio", "same"):
        table.add_column(name, justify="right", no_wrap=True)
    for report in reports:
        table.add_row(
            report.method,
            report.name + (" *" if report.name == chosen else ""),
            f"{report.accuracy:.4f}",
            "" if report.method == FINAL else f"{report.difference:+.4f}±{report.error:.4f}",
            f"{report.layers:.3f}",
            f"{report.ece:.4f}",
            "" if report.requests_s is None else f"{report.requests_s:.1f}",
            "" if report.ratio is None else f"{report.ratio:.2f}",
            "" if report.same is None else f"{report.same:.3f}",
            style="bold" if report.name == chosen else None,
        )
    return table


def exits_table(figures: Sequence[ExitFigures]) -> Table:
    """One row per exit."""
    table = Table(box=SIMPLE_HEAD, title="Where the held-out sequences get their answer")
    for name in ("depth", "share", "accuracy", "ECE", "mean confidence"):
        table.add_column(name, justify="right")
    for each in figures:
        table.add_row(
            str(each.depth),
            f"{each.share:.3f}",
            *(
                "" if value is None else f"{value:.3f}"
                for value in (each.accuracy, each.ece, each.confidence)
            ),
        )
    return table


def frontier_png(reports: Sequence[MethodReport], chosen: str | None) -> bytes:
    """Accuracy over measured speed, a line per method; a star where the checkpoint is."""
    axes = new_axes("sequences per second, measured, relative to the full model", "accuracy")
    for method in dict.fromkeys(report.method for report in reports):
        points = sorted(
            (report.ratio, report.accuracy)
            for report in reports
            if report.method == method and report.ratio is not None
        )
        if points:
            axes.plot(*zip(*points, strict=True), "o-", ms=4, label=method)
    for report in reports:
        if report.name == chosen and report.ratio is not None:
            axes.plot(report.ratio, report.accuracy, "k*", ms=14, label="written")
    return to_png(axes)
