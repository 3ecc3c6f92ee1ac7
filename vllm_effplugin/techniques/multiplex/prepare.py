"""`effplugin prepare multiplex`: data, head, multiplexers, accuracy, speed, choice, checkpoint.

Every stage leaves its result in a work directory, so that the same command continues where an
interrupted one stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from rich.console import Console
from torch import Tensor

from vllm_effplugin.config import EfficiencyConfig
from vllm_effplugin.config.checkpoint import (
    extra_tensors,
    is_classifier,
    read_efficiency,
    read_model_config,
    require_output,
    staged_directory,
    write_checkpoint,
)
from vllm_effplugin.config.provenance import collect_provenance
from vllm_effplugin.errors import ConfigError, UnsupportedError
from vllm_effplugin.offline import run_with_engine
from vllm_effplugin.preparation.backbone import Backbone, load_backbone
from vllm_effplugin.preparation.base import fingerprint, stored_dtype
from vllm_effplugin.preparation.classifier import (
    check_classifiable,
    classes_of,
    classifier_architecture,
    has_softmax,
    own_head,
    write_classifier,
    write_stock,
)
from vllm_effplugin.preparation.labelled import (
    Data,
    DataSettings,
    digest,
    read_data,
    tokenized_data,
)
from vllm_effplugin.preparation.precision import Precision
from vllm_effplugin.preparation.states import capture
from vllm_effplugin.preparation.tables import print_whole
from vllm_effplugin.preparation.workdir import WorkDirectory
from vllm_effplugin.techniques.joint_exit.training import JointTrainer, TrainSettings
from vllm_effplugin.techniques.multiplex.accuracy import GROUPINGS, Company, in_company
from vllm_effplugin.techniques.multiplex.config import MOST, MULTIPLEXERS, MultiplexConfig
from vllm_effplugin.techniques.multiplex.features import capture_lower
from vllm_effplugin.techniques.multiplex.layers import Mixing, Multiplexer
from vllm_effplugin.techniques.multiplex.measure import Speed, measure
from vllm_effplugin.techniques.multiplex.report import PointReport, frontier_png, points_table
from vllm_effplugin.techniques.multiplex.training import MultiplexSettings, MultiplexTrainer

logger = logging.getLogger(__name__)

REVERSIBLE: Mixing = "reversible"


class PrepareRequest(BaseModel):
    """Everything that decides what comes out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: DataSettings
    sizes: Annotated[
        tuple[Annotated[int, Field(ge=2, le=MOST)], ...],
        AfterValidator(lambda sizes: tuple(sorted(set(sizes)))),
    ] = Field((2,), min_length=1)
    depths: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, description="Layers that each sequence runs alone; half of them by default."
    )
    train: MultiplexSettings = Field(default_factory=MultiplexSettings)
    head: TrainSettings = Field(default_factory=TrainSettings)
    ablation: bool = Field(
        False, description="Also train plain adapters and the released layout, and compare."
    )
    groupings: int = Field(GROUPINGS, ge=2, description="Over which accuracy is averaged.")
    most_loss: float = Field(0.01, ge=0, lt=1, description="Of accuracy, for a gain of speed.")
    least_gain: float = Field(
        1.03, gt=0, description="Measured speed against running alone, from which it is written."
    )
    measured_rows: int = Field(512, ge=1, description="Held-out texts classified for speed.")
    max_wait_ms: float = Field(2.0, ge=0, le=1000)
    precision: Precision = "fp32"


_CHOOSES = {"most_loss", "least_gain", "measured_rows", "max_wait_ms"}


@dataclass(frozen=True)
class Outcome:
    """What `prepare` found.

    Attributes:
        config: what is written; None without a gain.
        reports: running alone, and every point.
    """

    config: MultiplexConfig | None
    reports: list[PointReport]


def prepare(
    model: Path,
    out: Path,
    request: PrepareRequest,
    *,
    work_dir: Path | None = None,
    keep: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> Outcome:
    """Make a classifier that merges sequences.

    Args:
        model: a language model, which gets a head, a classifier, or one of `prepare classify`,
            whose exits stay.
        out: directory to write.
        request: what to make.
        work_dir: for unfinished work; beside `out` by default, removed on success.
        keep: keep it.
        overwrite: replace a non-empty `out`.
        console: where the tables go.

    Raises:
        ConfigError: settings or data that cannot work, or an unknown architecture.
        CheckpointError: no model at `model`, or an `out` or work directory that cannot be used.
        UnsupportedError: a model that vLLM cannot run.
    """
    console = console or Console()
    require_output(out, overwrite=overwrite)
    config = read_model_config(model)
    architecture = classifier_architecture(config)
    check_classifiable(model, config, request.data.max_length, with_exits=True)
    if is_classifier(config) and not has_softmax(config):
        raise UnsupportedError(
            f"{model} gives no softmax over its classes (`problem_type` or `activation_fn` in its "
            "config.json), which merging needs: give its base model"
        )
    before = read_efficiency(model)
    depths = _depths(request, int(config["num_hidden_layers"]), before)
    data = read_data(request.data, classes_of(config) if is_classifier(config) else None)
    out = out.absolute()
    decides = request.model_dump(mode="json", exclude=_CHOOSES)
    work = WorkDirectory(
        work_dir or out.with_name(f".{out.name}.work"),
        fingerprint(model, None, {**decides, "texts": digest(data)}),
    )
    sequences = tokenized_data(model, data, request.data.max_length)
    # As vLLM serves it; what is stored in fp32 it serves in fp16, which bf16 is further from.
    half = stored_dtype(config) == torch.bfloat16 and request.precision == "bf16"
    backbone = load_backbone(model, architecture, torch.bfloat16 if half else torch.float32)
    run = _Run(model, config, backbone, data, sequences, request, work)
    found = list(run.points(depths))
    stock = _stock(model, architecture, data, run.head, work)
    reports = [run.alone]
    for depth in depths:
        own = [point for point in found if point.depth == depth]
        served = [point for point in own if point.mixing == REVERSIBLE]
        speeds = _speeds(stock, before, served, run, depth)
        reports[0] = run.alone.model_copy(update=speeds[1].model_dump())
        reports += [point.model_copy(update=speeds[point.size].model_dump()) for point in served]
    ablation = [point for point in found if point.mixing != REVERSIBLE]
    chosen = choose(reports, request.most_loss, request.least_gain)
    written = [point.name for point in chosen]
    plot = frontier_png(reports, written)
    title = "Held-out texts" + (
        ", speed behind the exits, accuracy of all" if before.joint_exit else ""
    )
    print_whole(console, points_table(title, reports, written))
    if ablation:
        print_whole(console, points_table("Other adapters", ablation, []))
    provenance = {
        **collect_provenance(),
        "technique": "multiplex",
        "arguments": {"model": str(model), **request.model_dump(mode="json")},
        "classes": data.classes,
        "points": [report.model_dump() for report in reports],
        "ablation": [report.model_dump() for report in ablation],
    }
    config_out: MultiplexConfig | None = None
    if chosen:
        config_out = MultiplexConfig(
            depth=chosen[0].depth,
            sizes=tuple(sorted(point.size for point in chosen)),
            max_wait_ms=request.max_wait_ms,
        )
        write_checkpoint(
            stock,
            out,
            before.model_copy(update={"multiplex": config_out}),
            tensors=extra_tensors(model) | run.tensors(config_out.depth, config_out.sizes),
            provenance=provenance,
            files={"multiplex.png": plot},
            overwrite=overwrite,
            passing=work.folder,
        )
    else:
        console.print(
            f"[bold]No gain:[/bold] nothing is {request.least_gain} times as fast and loses "
            f"at most {request.most_loss} of accuracy. The checkpoint is written without merging."
        )
        write_stock(
            stock, out, provenance, {"multiplex.png": plot}, work.folder, overwrite=overwrite
        )
    if not keep:
        work.remove()
    return Outcome(config_out, reports)


def _depths(request: PrepareRequest, num_layers: int, before: EfficiencyConfig) -> tuple[int, ...]:
    depths = request.depths or (num_layers // 2,)
    if list(depths) != sorted(set(depths)):
        raise ConfigError(f"--mux-layer must be increasing depths, got {list(depths)}")
    for depth in depths:
        update = {"multiplex": MultiplexConfig(depth=depth, sizes=(2,))}
        before.model_copy(update=update).validate_for(num_layers)
    return depths


def choose(
    reports: Sequence[PointReport], most_loss: float, least_gain: float
) -> list[PointReport]:
    """The points to write: of one depth, all that gain speed and lose little.

    A standard error of the difference counts as lost. The depth is that of the fastest.

    Args:
        reports: measured points.
        most_loss: of accuracy, against running alone.
        least_gain: of speed, relative to running alone; above 1, every round must have been faster.
    """
    good = [
        report
        for report in reports
        if report.size > 1
        and (report.ratio or 0) >= least_gain
        and (report.lowest or 0) > min(1, least_gain)
        and report.difference - report.error >= -most_loss
    ]
    if not good:
        return []
    depth = max(good, key=lambda report: report.ratio or 0).depth
    return [report for report in good if report.depth == depth]


# --- Stages --------------------------------------------------------------------------------------


class _Run:
    """Head, multiplexers and their accuracy, from the work directory where they are there."""

    def __init__(
        self,
        model: Path,
        config: Mapping[str, Any],
        backbone: Backbone,
        data: Data,
        sequences: dict[str, list[list[int]]],
        request: PrepareRequest,
        work: WorkDirectory,
    ) -> None:
        self.model, self.request, self.work = model, request, work
        self.data, self.sequences = data, sequences
        self._backbone = backbone
        self._states = self._captured()
        self.head = self._trained_head(config)
        weight, bias = self.head
        logits = torch.nn.functional.linear(self._states["dev"].float(), weight, bias)
        self._alone = logits.softmax(-1)
        accuracy = float((self._alone.argmax(-1) == data.dev.labels).float().mean())
        self.alone = PointReport(
            depth=0,
            size=1,
            mixing=REVERSIBLE,
            accuracy=accuracy,
            spread=0.0,
            difference=0.0,
            error=0.0,
            flips=0.0,
        )

    def _captured(self) -> dict[str, Tensor]:
        """What the head reads of each text alone."""
        kept = self.work.tensors("states")
        if kept is None:
            kept = {
                name: capture(self._backbone, each, (), f"states, {name}")[0]
                for name, each in self.sequences.items()
            }
            self.work.save_tensors("states", kept)
        return kept

    def _trained_head(self, config: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        """The model's own, or one that learns on the frozen states."""
        own = own_head(self.model, dict(config))
        if own is not None:
            return own
        kept = self.work.tensors("head")
        if kept is None:
            trainer = JointTrainer(
                self._states["train"][None],
                self.data.train.labels,
                len(self.data.classes),
                [1.0],
                self.request.head,
                final_bias=config["model_type"] == "bert",
            )
            trained = trainer.warm_up()
            kept = {"weight": trained.weight[0].contiguous(), "bias": trained.bias[0].contiguous()}
            self.work.save_tensors("head", kept)
        return kept["weight"], kept["bias"] if config["model_type"] == "bert" else None

    def points(self, depths: Sequence[int]) -> Iterator[PointReport]:
        """Every size at every depth, and other adapters where they are asked for."""
        for depth in depths:
            yield from self._points(depth, REVERSIBLE, self.request.sizes)
            if self.request.ablation:
                yield from self._points(depth, "none", self.request.sizes)
                if 2 in self.request.sizes:
                    yield from self._points(depth, "released", (2,))

    def _points(self, depth: int, mixing: Mixing, sizes: Sequence[int]) -> Iterator[PointReport]:
        stage = _stage(depth, mixing)
        kept = self.work.result(f"{stage}-accuracy", _Points)
        if kept is None:
            layers = self._layers(depth, mixing, sizes)
            request, labels = self.request, self.data.dev.labels
            lower = capture_lower(
                self._backbone, self.sequences["dev"], depth, request.precision, f"l={depth}, dev"
            )
            kept = _Points(
                points=[
                    _report(
                        depth,
                        mixing,
                        layer.size,
                        in_company(
                            self._backbone,
                            layer,
                            lower,
                            labels,
                            self._alone,
                            self.head,
                            request.precision,
                            request.groupings,
                        ),
                    )
                    for layer in layers
                ]
            )
            self.work.save_result(f"{stage}-accuracy", kept)
        yield from kept.points

    def _layers(self, depth: int, mixing: Mixing, sizes: Sequence[int]) -> list[Multiplexer]:
        stage, request = _stage(depth, mixing), self.request
        torch.manual_seed(request.train.seed)
        layers = [Multiplexer(self._backbone.hidden_size, size, mixing) for size in sizes]
        kept = self.work.tensors(stage)
        if kept is None:
            for layer in layers:
                layer.initialise()
            lower = capture_lower(
                self._backbone,
                self.sequences["train"],
                depth,
                request.precision,
                f"l={depth}, train",
            )
            trainer = MultiplexTrainer(
                self._backbone,
                layers,
                lower,
                self._states["train"],
                self.data.train.labels,
                self.head,
                request.train,
                stage,
            )
            trainer.train(self.work.folder)
            trainer.finish()
            kept = {
                f"{layer.size}.{name}": tensor.detach().cpu().contiguous()
                for layer in layers
                for name, tensor in layer.state_dict().items()
            }
            self.work.save_tensors(stage, kept)
        for layer in layers:
            prefix = f"{layer.size}."
            own = {n.removeprefix(prefix): t for n, t in kept.items() if n.startswith(prefix)}
            layer.load_state_dict(own)
            layer.float().eval().requires_grad_(False)
        return layers

    def tensors(self, depth: int, sizes: Sequence[int]) -> dict[str, Tensor]:
        """Of the multiplexers, as in a checkpoint."""
        kept = self.work.tensors(_stage(depth, REVERSIBLE))
        assert kept is not None
        return {
            f"{MULTIPLEXERS}.{name}": tensor
            for name, tensor in kept.items()
            if int(name.partition(".")[0]) in sizes
        }


class _Points(BaseModel):
    points: list[PointReport]


def _stage(depth: int, mixing: Mixing) -> str:
    return f"multiplexers-{mixing}-{depth}"


def _report(depth: int, mixing: Mixing, size: int, company: Company) -> PointReport:
    return PointReport(
        depth=depth,
        size=size,
        mixing=mixing,
        accuracy=company.accuracy,
        spread=company.spread,
        difference=company.difference,
        error=company.difference_se,
        flips=company.flips,
    )


def _stock(
    model: Path,
    architecture: str,
    data: Data,
    head: tuple[Tensor, Tensor | None],
    work: WorkDirectory,
) -> Path:
    """The classifier without merging: the model itself, if it is one."""
    if is_classifier(read_model_config(model)):
        return model
    folder = work.folder / "classifier"
    if not folder.exists():
        with staged_directory(folder, overwrite=False) as staging:
            write_classifier(model, staging, architecture, data.classes, *head)
    return folder


def _speeds(
    stock: Path,
    before: EfficiencyConfig,
    points: Sequence[PointReport],
    run: _Run,
    depth: int,
) -> dict[int, Speed]:
    """By size; of 1 for running alone."""
    request = run.request
    rows = run.sequences["dev"][: request.measured_rows]
    stage = f"speeds-{depth}-{len(rows)}"
    kept = run.work.result(stage, _Speeds)
    if kept is None:
        sizes = [point.size for point in points]
        multiplex = MultiplexConfig(depth=depth, sizes=tuple(sizes))
        folder = run.work.folder / "candidate"
        logger.warning("measuring depth %d in vLLM", depth)
        write_checkpoint(
            stock,
            folder,
            before.model_copy(update={"multiplex": multiplex}),
            tensors=extra_tensors(run.model) | run.tensors(depth, sizes),
            provenance={},
            overwrite=True,
        )
        found = run_with_engine(measure, str(folder), rows, sizes, request.data.max_length)
        speeds = [Speed.model_validate(each) for each in found]
        kept = _Speeds(speeds=dict(zip((1, *sizes), speeds, strict=True)))
        run.work.save_result(stage, kept)
    return kept.speeds


class _Speeds(BaseModel):
    speeds: dict[int, Speed]
