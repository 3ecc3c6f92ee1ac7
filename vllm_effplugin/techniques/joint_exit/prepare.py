"""`effplugin prepare classify`: data, fine-tuning, states, heads and gates, choice, checkpoint.

Every stage leaves its result in a work directory, so that the same command continues where an
interrupted one stopped, and another `--write` or `--max-loss` starts from what is there.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from vllm_effplugin.config import EfficiencyConfig
from vllm_effplugin.config.checkpoint import (
    is_classifier,
    read_model_config,
    require_output,
    staged_directory,
    write_checkpoint,
)
from vllm_effplugin.config.provenance import collect_provenance
from vllm_effplugin.errors import ConfigError, UnsupportedError
from vllm_effplugin.offline import run_with_engine
from vllm_effplugin.preparation.backbone import Backbone, load_backbone
from vllm_effplugin.preparation.base import (
    fingerprint,
    stored_dtype,
)
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
from vllm_effplugin.techniques.joint_exit import candidates as points
from vllm_effplugin.techniques.joint_exit.candidates import Answers, Candidate, Held
from vllm_effplugin.techniques.joint_exit.config import ConformalLevel
from vllm_effplugin.techniques.joint_exit.finetune import FineTuner, FineTuneSettings
from vllm_effplugin.techniques.joint_exit.measure import Speed, measure
from vllm_effplugin.techniques.joint_exit.report import (
    MethodReport,
    exit_figures,
    exits_table,
    frontier_png,
    method_report,
    methods_table,
)
from vllm_effplugin.techniques.joint_exit.training import Joint, JointTrainer, TrainSettings
from vllm_effplugin.techniques.joint_exit.uncertainty import conformal_thresholds

logger = logging.getLogger(__name__)

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Written = Literal["joint", "threshold", "fixed", "final"]

SWEEP = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
"""Trade-offs between loss in nats and the share of the model that runs."""

POINTS_PER_METHOD = 3
"""Operating points of a method that are measured in vLLM: so many that may be taken, and as many
over the rest of its frontier."""

WORTH_IT = 1.03
"""Measured speed, relative to the full model, from which exits are written; and no round may have
been slower."""

FEW_HELD_OUT = 300
"""Sequences below which a choice among operating points means little."""

SAME = 0.98
"""Share of the sequences for which vLLM is expected to give the class that was replayed."""


UNDETACHED = ", r not detached"
"""What names of operating points say of heads whose loss is plain cross-entropy."""


class ClassifyRequest(BaseModel):
    """Everything that decides what comes out, but for which method is written."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: DataSettings
    exits: tuple[Positive, ...] | None = Field(None, description="Depths; three by default.")
    tune: FineTuneSettings | None = Field(None, description="Fine-tune the backbone first.")
    train: TrainSettings = Field(default_factory=TrainSettings)
    trade_offs: tuple[Annotated[float, Field(ge=0)], ...] = Field(SWEEP, min_length=1)
    ablation: bool = Field(
        False, description="Also train with `r` not detached, compare, and choose among both."
    )
    most_loss: float = Field(0.005, ge=0, lt=1, description="Of accuracy, for a gain of speed.")
    coverage: tuple[Share, ...] = Field((0.9, 0.95), description="Of prediction sets.")
    measured_rows: int = Field(512, ge=1, description="Held-out texts classified for speed.")
    precision: Precision = "fp32"


@dataclass(frozen=True)
class Outcome:
    """What `prepare` found.

    Attributes:
        chosen: per method, the operating point taken; methods without one lose too much.
        reports: the full model and what was measured.
    """

    chosen: dict[str, Candidate]
    reports: list[MethodReport]


def prepare(
    model: Path,
    out: Path,
    request: ClassifyRequest,
    *,
    write: Written = "joint",
    work_dir: Path | None = None,
    keep: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> Outcome:
    """Make a classifier with exits.

    Args:
        model: the base model's checkpoint directory, with a classification head or without.
        out: directory to write.
        request: what to make.
        write: which method's operating point the checkpoint has; `final` is a stock classifier.
        work_dir: for unfinished work; beside `out` by default, removed on success.
        keep: keep it, for another call with the same request.
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
    check_classifiable(model, config, request.data.max_length)
    _check_head(model, config, request)
    num_layers = int(config["num_hidden_layers"])
    depths = _depths(request, num_layers)
    data = read_data(request.data, classes_of(config) if is_classifier(config) else None)
    out = out.absolute()
    work = WorkDirectory(
        work_dir or out.with_name(f".{out.name}.work"),
        fingerprint(model, None, {**_decides_states(request), "texts": digest(data)}),
    )
    sequences = tokenized_data(model, data, request.data.max_length)
    if len(data.dev) < FEW_HELD_OUT:
        logger.warning(
            "%d held-out rows are few to choose on: expect other accuracies on other texts",
            len(data.dev),
        )
    states = _states(model, architecture, depths, data, sequences, request, work)
    held = Held(states["dev"], data.dev.labels, torch.tensor([len(s) for s in sequences["dev"]]))
    alone, joint, undetached = _trained(model, config, states, data, depths, request, work)
    stock = _classifier(model, architecture, data, alone, request, work)

    full = points.full_answers(alone, held)
    found = {
        "joint": [
            candidate
            for trained, suffix in ((joint, ""), (undetached, UNDETACHED))
            for trade_off, heads in trained.items()
            for candidate in points.joint_candidates(
                heads, trade_off, depths, num_layers, held, suffix=suffix
            )
        ],
        "threshold": list(points.threshold_candidates(alone, depths, num_layers, held)),
        "fixed": list(points.fixed_candidates(alone, depths, num_layers, held)),
    }
    labels = data.dev.labels
    shown = [
        candidate.calibrated(labels)
        for each in found.values()
        for candidate in points.promising(each, full, request.most_loss, POINTS_PER_METHOD)
    ]
    rows = min(request.measured_rows, len(sequences["dev"]))
    speeds = _speeds(stock, shown, sequences["dev"][:rows], request, work)
    reports = [
        method_report(candidate, full, labels, speed, rows)
        for candidate, speed in zip([None, *shown], speeds, strict=True)
    ]
    _warn_of_surprises(reports[0], labels)
    chosen = choose(shown, speeds[1:], full, request.most_loss)
    ablation = [
        method_report(candidate, full, labels, None, 0)
        for trade_off in undetached
        for heads, suffix in ((joint, ""), (undetached, UNDETACHED))
        for candidate in points.joint_candidates(
            heads[trade_off], trade_off, depths, num_layers, held, (0.0,), suffix
        )
    ]
    taken = chosen.get(write)
    name = "the full model" if taken is None else taken.name
    if taken is not None:
        [own] = (r for c, r in zip(shown, reports[1:], strict=True) if c is taken)
        warn_of_other_classes(own)
    plot = frontier_png(reports, name)
    print_whole(console, methods_table("Held-out sequences", reports, name))
    if ablation:
        print_whole(
            console, methods_table("Whether `r` is detached; the paper's rule, b=0", ablation, None)
        )
    if write != "final" and taken is None:
        others = " and ".join(f"`--write {method}`" for method in chosen)
        console.print(
            f"[bold]No gain:[/bold] no operating point of `{write}` is faster and loses at most "
            f"{request.most_loss} of accuracy. The checkpoint is written without exits."
            + (f" {others} would have some." if others else "")
        )
    provenance = {
        **collect_provenance(),
        "technique": "joint_exit",
        "arguments": {"model": str(model), "write": write, **request.model_dump(mode="json")},
        "classes": data.classes,
        "methods": [report.model_dump() for report in reports],
        "detached_or_not": [report.model_dump() for report in ablation],
    }
    if taken is None:
        write_stock(
            stock, out, provenance, {"frontier.png": plot}, work.folder, overwrite=overwrite
        )
    else:
        taken = taken.only_used()
        figures = exit_figures(taken, labels, num_layers)
        print_whole(console, exits_table(figures))
        provenance["exits"] = [each.model_dump() for each in figures]
        exits = taken.config.model_copy(
            update={"conformal": tuple(_conformal(taken.answers, labels, len(figures), request))}
        )
        write_checkpoint(
            stock,
            out,
            EfficiencyConfig(joint_exit=exits),
            tensors=taken.tensors(),
            provenance=provenance,
            files={"frontier.png": plot},
            overwrite=overwrite,
            passing=work.folder,
        )
    if not keep:
        work.remove()
    return Outcome(chosen, reports)


def _check_head(model: Path, config: dict[str, Any], request: ClassifyRequest) -> None:
    if request.tune is None and is_classifier(config) and not has_softmax(config):
        raise UnsupportedError(
            f"{model} gives no softmax over its classes (`problem_type` or `activation_fn` in its "
            "config.json), which gates and prediction sets rest on: give --lora, which trains "
            "another head, or its base model"
        )


def _depths(request: ClassifyRequest, num_layers: int) -> tuple[int, ...]:
    depths = request.exits
    if depths is None:
        # Early layers have to learn the task before they can say anything about it.
        shares = (0.2, 0.33, 0.53) if request.tune else (0.43, 0.53, 0.67)
        depths = tuple(sorted({max(1, round(num_layers * share)) for share in shares}))
    if list(depths) != sorted(set(depths)):
        raise ConfigError(f"--exits must be increasing depths, got {list(depths)}")
    if depths[-1] >= num_layers:
        raise ConfigError(f"--exits: depth {depths[-1]} is not inside {num_layers} layers")
    return depths


_TRAINS_HEADS = {"train", "trade_offs", "ablation"}
_CHOOSES = {"most_loss", "coverage", "measured_rows"}


def _decides_states(request: ClassifyRequest) -> dict[str, Any]:
    """What captured states depend on; other heads and another choice start from what is there."""
    return request.model_dump(mode="json", exclude=_TRAINS_HEADS | _CHOOSES)


def _heads_stage(request: ClassifyRequest) -> str:
    """Name of the stage that trains heads; another for other settings of it."""
    settings = request.model_dump_json(include=_TRAINS_HEADS)
    return f"heads-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"


def _warn_of_surprises(full: MethodReport, labels: Tensor) -> None:
    """Where the full model itself is not what it is taken for."""
    most_frequent = float(labels.bincount().max() / len(labels))
    if full.accuracy <= most_frequent:
        logger.warning(
            "the full model is right for %.3f of the held-out rows, the most frequent class alone "
            "for %.3f: are --labels in the right order?",
            full.accuracy,
            most_frequent,
        )
    warn_of_other_classes(full)


def warn_of_other_classes(report: MethodReport) -> None:
    """Where vLLM classifies otherwise than the replay that the figures are of."""
    if report.same is not None and report.same < SAME:
        logger.warning(
            "%s: vLLM gives the class that was replayed here for %.3f of the texts only, so that "
            "accuracies and prediction sets are not quite what it will serve (`effplugin eval` "
            "measures that)",
            report.name,
            report.same,
        )


# --- Stages --------------------------------------------------------------------------------------


def _states(
    model: Path,
    architecture: str,
    depths: Sequence[int],
    data: Data,
    sequences: dict[str, list[list[int]]],
    request: ClassifyRequest,
    work: WorkDirectory,
) -> dict[str, Tensor]:
    """What heads read of the training and held-out texts; with a tuned backbone, if asked for."""
    kept = work.tensors("states")
    if kept is not None:
        return kept
    # As vLLM serves it; what is stored in fp32 it serves in fp16, which bf16 is further from.
    stored = stored_dtype(read_model_config(model))
    half = stored == torch.bfloat16 and request.precision == "bf16"
    working = torch.bfloat16 if half else torch.float32
    backbone = load_backbone(model, architecture, working)
    if request.tune is not None:
        tuner = FineTuner(
            backbone,
            depths,
            sequences["train"],
            data.train.labels,
            len(data.classes),
            request.tune,
        )
        work.make()
        tuner.train(work.folder)
        backbone = tuner.finish()
        backbone.model.to(stored)
        tuned = {n: t.contiguous() for n, t in backbone.model.state_dict().items()}
        work.save_tensors("tuned", tuned)
        backbone.model.to(working)
    found = {
        name: capture(backbone, each, depths, f"states, {name}") for name, each in sequences.items()
    }
    if not half and request.precision == "bf16":
        # Once more as who serves it in bf16 gets them: heads then go by what both can tell apart.
        backbone.model.to(torch.bfloat16)
        coarse = capture(backbone, sequences["train"], depths, "states, in bf16")
        found["train"] = torch.cat([found["train"], coarse.float()], 1)
    work.save_tensors("states", found)
    return found


def _trained(
    model: Path,
    config: dict[str, Any],
    states: dict[str, Tensor],
    data: Data,
    depths: Sequence[int],
    request: ClassifyRequest,
    work: WorkDirectory,
) -> tuple[Joint, dict[float, Joint], dict[float, Joint]]:
    """Heads that learnt alone; with gates, per trade-off; and the same with `r` not detached.

    The last are empty where they are not asked for.
    """
    stage = _heads_stage(request)
    stored = work.tensors(stage)
    if stored is None:
        num_layers = int(config["num_hidden_layers"])
        cost = [*(depth / num_layers for depth in depths), 1.0]
        labels = data.train.labels
        trainer = JointTrainer(
            states["train"],
            labels.repeat(states["train"].shape[1] // len(labels)),
            len(data.classes),
            cost,
            request.train,
            final=None if request.tune is not None else own_head(model, config),
            final_bias=config["model_type"] == "bert",
        )
        found = {"alone": trainer.warm_up()}
        for place, trade_off in enumerate(request.trade_offs):
            found[f"joint.{place}"] = trainer.train(trade_off)
            if request.ablation:
                found[f"undetached.{place}"] = trainer.train(trade_off, detach=False)
        stored = {
            f"{name}.{part}": tensor
            for name, heads in found.items()
            for part, tensor in vars(heads).items()
        }
        work.save_tensors(stage, stored)
    tensors = stored

    def read(name: str) -> Joint:
        return Joint(*(tensors[f"{name}.{part}"] for part in Joint.__dataclass_fields__))

    return (
        read("alone"),
        {value: read(f"joint.{i}") for i, value in enumerate(request.trade_offs)},
        {
            value: read(f"undetached.{i}")
            for i, value in enumerate(request.trade_offs if request.ablation else ())
        },
    )


def _classifier(
    model: Path,
    architecture: str,
    data: Data,
    alone: Joint,
    request: ClassifyRequest,
    work: WorkDirectory,
) -> Path:
    """The stock classifier: the model itself, if it is one and stays as it is."""
    config = read_model_config(model)
    if request.tune is None and is_classifier(config):
        return model
    folder = work.folder / "classifier"
    if not folder.exists():
        backbone: Backbone | None = None
        tuned = work.tensors("tuned")
        if tuned is not None:
            backbone = load_backbone(model, architecture, stored_dtype(config))
            backbone.model.load_state_dict(tuned)
        with staged_directory(folder, overwrite=False) as staging:
            write_classifier(
                model,
                staging,
                architecture,
                data.classes,
                alone.weight[-1],
                alone.bias[-1] if architecture.startswith("Bert") else None,
                backbone,
            )
    return folder


def choose(
    shown: Sequence[Candidate], speeds: Sequence[Speed], full: Answers, most_loss: float
) -> dict[str, Candidate]:
    """Of each method the fastest as measured that loses little; none where that is no gain.

    Args:
        shown: what was measured.
        speeds: of each.
        full: the full model's answers on the held-out sequences.
        most_loss: of accuracy.
    """
    found: dict[str, Candidate] = {}
    fastest: dict[str, float] = {}
    for candidate, speed in zip(shown, speeds, strict=True):
        method = candidate.method
        gains = speed.lowest > 1 and speed.ratio > fastest.get(method, WORTH_IT)
        if gains and points.loses_little(candidate, full, most_loss):
            found[method], fastest[method] = candidate, speed.ratio
    return found


def _speeds(
    stock: Path,
    shown: Sequence[Candidate],
    sequences: list[list[int]],
    request: ClassifyRequest,
    work: WorkDirectory,
) -> list[Speed]:
    """Speeds of the full model and of each operating point; only new ones are measured."""
    stage = f"{len(sequences)} texts, {_heads_stage(request)}"
    known = work.result("speeds", _Speeds) or _Speeds(speeds={})
    named = {f"{stage}, {each.method} {each.name}": each for each in shown}
    new = {name: each for name, each in named.items() if name not in known.speeds}
    if not new:
        return [known.speeds[name] for name in (stage, *named)]
    logger.warning("measuring %d operating points in vLLM", len(new) + 1)
    folder = work.folder / "candidate"
    first = next(each for each in shown if each.config.rule == "joint")
    write_checkpoint(
        stock,
        folder,
        EfficiencyConfig(joint_exit=first.config),
        tensors=first.tensors(),
        provenance={},
        overwrite=True,
    )
    arguments = []
    for place, candidate in enumerate(new.values()):
        path = work.folder / f"candidate-{place}.safetensors"
        save_file(candidate.tensors(), path)
        arguments.append((candidate.config.model_dump_json(), str(path)))
    answers = run_with_engine(measure, str(folder), sequences, arguments, request.data.max_length)
    found = known.speeds | {
        name: Speed.model_validate(answer)
        for name, answer in zip((stage, *new), answers, strict=True)
    }
    work.save_result("speeds", _Speeds(speeds=found))
    return [found[name] for name in (stage, *named)]


class _Speeds(BaseModel):
    """What was measured, by name of heads and operating point."""

    speeds: dict[str, Speed]


def _conformal(
    answers: Answers, labels: Tensor, places: int, request: ClassifyRequest
) -> Iterable[ConformalLevel]:
    for coverage in request.coverage:
        yield ConformalLevel(
            coverage=coverage,
            thresholds=conformal_thresholds(
                answers.probabilities.numpy(),
                labels.numpy(),
                answers.exits.numpy(),
                places,
                coverage,
            ),
        )
