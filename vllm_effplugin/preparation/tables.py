"""Tables on a console."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

WIDEST = 1000


def print_whole(console: Console, table: Table) -> None:
    """Print a table as wide as it needs to be: a cut-off figure is worse than a wrapped line."""
    before = console.width
    console.width = WIDEST
    console.width = max(before, console.measure(table).maximum)
    try:
        console.print(table)
    finally:
        console.width = before
