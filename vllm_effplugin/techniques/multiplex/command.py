"""`effplugin prepare multiplex`: its options."""

from __future__ import annotations

from typing import Annotated

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
    "least_gain": "min-gain",
    "sizes": "n",
    "depths": "mux-layer",
    "train.learning_rate": "rate",
    **COLUMN_OPTIONS,
}
"""Of fields of the request that options are not named after."""


def multiplex(
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
    n: Annotated[
        str,
        typer.Option("--n", help='Sequences that run as one; several are trained jointly: "2,4".'),
    ] = "2",
    mux_layer: Annotated[
        str | None,
        typer.Option(
            help='Layers that each runs alone; of several, the fastest that loses little: "6,15". '
            "Half of the layers without."
        ),
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the training texts.")] = 4.0,
    rate: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    max_loss: Annotated[
        float, typer.Option(help="Of accuracy against running alone, for a gain of speed.")
    ] = 0.01,
    min_gain: Annotated[
        float, typer.Option(help="Of measured speed against running alone; less is not written.")
    ] = 1.03,
    max_wait_ms: Annotated[
        float, typer.Option(help="How long a request may be held back for a partner.")
    ] = 2.0,
    groupings: Annotated[
        int, typer.Option(help="Random groupings over which accuracy is averaged.", min=2)
    ] = 10,
    ablation: Annotated[
        bool,
        typer.Option(
            "--ablation", help="Also train plain adapters and the released code's layout; compare."
        ),
    ] = False,
    measured_rows: MeasuredRows = 512,
    precision: WorkingPrecision = Precision.auto,
    seed: Seed = 0,
    work_dir: WorkDir = None,
    keep_work: Annotated[
        bool, typer.Option("--keep-work", help="Keep the work directory, to go on from there.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Run several sequences as one (RevMUX): train the adapters, measure, choose.

    MODEL may be a language model, which gets a classification head, a classifier, or a checkpoint
    of `prepare classify`, whose exits come first.
    """
    require_output(out, overwrite=overwrite)

    from pydantic import ValidationError

    from vllm_effplugin.techniques.multiplex.prepare import PrepareRequest
    from vllm_effplugin.techniques.multiplex.prepare import prepare as run

    working = precision.resolve()
    columns = (text_column, pair_column, label_column)
    data = labelled_data(train, dev, dev_share, columns, labels, template, max_length, seed)
    try:
        request = PrepareRequest.model_validate(
            {
                "data": data,
                "sizes": sorted(set(parse_numbers("--n", n, int))),
                "depths": None
                if mux_layer is None
                else parse_numbers("--mux-layer", mux_layer, int),
                "train": {
                    "epochs": epochs,
                    "learning_rate": rate,
                    "precision": working,
                    "seed": seed,
                },
                "head": {"seed": seed},
                "ablation": ablation,
                "groupings": groupings,
                "most_loss": max_loss,
                "least_gain": min_gain,
                "measured_rows": measured_rows,
                "max_wait_ms": max_wait_ms,
                "precision": working,
            }
        )
    except ValidationError as error:
        raise in_options(error, sections=("data", "train", "columns"), names=OPTION_NAMES) from None
    run(model, out, request, work_dir=work_dir, keep=keep_work, overwrite=overwrite)
