"""What several commands share: options, and numbers as typed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from vllm_effplugin.errors import ConfigError

N = TypeVar("N", int, float)


class Precision(StrEnum):
    """Of matrix products in a preparation."""

    auto = "auto"
    bf16 = "bf16"
    fp32 = "fp32"

    def resolve(self) -> str:
        """`bf16` or `fp32`."""
        from vllm_effplugin.preparation.precision import default_precision

        return default_precision() if self is Precision.auto else self.value


Model = Annotated[Path, typer.Argument(help="Checkpoint directory of the base model.")]
Out = Annotated[Path, typer.Argument(help="Directory to write.")]
Text = Annotated[
    Path | None, typer.Option(help=".txt or .jsonl file; else the model writes the text.")
]
SequenceLength = Annotated[int, typer.Option(help="Tokens per sequence.")]
WorkingPrecision = Annotated[
    Precision, typer.Option(help="Of matrix products in the preparation; `auto` asks the device.")
]
Seed = Annotated[int, typer.Option(help="Of everything that is drawn.")]
WorkDir = Annotated[
    Path | None, typer.Option(help="Unfinished work, to resume; beside OUT by default.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")]

# Of preparations that train exits of language models.
ExitConfidence = Annotated[
    float, typer.Option(help="Of that promise, on text like the held-out one.")
]
AdapterTokens = Annotated[
    int, typer.Option(help="Tokens of distillation per adapter; 0: least squares alone.", min=0)
]
GateEpochs = Annotated[int, typer.Option(help="Passes over the text for gates.", min=1)]
TextTokens = Annotated[int, typer.Option(help="Most tokens to train and choose on.", min=1)]
HeldOutTokens = Annotated[int, typer.Option(help="Tokens on which the promise is tested.", min=1)]

# Of preparations on labelled texts.
Train = Annotated[
    str,
    # A bracket that Rich would take for markup is escaped.
    typer.Option(help=r"Labelled texts: .jsonl, .csv, or OWNER/NAME\[/CONFIG]@SPLIT of the hub."),
]
Dev = Annotated[str | None, typer.Option(help="Held-out ones, to choose on.")]
DevShare = Annotated[
    float, typer.Option(help="Without --dev: share of the training rows that is held out.")
]
Labels = Annotated[
    str | None, typer.Option(help='Names of the classes in order: "negative,positive".')
]
Column = Annotated[str, typer.Option(help="Name of the field.")]
Template = Annotated[
    str | None, typer.Option(help="Of {text} and {text_pair}; what clients have to send.")
]
MaxLength = Annotated[int, typer.Option(help="Tokens at which a text is cut off.", min=1)]
MeasuredRows = Annotated[
    int, typer.Option(help="Held-out texts that are classified for speed.", min=1)
]
COLUMN_OPTIONS = {
    "columns.text": "text-column",
    "columns.text_pair": "pair-column",
    "columns.label": "label-column",
}
"""Names of the options for columns, by section and field."""


def labelled_data(
    train: str,
    dev: str | None,
    dev_share: float,
    columns: tuple[str, str, str],
    labels: str | None,
    template: str | None,
    max_length: int,
    seed: int,
) -> dict[str, Any]:
    """`DataSettings`, not yet validated, from these options."""
    return {
        "train": train,
        "dev": dev,
        "dev_share": dev_share,
        "columns": dict(zip(("text", "text_pair", "label"), columns, strict=True)),
        "labels": None if labels is None else [name.strip() for name in labels.split(",")],
        "template": template,
        "max_length": max_length,
        "seed": seed,
    }


def parse_numbers(option: str, text: str, kind: Callable[[str], N]) -> list[N]:
    """Numbers as typed: `14,20,24`.

    Raises:
        ConfigError: when they are not that.
    """
    try:
        return [kind(number) for number in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text!r} is not a list of numbers with commas") from None


def in_options(
    error: Any, sections: tuple[str, ...], names: Mapping[str, str] | None = None
) -> ConfigError:
    """A pydantic validation error of a request, in terms of options.

    Args:
        sections: fields of the request that no option is named after, whose own fields are.
        names: of options that are not named after their field, by that, or by section and field.
    """
    problems = []
    for item in error.errors():
        fields = [str(part) for part in item["loc"] if isinstance(part, str)]
        own = [field for field in fields if field not in sections][:1]
        above = [field for field in fields if field in sections][-1:]
        known = names or {}
        name = known.get(".".join(above + own)) or known.get("".join(own)) or "".join(own)
        option = f"--{name.replace('_', '-')}: " if name else ""
        problems.append(option + item["msg"].removeprefix("Value error, "))
    return ConfigError("; ".join(dict.fromkeys(problems)))
