"""`effplugin prepare classify`: its options."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from vllm_effplugin.cli.options import (
    Model,
    Out,
    Overwrite,
    Precision,
    Seed,
    WorkDir,
    WorkingPrecision,
    in_options,
    parse_numbers,
)
from vllm_effplugin.config.checkpoint import require_output

OPTION_NAMES = {
    "most_loss": "max-loss",
    "trade_offs": "sweep",
    "tune.epochs": "lora-epochs",
    "tune.learning_rate": "lora-rate",
    "columns.text": "text-column",
    "columns.text_pair": "pair-column",
    "columns.label": "label-column",
}
"""Of fields of the request that options are not named after."""


class Written(StrEnum):
    """What the checkpoint classifies with."""

    joint = "joint"
    threshold = "threshold"
    fixed = "fixed"
    final = "final"


def classify(
    model: Model,
    out: Out,
    train: Annotated[
        str,
        typer.Option(help="Labelled texts: .jsonl, .csv, or OWNER/NAME[/CONFIG]@SPLIT of the hub."),
    ],
    dev: Annotated[
        str | None, typer.Option(help="Held-out ones, to choose and calibrate on.")
    ] = None,
    dev_share: Annotated[
        float, typer.Option(help="Without --dev: share of the training rows that is held out.")
    ] = 0.15,
    labels: Annotated[
        str | None, typer.Option(help='Names of the classes in order: "negative,positive".')
    ] = None,
    text_column: Annotated[str, typer.Option(help="Name of the field.")] = "text",
    pair_column: Annotated[str, typer.Option(help="Name of the field.")] = "text_pair",
    label_column: Annotated[str, typer.Option(help="Name of the field.")] = "label",
    template: Annotated[
        str | None,
        typer.Option(help="Of {text} and {text_pair}; what clients have to send."),
    ] = None,
    max_length: Annotated[
        int, typer.Option(help="Tokens at which a text is cut off.", min=1)
    ] = 512,
    exits: Annotated[
        str | None, typer.Option(help='Layers before each exit: "12,16,20"; three without.')
    ] = None,
    lora: Annotated[
        bool, typer.Option("--lora", help="Teach the backbone the task; it is frozen without.")
    ] = False,
    lora_epochs: Annotated[float, typer.Option(help="Passes over the data for that.")] = 2.0,
    lora_rate: Annotated[float, typer.Option(help="Its learning rate.")] = 5e-4,
    trade_off: Annotated[
        float | None,
        typer.Option("--lambda", help="What running the whole model costs, in nats of loss."),
    ] = None,
    sweep: Annotated[
        str | None, typer.Option(help='Several of them: "0.1,0.4"; six without --lambda.')
    ] = None,
    max_loss: Annotated[
        float, typer.Option(help="Of accuracy against the full model, for a gain of speed.")
    ] = 0.005,
    ablation: Annotated[
        bool,
        typer.Option("--ablation", help="Also train as the released code does; choose among both."),
    ] = False,
    write: Annotated[
        Written,
        typer.Option(
            help="The joint gates, a threshold on the probability, one depth for all, or none."
        ),
    ] = Written.joint,
    epochs: Annotated[int, typer.Option(help="Passes in which gates and heads learn.", min=1)] = 16,
    coverage: Annotated[
        str, typer.Option(help="Probabilities with which prediction sets hold the true class.")
    ] = "0.9,0.95",
    measured_rows: Annotated[
        int, typer.Option(help="Held-out texts that are classified for speed.", min=1)
    ] = 512,
    precision: WorkingPrecision = Precision.auto,
    seed: Seed = 0,
    work_dir: WorkDir = None,
    keep_work: Annotated[
        bool, typer.Option("--keep-work", help="Keep the work directory, for another --write.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Classify and stop early (JEI-DNN): train heads and gates together, measure, choose.

    Writes the fastest operating point whose loss of accuracy is small enough, next to the figures
    of the full model, of a fixed threshold, and of a fixed depth.
    """
    require_output(out, overwrite=overwrite)

    from pydantic import ValidationError

    from vllm_effplugin.errors import ConfigError
    from vllm_effplugin.techniques.joint_exit.prepare import SWEEP, ClassifyRequest
    from vllm_effplugin.techniques.joint_exit.prepare import prepare as run

    if trade_off is not None and sweep is not None:
        raise ConfigError("give --lambda or --sweep, not both")
    trade_offs: tuple[float, ...] = SWEEP
    if trade_off is not None:
        trade_offs = (trade_off,)
    elif sweep is not None:
        trade_offs = tuple(parse_numbers("--sweep", sweep, float))
    working = precision.resolve()
    tune: dict[str, Any] | None = None
    if lora:
        tune = {
            "epochs": lora_epochs,
            "learning_rate": lora_rate,
            "precision": working,
            "seed": seed,
        }
    try:
        request = ClassifyRequest.model_validate(
            {
                "data": {
                    "train": train,
                    "dev": dev,
                    "dev_share": dev_share,
                    "columns": {
                        "text": text_column,
                        "text_pair": pair_column,
                        "label": label_column,
                    },
                    "labels": None if labels is None else [n.strip() for n in labels.split(",")],
                    "template": template,
                    "max_length": max_length,
                    "seed": seed,
                },
                "exits": None if exits is None else parse_numbers("--exits", exits, int),
                "tune": tune,
                "train": {"epochs": epochs, "seed": seed},
                "trade_offs": trade_offs,
                "ablation": ablation,
                "most_loss": max_loss,
                "coverage": parse_numbers("--coverage", coverage, float),
                "measured_rows": measured_rows,
                "precision": working,
            }
        )
    except ValidationError as error:
        raise in_options(
            error, sections=("data", "tune", "train", "columns"), names=OPTION_NAMES
        ) from None
    run(
        model,
        out,
        request,
        write=write.value,
        work_dir=work_dir,
        keep=keep_work,
        overwrite=overwrite,
    )
