"""`effplugin`: one typer application, one module per command.

Modules are imported when their command runs, so that `--help` and `doctor` need neither torch
nor vLLM. Errors that this package raises on purpose end with exit code 2 and one line.
"""

from __future__ import annotations

import sys

import typer
from rich.console import Console
from rich.markup import escape

from vllm_effplugin.cli import demo, doctor, evaluate, prepare
from vllm_effplugin.errors import EffPluginError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Prepare, check and measure efficient checkpoints for vLLM.",
)
app.command("doctor")(doctor.doctor)
app.command("demo-model")(demo.demo_model)
app.command("eval")(evaluate.evaluate)
app.add_typer(prepare.app, name="prepare")


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except EffPluginError as error:
        console = Console(stderr=True, soft_wrap=True, highlight=False)
        console.print(f"[red]error:[/red] {escape(str(error))}")
        sys.exit(2)


if __name__ == "__main__":
    main()
