"""`effplugin prepare layer-parallel`: its options."""

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
    SequenceLength,
    Text,
    WorkDir,
    WorkingPrecision,
    in_options,
)
from vllm_effplugin.config.checkpoint import require_output
from vllm_effplugin.errors import ConfigError


class Schedule(StrEnum):
    """How a group's MLPs see the attention of its other members."""

    bypass = "bypass"
    fused = "fused"


class Train(StrEnum):
    """What distillation trains."""

    lora = "lora"
    full = "full"


def layer_parallel(
    model: Model,
    out: Out,
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
    text: Text = None,
    text_tokens: Annotated[
        int, typer.Option(help="Most tokens of training text; distillation repeats a shorter one.")
    ] = 131072,
    sequence_length: SequenceLength = 256,
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
    precision: WorkingPrecision = Precision.auto,
    seed: Seed = 0,
    no_ray: Annotated[bool, typer.Option("--no-ray", help="Search in this process.")] = False,
    work_dir: WorkDir = None,
    overwrite: Overwrite = False,
) -> None:
    """Run adjacent layers concurrently (CQIL): search groups, repair, distil, write a checkpoint.

    Give one of --target-depth, --max-kl and --groups. The same command continues after an
    interruption.
    """
    require_output(out, overwrite=overwrite)

    from pydantic import ValidationError

    from vllm_effplugin.techniques.layer_parallel.distill import LEARNING_RATES
    from vllm_effplugin.techniques.layer_parallel.prepare import PrepareRequest
    from vllm_effplugin.techniques.layer_parallel.prepare import prepare as run

    working = precision.resolve()
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
        raise in_options(error, sections=("search", "distill")) from None
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
