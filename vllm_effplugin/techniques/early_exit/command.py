"""`effplugin prepare early-exit`: its options."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

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


class GateKind(StrEnum):
    """What gives a token's confidence."""

    linear = "linear"
    mlp = "mlp"
    mamba = "mamba"
    softmax = "softmax"


class AdapterKind(StrEnum):
    """What runs between an exit's hidden state and the final norm."""

    none = "none"
    linear = "linear"
    block = "block"


class CachePolicy(StrEnum):
    """What skipped layers owe the cache."""

    recompute = "recompute"
    propagate = "propagate"
    copy = "copy"
    freeze = "freeze"
    state_only = "state-only"


class Backbone(StrEnum):
    """What exit-aware fine-tuning trains."""

    none = "none"
    lora = "lora"
    full = "full"


def early_exit(
    model: Model,
    out: Out,
    exits: Annotated[
        str | None,
        typer.Option(help='Layers before each exit: "14,20,24"; three in the later half without.'),
    ] = None,
    gate: Annotated[
        GateKind,
        typer.Option(
            help="`mamba` goes by the tokens before as well; `softmax` needs no training and costs "
            "a run of the head."
        ),
    ] = GateKind.linear,
    gate_width: Annotated[
        int, typer.Option(help="Hidden units of `mlp` gates, channels of `mamba` gates.", min=1)
    ] = 64,
    adapter: Annotated[
        AdapterKind,
        typer.Option(help="Makes up for the layers not run: a matrix, or one more layer."),
    ] = AdapterKind.linear,
    cache: Annotated[
        CachePolicy,
        typer.Option(
            help="`recompute` is exact; the others are approximate: `propagate` and `copy` for "
            "attention, `freeze` and `state-only` for state-space models."
        ),
    ] = CachePolicy.recompute,
    max_pending: Annotated[
        int, typer.Option(help="Most tokens of a request that may wait (`recompute`).", min=1)
    ] = 16,
    min_agreement: Annotated[
        float, typer.Option(help="Share of tokens that have to be the full model's.")
    ] = 0.95,
    confidence: ExitConfidence = 0.95,
    batches: Annotated[
        str, typer.Option(help="Batch sizes for which speed is forecast.")
    ] = "1,8,32",
    top_k: Annotated[
        int, typer.Option(help="Gates learn whether the exit's token is among the model's top k.")
    ] = 1,
    adapter_tokens: AdapterTokens = 32768,
    gate_epochs: GateEpochs = 20,
    tune_backbone: Annotated[
        Backbone, typer.Option(help="Teach early layers to say what the last one says (LayerSkip).")
    ] = Backbone.none,
    tune_tokens: Annotated[
        int, typer.Option(help="Tokens of that; the text repeats when it is shorter.", min=1)
    ] = 131072,
    tune_rate: Annotated[
        float | None, typer.Option(help="Its learning rate; by default one that suits.")
    ] = None,
    layer_dropout: Annotated[
        float, typer.Option(help="How often that drops the last layer; others less often.")
    ] = 0.1,
    text: Text = None,
    text_tokens: TextTokens = 65536,
    held_out_tokens: HeldOutTokens = 32768,
    sequence_length: SequenceLength = 256,
    keep_exits: Annotated[
        bool, typer.Option("--keep-exits", help="Write all exits, even where none pays.")
    ] = False,
    precision: WorkingPrecision = Precision.auto,
    seed: Seed = 0,
    work_dir: WorkDir = None,
    overwrite: Overwrite = False,
) -> None:
    """Let tokens leave early (DYNAMAX): train exits, choose thresholds, forecast the speed.

    Writes no exit where none is expected to be faster. The same command continues after an
    interruption.
    """
    require_output(out, overwrite=overwrite)

    from pydantic import ValidationError

    from vllm_effplugin.techniques.early_exit.prepare import PrepareRequest
    from vllm_effplugin.techniques.early_exit.prepare import prepare as run
    from vllm_effplugin.techniques.early_exit.tune import LEARNING_RATES

    working = precision.resolve()
    tune: dict[str, Any] | None = None
    if tune_backbone is not Backbone.none:
        tune = {
            "train": tune_backbone.value,
            "tokens": tune_tokens,
            "learning_rate": tune_rate or LEARNING_RATES[tune_backbone.value],
            "layer_dropout": layer_dropout,
            "precision": working,
            "seed": seed,
        }
    try:
        request = PrepareRequest.model_validate(
            {
                "exits": None if exits is None else parse_numbers("--exits", exits, int),
                "gate": gate.value,
                "gate_width": gate_width,
                "adapter": adapter.value,
                "cache": cache.value,
                "max_pending": max_pending,
                "min_agreement": min_agreement,
                "confidence": confidence,
                "batches": parse_numbers("--batches", batches, int),
                "train": {
                    "adapter_tokens": adapter_tokens,
                    "gate_epochs": gate_epochs,
                    "top_k": top_k,
                    "precision": working,
                    "seed": seed,
                },
                "tune": tune,
                "text": text,
                "text_tokens": text_tokens,
                "held_out_tokens": held_out_tokens,
                "sequence_length": sequence_length,
                "keep_exits": keep_exits,
                "seed": seed,
            }
        )
    except ValidationError as error:
        raise in_options(error, sections=("train", "tune")) from None
    run(model, out, request, work_dir=work_dir, overwrite=overwrite)
