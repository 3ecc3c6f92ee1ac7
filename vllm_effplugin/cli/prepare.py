"""`effplugin prepare TECHNIQUE MODEL OUT`."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from vllm_effplugin.config.checkpoint import require_output
from vllm_effplugin.errors import ConfigError

N = TypeVar("N", int, float)

app = typer.Typer(no_args_is_help=True, help="Make an efficient checkpoint from a stock one.")


class Schedule(StrEnum):
    """How a group's MLPs see the attention of its other members."""

    bypass = "bypass"
    fused = "fused"


class Train(StrEnum):
    """What distillation trains."""

    lora = "lora"
    full = "full"


class Precision(StrEnum):
    """Of matrix products in repair and distillation."""

    auto = "auto"
    bf16 = "bf16"
    fp32 = "fp32"


@app.callback()
def prepare() -> None:
    """Make an efficient checkpoint from a stock one."""


@app.command("layer-parallel")
def layer_parallel(
    model: Annotated[Path, typer.Argument(help="Checkpoint directory of the base model.")],
    out: Annotated[Path, typer.Argument(help="Directory to write.")],
    target_depth: Annotated[
        int | None, typer.Option(help="Search groups until this many sequential steps are left.")
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="Search as many groups as this KL (nats/token) allows.")
    ] = None,
    groups: Annotated[
        str | None, typer.Option(help='These groups, without a search: "12,13;14,15".')
    ] = None,
    group_size: Annotated[int, typer.Option(help="Layers per group of the search: 2, 3, 4.")] = 2,
    schedule: Annotated[
        Schedule, typer.Option(help="`fused`: every MLP sees all attention of its group.")
    ] = Schedule.bypass,
    bypass: Annotated[int, typer.Option(help="Bypass distance, below the group size.")] = 0,
    text: Annotated[
        Path | None, typer.Option(help=".txt or .jsonl file; else the model writes the text.")
    ] = None,
    text_tokens: Annotated[
        int, typer.Option(help="Most tokens of training text; distillation repeats a shorter one.")
    ] = 131072,
    sequence_length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 256,
    repair: Annotated[
        bool | None,
        typer.Option(
            "--repair/--no-repair",
            help="Refit the grouped layers by least squares; by default when distilling.",
        ),
    ] = None,
    distill_tokens: Annotated[
        int, typer.Option(help="Tokens of self-distillation; 0: none.", min=0)
    ] = 0,
    train: Annotated[
        Train, typer.Option(help="LoRA on the grouped layers, or the layers in full.")
    ] = Train.lora,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak of AdamW's; by default one that suits --train.")
    ] = None,
    matching: Annotated[
        float, typer.Option(help="Weight of hidden states in the loss; 0 is KL alone.", min=0)
    ] = 10.0,
    batch: Annotated[int, typer.Option(help="Sequences per training step.")] = 4,
    precision: Annotated[
        Precision, typer.Option(help="Of repair and training; `auto` asks the device.")
    ] = Precision.auto,
    seed: Annotated[int, typer.Option(help="Of text, training order and LoRA.")] = 0,
    no_ray: Annotated[bool, typer.Option("--no-ray", help="Search in this process.")] = False,
    work_dir: Annotated[
        Path | None, typer.Option(help="Unfinished work, to resume; beside OUT by default.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
) -> None:
    """Run adjacent layers concurrently (CQIL): search groups, repair, distil, write a checkpoint.

    Give one of --target-depth, --max-kl and --groups. The same command continues after an
    interruption.
    """
    require_output(out, overwrite=overwrite)

    from pydantic import ValidationError

    from vllm_effplugin.preparation.precision import default_precision
    from vllm_effplugin.techniques.layer_parallel.distill import LEARNING_RATES
    from vllm_effplugin.techniques.layer_parallel.prepare import PrepareRequest
    from vllm_effplugin.techniques.layer_parallel.prepare import prepare as run

    working = default_precision() if precision is Precision.auto else precision.value
    search: dict[str, Any] | None = None
    if target_depth is not None or max_kl is not None:
        search = {
            "target_depth": target_depth,
            "max_kl": max_kl,
            "group_size": group_size,
            "schedule": schedule.value,
            "bypass": bypass,
        }
    distill: dict[str, Any] | None = None
    if distill_tokens:
        distill = {
            "tokens": distill_tokens,
            "train": train.value,
            "learning_rate": learning_rate or LEARNING_RATES[train.value],
            "matching": matching,
            "batch": batch,
            "precision": working,
            "seed": seed,
        }
    wanted = distill is not None if repair is None else repair
    try:
        request = PrepareRequest.model_validate(
            {
                "search": search,
                "groups": None if groups is None else parse_groups(groups),
                "schedule": schedule.value,
                "bypass": bypass,
                "repair": {"precision": working} if wanted else None,
                "distill": distill,
                "text": text,
                "text_tokens": text_tokens,
                "sequence_length": sequence_length,
                "seed": seed,
            }
        )
    except ValidationError as error:
        raise ConfigError(_describe(error)) from None
    run(model, out, request, work_dir=work_dir, use_ray=not no_ray, overwrite=overwrite)


def parse_groups(text: str) -> list[list[int]]:
    """Groups as typed: `12,13;14,15`.

    Raises:
        ConfigError: when it is not that.
    """
    try:
        return [[int(layer) for layer in group.split(",")] for group in text.split(";")]
    except ValueError:
        raise ConfigError(f'--groups {text!r} is not of the form "12,13;14,15"') from None


_SECTIONS = ("search", "distill", "train", "tune")
"""Of requests, which options do not name."""


def _describe(error: Any) -> str:
    """A validation error in terms of options."""
    problems = []
    for item in error.errors():
        names = [
            str(part) for part in item["loc"] if part not in ("search", "distill", "train", "tune")
        ]
        option = f"--{names[0].replace('_', '-')}: " if names else ""
        problems.append(option + item["msg"].removeprefix("Value error, "))
    return "; ".join(problems)


class GateKind(StrEnum):
    """What gives a token's confidence."""

    linear = "linear"
    mlp = "mlp"
    softmax = "softmax"


class AdapterKind(StrEnum):
    """What runs between an exit's hidden state and the final norm."""

    none = "none"
    linear = "linear"


class CachePolicy(StrEnum):
    """What skipped layers owe the KV cache."""

    recompute = "recompute"
    propagate = "propagate"
    copy = "copy"


class Backbone(StrEnum):
    """What exit-aware fine-tuning trains."""

    none = "none"
    lora = "lora"
    full = "full"


@app.command("early-exit")
def early_exit(
    model: Annotated[Path, typer.Argument(help="Checkpoint directory of the base model.")],
    out: Annotated[Path, typer.Argument(help="Directory to write.")],
    exits: Annotated[
        str | None,
        typer.Option(help='Layers before each exit: "14,20,24"; three in the later half without.'),
    ] = None,
    gate: Annotated[
        GateKind, typer.Option(help="`softmax` needs no training and costs a run of the head.")
    ] = GateKind.linear,
    gate_width: Annotated[int, typer.Option(help="Hidden units of `mlp` gates.", min=1)] = 64,
    adapter: Annotated[
        AdapterKind, typer.Option(help="Makes up for the layers not run.")
    ] = AdapterKind.linear,
    cache: Annotated[
        CachePolicy, typer.Option(help="`recompute` is exact; the others are approximate.")
    ] = CachePolicy.recompute,
    max_pending: Annotated[
        int, typer.Option(help="Most tokens of a request that may wait (`recompute`).", min=1)
    ] = 16,
    min_agreement: Annotated[
        float, typer.Option(help="Share of tokens that have to be the full model's.")
    ] = 0.95,
    confidence: Annotated[
        float, typer.Option(help="Of that promise, on text like the held-out one.")
    ] = 0.95,
    batches: Annotated[
        str, typer.Option(help="Batch sizes for which speed is forecast.")
    ] = "1,8,32",
    top_k: Annotated[
        int, typer.Option(help="Gates learn whether the exit's token is among the model's top k.")
    ] = 1,
    adapter_tokens: Annotated[
        int, typer.Option(help="Tokens of distillation per adapter; 0: least squares alone.", min=0)
    ] = 32768,
    gate_epochs: Annotated[int, typer.Option(help="Passes over the text for gates.", min=1)] = 20,
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
    text: Annotated[
        Path | None, typer.Option(help=".txt or .jsonl file; else the model writes the text.")
    ] = None,
    text_tokens: Annotated[
        int, typer.Option(help="Most tokens to train and choose on.", min=1)
    ] = 65536,
    held_out_tokens: Annotated[
        int, typer.Option(help="Tokens on which the promise is tested.", min=1)
    ] = 32768,
    sequence_length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 256,
    precision: Annotated[
        Precision, typer.Option(help="Of capture and training; `auto` asks the device.")
    ] = Precision.auto,
    seed: Annotated[int, typer.Option(help="Of text and training order.")] = 0,
    work_dir: Annotated[
        Path | None, typer.Option(help="Unfinished work, to resume; beside OUT by default.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
) -> None:
    """Let tokens leave early (DYNAMAX): train exits, choose thresholds, forecast the speed.

    Writes no exit where none is expected to be faster. The same command continues after an
    interruption.
    """
    require_output(out, overwrite=overwrite)

    from pydantic import ValidationError

    from vllm_effplugin.preparation.precision import default_precision
    from vllm_effplugin.techniques.early_exit.prepare import PrepareRequest
    from vllm_effplugin.techniques.early_exit.prepare import prepare as run
    from vllm_effplugin.techniques.early_exit.tune import LEARNING_RATES

    working = default_precision() if precision is Precision.auto else precision.value
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
                "seed": seed,
            }
        )
    except ValidationError as error:
        raise ConfigError(_describe(error)) from None
    run(model, out, request, work_dir=work_dir, overwrite=overwrite)


def parse_numbers(option: str, text: str, kind: Callable[[str], N]) -> list[N]:
    """Numbers as typed: `14,20,24`.

    Raises:
        ConfigError: when they are not that.
    """
    try:
        return [kind(number) for number in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text!r} is not a list of numbers with commas") from None
