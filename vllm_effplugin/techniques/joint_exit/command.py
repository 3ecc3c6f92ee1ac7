"""`effplugin prepare classify`: its options."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from vllm_effplugin.cli.options import (
    COLUMN_OPTIONS,
    Column,
    Dev,
    DevShare,
    Labels,
    MaxLength,
    MeasuredRows,
    Model,
    Out,
    Overwrite,
    Precision,
    Seed,
    Template,
    Train,
    WorkDir,
    WorkingPrecision,
    in_options,
    labelled_data,
    parse_numbers,
)
from vllm_effplugin.config.checkpoint import require_output

OPTION_NAMES = {
    "most_loss": "max-loss",
    "trade_offs": "sweep",
    "tune.epochs": "lora-epochs",
    "tune.learning_rate": "lora-rate",
    **COLUMN_OPTIONS,
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
    train: Train,
    dev: Dev = None,
    dev_share: DevShare = 0.15,
    labels: Labels = None,
    text_column: Column = "text",
    pair_column: Column = "text_pair",
    label_column: Column = "label",
    template: Template = None,
    max_length: MaxLength = 512,
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
    measured_rows: MeasuredRows = 512,
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
    columns = (text_column, pair_column, label_column)
    data = labelled_data(train, dev, dev_share, columns, labels, template, max_length, seed)
    try:
        request = ClassifyRequest.model_validate(
            {
                "data": data,
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
