"""`effplugin prepare edge-cloud`: its options."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from vllm_effplugin.cli.options import (
    AdapterTokens,
    ExitConfidence,
    GateEpochs,
    HeldOutTokens,
    Model,
    Out,
    Overwrite,
    Precision,
    Seed,
    SequenceLength,
    Text,
    TextTokens,
    WorkDir,
    WorkingPrecision,
    in_options,
    parse_numbers,
)
from vllm_effplugin.config.checkpoint import require_output


class EdgeGate(StrEnum):
    """What gives a token's confidence."""

    linear = "linear"
    mlp = "mlp"
    softmax = "softmax"


class EdgeAdapter(StrEnum):
    """What runs between an exit's hidden state and the final norm."""

    none = "none"
    linear = "linear"


class EdgeMode(StrEnum):
    """When the edge asks the cloud."""

    standalone = "standalone"
    collaborative = "collaborative"
    cloud = "cloud"


class Transport(StrEnum):
    """Of hidden states on their way to the cloud."""

    fp32 = "fp32"
    fp16 = "fp16"
    int8 = "int8"


def edge_cloud(
    model: Model,
    out: Out,
    partition: Annotated[int, typer.Option(help="Layers that the edge runs.", min=1)],
    exits: Annotated[
        str, typer.Option(help='Layers before each exit, "10,15"; the last is the partition.')
    ],
    gate: Annotated[
        EdgeGate, typer.Option(help="`softmax` needs no training and costs a run of the head.")
    ] = EdgeGate.mlp,
    gate_width: Annotated[int, typer.Option(help="Hidden units of `mlp` gates.", min=1)] = 64,
    adapter: Annotated[
        EdgeAdapter, typer.Option(help="Makes up for the layers not run: a matrix.")
    ] = EdgeAdapter.linear,
    min_agreement: Annotated[
        float, typer.Option(help="Share of tokens that have to be the whole model's.")
    ] = 0.9,
    confidence: ExitConfidence = 0.95,
    mode: Annotated[
        EdgeMode, typer.Option(help="Of the server; requests may choose another.")
    ] = EdgeMode.collaborative,
    transport: Annotated[
        Transport, typer.Option(help="Of hidden states on their way up.")
    ] = Transport.fp16,
    deadline: Annotated[
        float, typer.Option(help="Seconds after which the edge takes its own token.")
    ] = 1.0,
    gather_ms: Annotated[
        float,
        typer.Option(help="Milliseconds that a few requests wait for those at the cloud; 0: none."),
    ] = 50.0,
    adapter_tokens: AdapterTokens = 32768,
    gate_epochs: GateEpochs = 20,
    text: Text = None,
    text_tokens: TextTokens = 65536,
    held_out_tokens: HeldOutTokens = 32768,
    sequence_length: SequenceLength = 256,
    precision: WorkingPrecision = Precision.auto,
    seed: Seed = 0,
    work_dir: WorkDir = None,
    overwrite: Overwrite = False,
) -> None:
    """Split a model (CE-CoLLM): an edge that answers what it is sure of, and a cloud for the rest.

    Writes OUT/edge and OUT/cloud. The same command continues after an interruption.
    """
    for part in ("edge", "cloud"):
        require_output(out / part, overwrite=overwrite)

    from pydantic import ValidationError

    from vllm_effplugin.techniques.edge_cloud.prepare import SplitRequest
    from vllm_effplugin.techniques.edge_cloud.prepare import prepare as run

    try:
        request = SplitRequest.model_validate(
            {
                "partition": partition,
                "exits": parse_numbers("--exits", exits, int),
                "gate": gate.value,
                "gate_width": gate_width,
                "adapter": adapter.value,
                "min_agreement": min_agreement,
                "confidence": confidence,
                "mode": mode.value,
                "transport": transport.value,
                "deadline_s": deadline,
                "gather_ms": gather_ms,
                "train": {
                    "adapter_tokens": adapter_tokens,
                    "gate_epochs": gate_epochs,
                    "precision": precision.resolve(),
                    "seed": seed,
                },
                "text": text,
                "text_tokens": text_tokens,
                "held_out_tokens": held_out_tokens,
                "sequence_length": sequence_length,
                "seed": seed,
            }
        )
    except ValidationError as error:
        raise in_options(error, sections=("train",), names={"deadline_s": "deadline"}) from None
    run(model, out, request, work_dir=work_dir, overwrite=overwrite)
