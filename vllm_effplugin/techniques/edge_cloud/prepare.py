"""`effplugin prepare edge-cloud`: exits trained on the whole model, which is then cut in two.

The text, the exits and the promise are those of `prepare early-exit`; what differs is that no layer
follows the last exit, so that a token which stays there is one that the cloud is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.table import Table

from vllm_effplugin.config import LANGUAGE_MODELS, EfficiencyConfig
from vllm_effplugin.config.checkpoint import (
    read_efficiency,
    read_model_config,
    require_output,
    stock_architecture,
)
from vllm_effplugin.config.provenance import collect_provenance
from vllm_effplugin.errors import ConfigError
from vllm_effplugin.plan import build_plan
from vllm_effplugin.preparation.base import (
    check_base,
    check_on_cpu,
    find_text,
    fingerprint,
    stored_dtype,
)
from vllm_effplugin.preparation.plot import new_axes, to_png
from vllm_effplugin.preparation.workdir import WorkDirectory
from vllm_effplugin.techniques.early_exit.config import NEVER
from vllm_effplugin.techniques.early_exit.passage import STAYS
from vllm_effplugin.techniques.early_exit.prepare import (
    PrepareRequest,
    check_one_kind,
    exit_reports,
    train_exits,
)
from vllm_effplugin.techniques.early_exit.report import exits_table
from vllm_effplugin.techniques.early_exit.thresholds import (
    PRICES,
    Promise,
    Sample,
    auroc,
    certify,
)
from vllm_effplugin.techniques.early_exit.thresholds import Path as PricePath
from vllm_effplugin.techniques.early_exit.training import TrainSettings
from vllm_effplugin.techniques.edge_cloud.config import CloudConfig, EdgeConfig, Mode, Transport
from vllm_effplugin.techniques.edge_cloud.split import (
    check_partition,
    model_name,
    write_part,
)

FRONTIER_POINTS = 24

Positive = Annotated[int, Field(ge=1)]


class SplitRequest(BaseModel):
    """Everything that decides what comes out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    partition: Positive = Field(description="Layers of the edge.")
    exits: tuple[Positive, ...] = Field(
        min_length=2, description="Depths; the last is the partition."
    )
    gate: Literal["linear", "mlp", "softmax"] = "mlp"
    gate_width: int = Field(64, ge=1)
    adapter: Literal["none", "linear"] = "linear"
    min_agreement: float = Field(0.9, gt=0, lt=1)
    confidence: float = Field(0.95, gt=0.5, lt=1)
    mode: Mode = "collaborative"
    transport: Transport = "fp16"
    deadline_s: float = Field(1.0, gt=0)
    gather_ms: float = Field(50.0, ge=0, le=1000)
    train: TrainSettings = Field(default_factory=TrainSettings)
    text: Path | None = None
    text_tokens: int = Field(65536, ge=1)
    held_out_tokens: int = Field(32768, ge=1)
    sequence_length: int = Field(256, ge=2)
    seed: int = 0

    def early_exit(self) -> PrepareRequest:
        """The part of it that training exits needs."""
        return PrepareRequest(
            exits=self.exits,
            gate=self.gate,
            gate_width=self.gate_width,
            adapter=self.adapter,
            min_agreement=self.min_agreement,
            confidence=self.confidence,
            train=self.train,
            text=self.text,
            text_tokens=self.text_tokens,
            held_out_tokens=self.held_out_tokens,
            sequence_length=self.sequence_length,
            seed=self.seed,
        )


class Frontier(BaseModel):
    """A point of the frontier, on held-out text.

    Attributes:
        agreement: share of the tokens that are the whole model's.
        asked: share of the tokens that the cloud is asked for.
        first: share that leaves at the first exit.
    """

    agreement: float
    asked: float
    first: float


def prepare(
    model: Path,
    out: Path,
    request: SplitRequest,
    *,
    work_dir: Path | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> Promise | None:
    """Write `out/edge` and `out/cloud`.

    Args:
        model: the whole model's checkpoint directory.
        out: directory to write.
        request: what to make.
        work_dir: for unfinished work; beside `out` by default, removed on success.
        overwrite: replace what is in `out`.
        console: where the tables go.

    Returns:
        what the thresholds promise; None where no threshold keeps the agreement.

    Raises:
        ConfigError: settings or text that cannot work, or an unknown architecture.
        CheckpointError: no model at `model`, or an `out` or work directory that cannot be used.
        UnsupportedError: a model that cannot be split.
    """
    console = console or Console()
    for part in ("edge", "cloud"):
        require_output(out / part, overwrite=overwrite)
    layers = check_partition(model, request.partition)
    _check(model, request)
    check_base(model, request.sequence_length, beneath=("layer_parallel",))
    cut = read_efficiency(model).model_copy(
        update={"split_after": tuple(depth - 1 for depth in request.exits)}
    )
    build_plan(cut, layers)  # an exit is a boundary, which may not lie inside a group
    dtype = stored_dtype(read_model_config(model))
    out = out.absolute()
    work = WorkDirectory(
        work_dir or out.with_name(f".{out.name}.work"),
        fingerprint(model, request.text, request.model_dump(mode="json")),
    )
    exits = request.early_exit()
    text = find_text(model, request.text, exits.text_shape(), request.seed, work)
    everything = exits.config(request.exits, [0.5] * len(request.exits))
    tensors, choosing, held_out, losses = train_exits(model, dtype, everything, text, exits, work)
    path = PricePath(choosing, [1 - depth / layers for depth in request.exits])
    promise = certify(path, held_out, request.min_agreement, request.confidence)
    thresholds = [NEVER] * len(request.exits) if promise is None else promise.thresholds
    frontier = _frontier(path, held_out)

    chosen = range(len(request.exits))
    console.print(exits_table(exit_reports(everything, chosen, promise, held_out)))
    console.print(_table(promise, thresholds, held_out, request))
    name = model_name(model)
    provenance = {
        **collect_provenance(),
        "technique": "edge_cloud",
        "arguments": {"model": str(model), **request.model_dump(mode="json")},
        "seed": request.seed,
        "auroc": [round(value, 4) for value in auroc(held_out)],
        "promise": None if promise is None else vars(promise),
        "frontier": [point.model_dump() for point in frontier],
        "training": losses,
    }
    edge = EdgeConfig(
        role="edge",
        model=name,
        layers=layers,
        mode=request.mode,
        transport=request.transport,
        deadline_s=request.deadline_s,
        gather_ms=request.gather_ms,
    )
    written: dict[str, Any] = {
        "work": work.folder,
        "provenance": provenance,
        "overwrite": overwrite,
    }
    write_part(
        model, out / "edge", 0, request.partition,
        EfficiencyConfig(early_exit=exits.config(request.exits, thresholds), edge_cloud=edge),
        tensors=tensors, files={"frontier.png": frontier_png(frontier, promise)}, **written,
    )  # fmt: skip
    cloud = CloudConfig(role="cloud", model=name, partition=request.partition)
    write_part(
        model, out / "cloud", request.partition, layers,
        EfficiencyConfig(edge_cloud=cloud), **written,
    )  # fmt: skip
    work.remove()
    return promise


def _check(model: Path, request: SplitRequest) -> None:
    if request.exits[-1] != request.partition:
        raise ConfigError(
            f"--exits {','.join(map(str, request.exits))}: the last exit has to be the partition, "
            f"{request.partition}"
        )
    if list(request.exits) != sorted(set(request.exits)):
        raise ConfigError(f"--exits must be increasing depths, got {list(request.exits)}")
    config = read_model_config(model)
    if stock_architecture(config) not in LANGUAGE_MODELS:
        raise ConfigError(
            f"{config['architectures'][0]} cannot be split: supported are "
            f"{', '.join(LANGUAGE_MODELS)}"
        )
    check_one_kind(model, config)
    check_on_cpu("an edge is prepared", "edges are served on CPUs only")


def _frontier(path: PricePath, held_out: Sample) -> list[Frontier]:
    """Along the path, on held-out text."""
    points = []
    for price in PRICES[:: max(1, len(PRICES) // FRONTIER_POINTS)].tolist():
        fires = held_out.fires(path.thresholds(price))
        points.append(
            Frontier(
                agreement=1 - float(held_out.wrong(fires).mean()),
                asked=float(np.mean(fires == STAYS)),
                first=float(np.mean(fires == 0)),
            )
        )
    return points


def _table(
    promise: Promise | None, thresholds: Sequence[float], held_out: Sample, request: SplitRequest
) -> Table:
    asked = float(np.mean(held_out.fires(thresholds) == STAYS))
    if promise is None:
        title = f"No threshold keeps an agreement of {request.min_agreement}: every token is asked"
    else:
        title = (
            f"Agreement {promise.agreement:.4f} on held-out text, at least "
            f"{promise.at_least:.4f} with {request.confidence:.0%} confidence"
        )
    table = Table(title=title)
    for name in ("edge layers", "tokens that the cloud is asked for"):
        table.add_column(name, justify="right")
    table.add_row(str(request.partition), f"{asked:.1%}")
    return table


def frontier_png(points: Sequence[Frontier], promise: Promise | None) -> bytes:
    """What the cloud is asked for, over agreement; a line where the promise is kept."""
    axes = new_axes("agreement with the whole model, held-out text", "share of the tokens")
    agreement = [point.agreement for point in points]
    axes.plot(agreement, [point.asked for point in points], "o-", ms=4, label="asked for")
    axes.plot(
        agreement, [point.first for point in points], "o-", ms=4, label="left at the first exit"
    )
    if promise is not None:
        axes.axvline(promise.agreement, color="gray", lw=1, label="chosen")
    axes.set_ylim(0, 1)
    return to_png(axes)
