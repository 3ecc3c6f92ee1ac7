"""`effplugin prepare multiplex`: its options."""

from __future__ import annotations

from typing import Annotated

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
    "least_gain": "min-gain",
    "sizes": "n",
    "depths": "mux-layer",
    "train.learning_rate": "rate",
    "columns.text": "text-column",
    "columns.text_pair": "pair-column",
    "columns.label": "label-column",
}
"""Of fields of the request that options are not named after."""


def multiplex(
    model: Model,
    out: Out,
    train: Annotated[
        str,
        typer.Option(help="Labelled texts: .jsonl, .csv, or OWNER/NAME[/CONFIG]@SPLIT of the hub."),
    ],
    dev: Annotated[
        str | None, typer.Option(help="Held-out ones, to compare and choose on.")
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
    measured_rows: Annotated[
        int, typer.Option(help="Held-out texts that are classified for speed.", min=1)
    ] = 512,
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
    try:
        request = PrepareRequest.model_validate(
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
                    "labels": None if labels is None else [x.strip() for x in labels.split(",")],
                    "template": template,
                    "max_length": max_length,
                    "seed": seed,
                },
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
