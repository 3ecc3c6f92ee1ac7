"""Plots as PNG files, without a display."""

from __future__ import annotations

import io
from typing import Any


def new_axes(x: str, y: str) -> Any:
    """Matplotlib axes of a new figure, with labels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(xlabel=x, ylabel=y)
    return axes


def to_png(axes: Any) -> bytes:
    """The file's content, with grid and legend."""
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    axes.figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
