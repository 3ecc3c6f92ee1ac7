"""`effplugin prepare early-exit`: text, features, exits, thresholds, forecast, checkpoint.

The text is split in three: exits are trained on the first part, the path of thresholds is learnt
and the exits worth keeping are chosen on the second, and what is promised is tested on the third.

Every stage leaves its result in a work directory, so that the same command continues where an
interrupted one stopped.
"""

from __future__ import annotations

import itertools
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from torch import Tensor

from vllm_effplugin.config import STATE_SPACE_MODELS, EfficiencyConfig
from vllm_effplugin.config.checkpoint import (
    PROVENANCE,
    extra_tensors,
    read_efficiency,
    read_model_config,
    require_output,
    write_checkpoint,
)
from vllm_effplugin.config.provenance import collect_provenance
from vllm_effplugin.errors import ConfigError, UnsupportedError
from vllm_effplugin.offline import run_with_engine
from vllm_effplugin.plan import build_plan
from vllm_effplugin.preparation.base import (
    check_base,
    check_on_cpu,
    find_text,
    fingerprint,
    load_model,
    stored_dtype,
)
from vllm_effplugin.preparation.text import Calibration, TextShape
from vllm_effplugin.preparation.workdir import WorkDirectory
from vllm_effplugin.techniques.early_exit.config import NEVER, EarlyExitConfig, ExitPoint
from vllm_effplugin.techniques.early_exit.exits import Exit
from vllm_effplugin.techniques.early_exit.features import Features, capture
from vllm_effplugin.techniques.early_exit.forecast import (
    Forecast,
    Machine,
    forecast,
    measure_machine,
)
from vllm_effplugin.techniques.early_exit.report import (
    ExitReport,
    Point,
    exits_table,
    forecast_table,
    frontier_png,
)
from vllm_effplugin.techniques.early_exit.thresholds import (
    PRICES,
    Promise,
    Sample,
    auroc,
    certify,
)
from vllm_effplugin.techniques.early_exit.thresholds import (
    Path as PricePath,
)
from vllm_effplugin.techniques.early_exit.training import (
    Trainer,
    TrainSettings,
    confidence,
    new_block,
)
from vllm_effplugin.techniques.early_exit.tune import Tuner, TuneSettings

logger = logging.getLogger(__name__)

CHOOSING_SHARE = 0.2
"""Of the training text, on which thresholds and exits are chosen instead."""

WORTH_IT = 1.01
"""Forecast speed from which exits are written."""

FRONTIER_POINTS = 16
SAVED = ("config.json", "generation_config.json", "model.safetensors.index.json", PROVENANCE)
"""Files of a checkpoint directory that saving a tuned model writes, or that are not its own."""

MOST_EXITS = 6
"""All subsets of the exits are tried."""


Positive = Annotated[int, Field(ge=1)]


class PrepareRequest(BaseModel):
    """Everything that decides what comes out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    exits: tuple[Positive, ...] | None = Field(
        None, description="Depths; three over the later half of the layers by default."
    )
    gate: Literal["linear", "mlp", "mamba", "softmax"] = "linear"
    gate_width: int = Field(64, ge=1)
    adapter: Literal["none", "linear", "block"] = "linear"
    cache: Literal["recompute", "propagate", "copy", "freeze", "state-only"] = "recompute"
    max_pending: int = Field(16, ge=1)
    min_agreement: float = Field(0.95, gt=0, lt=1)
    confidence: float = Field(0.95, gt=0.5, lt=1)
    batches: tuple[Positive, ...] = Field((1, 8, 32), min_length=1)
    train: TrainSettings = Field(default_factory=TrainSettings)
    tune: TuneSettings | None = Field(None, description="Fine-tune the backbone first.")
    text: Path | None = Field(None, description="A file; else the model writes the text.")
    text_tokens: int = Field(65536, ge=1, description="Most tokens to train and choose on.")
    held_out_tokens: int = Field(32768, ge=1, description="Tokens to test the promise on.")
    sequence_length: int = Field(256, ge=2)
    keep_exits: bool = Field(False, description="Write them even where no gain is expected.")
    seed: int = 0

    def text_shape(self) -> TextShape:
        """How much text the stages need."""
        train = max(5, -(-self.text_tokens // self.sequence_length))
        return TextShape(
            sequence_length=self.sequence_length,
            train=train,
            held_out=max(2, -(-self.held_out_tokens // self.sequence_length)),
            at_least=min(train, 5),
        )

    def config(self, depths: Sequence[int], thresholds: Sequence[float]) -> EarlyExitConfig:
        """The `early_exit` section with exits at some depths."""
        return EarlyExitConfig(
            exits=tuple(
                ExitPoint(depth=depth, gate=self.gate, threshold=threshold, adapter=self.adapter)
                for depth, threshold in zip(depths, thresholds, strict=True)
            ),
            cache=self.cache,
            max_pending=self.max_pending,
            gate_width=self.gate_width,
        )


@dataclass(frozen=True)
class Outcome:
    """What `prepare` found.

    Attributes:
        config: what was written; without exits where none pays.
        promise: None where not even the most careful thresholds keep the agreement.
        forecasts: one per batch size, for the thresholds promised.
    """

    config: EarlyExitConfig
    promise: Promise | None
    forecasts: list[Forecast]


def prepare(
    model: Path,
    out: Path,
    request: PrepareRequest,
    *,
    work_dir: Path | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> Outcome:
    """Make a checkpoint with exits.

    Args:
        model: the base model's checkpoint directory, or one with groups of layers.
        out: directory to write.
        request: what to make.
        work_dir: for unfinished work; beside `out` by default, removed on success.
        overwrite: replace a non-empty `out`.
        console: where the tables go.

    Raises:
        ConfigError: settings or text that cannot work, or an unknown architecture.
        CheckpointError: no model at `model`, or an `out` or work directory that cannot be used.
        UnsupportedError: a model that the reference or vLLM cannot run.
    """
    console = console or Console()
    require_output(out, overwrite=overwrite)
    num_layers = check_base(model, request.sequence_length, beneath=("layer_parallel",))
    model_config = read_model_config(model)
    dtype = stored_dtype(model_config)
    beneath = read_efficiency(model)
    depths = _depths(request, num_layers, beneath)
    _check_servable(model, model_config, request, depths)
    out = out.absolute()
    work = WorkDirectory(
        work_dir or out.with_name(f".{out.name}.work"),
        fingerprint(model, request.text, request.model_dump(mode="json")),
    )
    text = find_text(model, request.text, request.text_shape(), request.seed, work)
    base, tuning = model, None
    if request.tune is not None:
        base, tuning = _tune(model, dtype, depths, request.tune, text, work)
    everything = request.config(depths, [0.5] * len(depths))
    tensors, choosing, held_out, losses = train_exits(base, dtype, everything, text, request, work)

    machine = work.result("machine", Machine)
    if machine is None:
        logger.warning("measuring what the parts of the model cost on this machine")
        candidate = work.folder / "candidate"
        write_checkpoint(
            base,
            candidate,
            beneath.model_copy(update={"early_exit": everything}),
            tensors=extra_tensors(model) | tensors,
            provenance={},
            overwrite=True,
        )
        machine = Machine.model_validate(
            run_with_engine(measure_machine, str(candidate), request.batches)
        )
        work.save_result("machine", machine)

    depth_of = plan_depths(beneath, num_layers)
    savings = [1 - depth_of[depth] / depth_of[num_layers] for depth in depths]
    chosen = list(range(len(depths)))
    if not request.keep_exits:
        chosen = _choose(choosing, savings, machine, depths, request)
    path = PricePath(choosing.only(chosen), [savings[i] for i in chosen])
    promise = certify(path, held_out.only(chosen), request.min_agreement, request.confidence)
    config, forecasts = _decide(promise, chosen, held_out, machine, depths, request)
    frontier = list(_frontier(path, chosen, held_out, machine, depths, request))

    reports = exit_reports(everything, chosen, promise, held_out)
    if tuning is not None:
        console.print(
            f"The tuned model without exits says what the original says for {tuning.agreement:.1%} "
            "of the held-out tokens; agreement below is with the tuned model."
        )
    console.print(exits_table(reports))
    if promise is not None:
        console.print(forecast_table(promise, forecasts, request.confidence))
    if not config.exits:
        console.print(
            "[bold]No gain:[/bold] "
            + (
                "no exit keeps the agreement"
                if promise is None
                else "no batch size is expected to be faster"
            )
            + f" (--min-agreement {request.min_agreement}). The checkpoint is written without "
            "exits."
        )
    write_checkpoint(
        base,
        out,
        beneath.model_copy(update={"early_exit": config}),
        tensors=extra_tensors(model) | (_renumbered(tensors, chosen) if config.exits else {}),
        provenance={
            **collect_provenance(),
            "technique": "early_exit",
            "arguments": {"model": str(model), **request.model_dump(mode="json")},
            "seed": request.seed,
            "exits": [report.model_dump() for report in reports],
            "auroc": [round(value, 4) for value in auroc(held_out)],
            "promise": None if promise is None else vars(promise),
            "forecasts": [item.model_dump() for item in forecasts],
            "frontier": [item.model_dump() for item in frontier],
            "machine": machine.model_dump(),
            "training": losses,
            "tuning": None if tuning is None else tuning.model_dump(),
        },
        files={"frontier.png": frontier_png(frontier, promise, forecasts)},
        overwrite=overwrite,
        copy=base != model,  # what lies in the work directory goes with it
    )
    work.remove()
    return Outcome(config, promise, forecasts)


def _check_servable(
    model: Path, config: Mapping[str, Any], request: PrepareRequest, depths: Sequence[int]
) -> None:
    """Refuse now what the engine would refuse after the training."""
    architecture = str(config["architectures"][0])
    block = request.config(depths, [NEVER] * len(depths))
    EfficiencyConfig(early_exit=block).check_kind(architecture)
    if request.tune is not None and architecture in STATE_SPACE_MODELS:
        raise UnsupportedError(
            f"--tune-backbone is not supported on {architecture} yet: leave it at `none`"
        )
    if request.tune is not None and config.get("efficiency") is not None:
        raise UnsupportedError(
            f"--tune-backbone is not supported on {model}, whose layers run in groups: leave it at "
            "`none`"
        )
    check_one_kind(model, config)
    check_on_cpu("early exit is prepared", "the one that will serve: its costs decide what pays")


def check_one_kind(model: Path, config: Mapping[str, Any]) -> None:
    """Refuse a model whose layers do not all share one set of cache blocks.

    Raises:
        UnsupportedError: naming the model.
    """
    if len(set(config.get("layer_types") or ())) > 1:
        raise UnsupportedError(
            f"{model} mixes kinds of attention layers, which early exit does not support"
        )


def plan_depths(efficiency: EfficiencyConfig, num_layers: int) -> dict[int, int]:
    """How many units of a model's plan lie before each depth at which one ends, and all of them."""
    units = build_plan(efficiency, num_layers).units
    return {0: 0} | {unit.layers[-1] + 1: count for count, unit in enumerate(units, 1)}


def _depths(request: PrepareRequest, num_layers: int, beneath: EfficiencyConfig) -> tuple[int, ...]:
    depths = request.exits
    if depths is None:
        between = plan_depths(beneath, num_layers)  # groups, not inside of one
        wanted = (num_layers * part // 12 for part in (7, 9, 10))
        found = {max(depth for depth in between if depth <= at) for at in wanted}
        depths = tuple(sorted(found - {0}))
    if list(depths) != sorted(set(depths)):
        raise ConfigError(f"--exits must be increasing depths, got {list(depths)}")
    if len(depths) > MOST_EXITS:
        raise ConfigError(f"--exits: at most {MOST_EXITS} exits, got {len(depths)}")
    config = request.config(depths, [NEVER] * len(depths))
    config.check_depths(num_layers)
    together = beneath.model_copy(update={"early_exit": config})
    together.validate_for(num_layers)
    build_plan(together, num_layers)
    return depths


class Tuning(BaseModel):
    """What tuning the backbone did.

    Attributes:
        agreement: share of held-out tokens on which the tuned and the original model agree.
        loss: KL(original || tuned) of the last layer over the steps, in nats.
        seconds: spent in steps.
    """

    agreement: float
    loss: list[float]
    seconds: float


# --- Training ------------------------------------------------------------------------------------


def _tune(
    model: Path,
    dtype: torch.dtype,
    depths: Sequence[int],
    settings: TuneSettings,
    text: Calibration,
    work: WorkDirectory,
) -> tuple[Path, Tuning]:
    """The checkpoint directory of the tuned model, in the work directory."""
    folder = work.folder / "tuned"
    result = work.result("tuned", Tuning)
    if result is not None:
        return folder, result
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = load_model(model).to(device)
    held_out = (text.held_out, text.held_out_starts, depths, "fp32")
    before = capture(loaded, *held_out).final
    tuner = Tuner(loaded, depths, settings, text.train.to(device), text.train_starts)
    tuner.train(work.folder)
    tuned = tuner.finish().eval()
    tuned.to(dtype)
    if folder.exists():
        shutil.rmtree(folder)
    tuned.save_pretrained(folder)
    for source in model.iterdir():  # the tokenizer, and whatever else stands beside the weights
        if source.is_file() and source.suffix != ".safetensors" and source.name not in SAVED:
            shutil.copy2(source, folder / source.name)
    after = capture(tuned.float(), *held_out).final
    same = Trainer(tuned, TrainSettings()).same_token(before.flatten(0, 1), after.flatten(0, 1))
    result = Tuning(agreement=same, loss=_thinned(tuner.losses), seconds=round(tuner.seconds, 1))
    work.save_result("tuned", result)
    return folder, result


def train_exits(
    model: Path,
    dtype: torch.dtype,
    config: EarlyExitConfig,
    text: Calibration,
    request: PrepareRequest,
    work: WorkDirectory,
) -> tuple[dict[str, Tensor], Sample, Sample, dict[str, Any]]:
    """Train the exits, or take them from the work directory.

    Returns:
        their tensors as in a checkpoint, what they say of the text to choose on and of the
        held-out text, and the losses.
    """
    tensors, judged = work.tensors("exits"), work.tensors("samples")
    losses: dict[str, Any] = {}
    if tensors is None or judged is None:
        depths = [point.depth for point in config.exits]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        working = torch.bfloat16 if request.train.precision == "bf16" else torch.float32
        loaded = load_model(model, working).to(device)
        torch.manual_seed(request.seed)
        exits = [
            Exit(
                point,
                config,
                int(loaded.config.hidden_size),
                new_block(loaded) if point.adapter == "block" else None,
            )
            for point in config.exits
        ]
        precision = request.train.precision
        held = _captured(
            "features-held-out",
            work,
            lambda: capture(loaded, text.held_out, text.held_out_starts, depths, precision),
        )
        whole = _captured(
            "features-train",
            work,
            lambda: capture(loaded, text.train, text.train_starts, depths, precision),
        )
        part = max(1, int(len(text.train) * CHOOSING_SHARE))
        train, choose = whole[part:], whole[:part]
        trainer = Trainer(loaded, request.train)
        for index, exit in enumerate(exits):
            curve = trainer.fit_adapter(exit, index, train)
            if exit.adapter is not None:
                losses[f"adapter {depths[index]}"] = _thinned(curve)
                exit.adapter.to(dtype).float()  # judged as it will be stored
        losses["gates"] = _thinned(trainer.fit_gates(exits, train, trainer.verdicts(exits, train)))
        judged = {}
        for name, features in (("choosing", choose), ("held_out", held)):
            for key, value in _judge(trainer, exits, features).items():
                judged[f"{name}.{key}"] = value
        tensors = _stored(exits, dtype)
        work.save_tensors("exits", tensors)
        work.save_tensors("samples", judged)
    samples = [
        Sample(judged[f"{name}.confidence"].numpy(), judged[f"{name}.agrees"].numpy())
        for name in ("choosing", "held_out")
    ]
    return tensors, samples[0], samples[1], losses


def _captured(stage: str, work: WorkDirectory, run: Callable[[], Features]) -> Features:
    kept = work.tensors(stage)
    if kept is not None:
        return Features(**kept)
    features = run()
    work.save_tensors(stage, vars(features))
    return features


def _judge(trainer: Trainer, exits: Sequence[Exit], features: Features) -> dict[str, Tensor]:
    """Confidence and agreement `[E, M, S]` of the exits on some text."""
    shape = features.exits.shape[:-1]
    verdicts = trainer.verdicts(exits, features)
    scores = [
        confidence(exit, states, features.starts, verdict)
        for exit, states, verdict in zip(exits, features.exits, verdicts, strict=True)
    ]
    agrees = torch.stack([verdict.agrees for verdict in verdicts])
    return {"confidence": torch.stack(scores).view(shape), "agrees": agrees.view(shape)}


def _thinned(losses: Sequence[float], points: int = 50) -> list[float]:
    return [round(loss, 5) for loss in losses[:: max(1, len(losses) // points)]]


def _stored(exits: Sequence[Exit], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors as in a checkpoint: gates in fp32, adapters in the base model's `dtype`."""
    return {
        f"model.exits.{index}.{name}": value.detach()
        .to("cpu", dtype if name.startswith("adapter") else torch.float32)
        .contiguous()
        for index, exit in enumerate(exits)
        for name, value in exit.state_dict().items()
    }


def _renumbered(tensors: dict[str, Tensor], chosen: Sequence[int]) -> dict[str, Tensor]:
    """The tensors of the chosen exits, numbered from 0."""
    return {
        f"model.exits.{new}.{name.split('.', 3)[3]}": value
        for new, old in enumerate(chosen)
        for name, value in tensors.items()
        if name.startswith(f"model.exits.{old}.")
    }


# --- Choosing ------------------------------------------------------------------------------------


def _choose(
    sample: Sample,
    savings: Sequence[float],
    machine: Machine,
    depths: Sequence[int],
    request: PrepareRequest,
) -> list[int]:
    """The exits, by index, that promise most speed, taken over all batch sizes."""
    best, best_score = [len(depths) - 1], -math.inf
    for count in range(1, len(depths) + 1):
        for subset in itertools.combinations(range(len(depths)), count):
            part = sample.only(subset)
            path = PricePath(part, [savings[i] for i in subset])
            thresholds = path.thresholds(path.last_price(1 - request.min_agreement))
            fires = part.fires(thresholds)
            config = request.config([depths[i] for i in subset], thresholds)
            score = sum(
                math.log(forecast(machine, config, subset, fires, batch).speed)
                for batch in request.batches
            )
            if score > best_score:
                best, best_score = list(subset), score
    return best


def _decide(
    promise: Promise | None,
    chosen: Sequence[int],
    held_out: Sample,
    machine: Machine,
    depths: Sequence[int],
    request: PrepareRequest,
) -> tuple[EarlyExitConfig, list[Forecast]]:
    """What to write, and the forecasts for the thresholds promised."""
    none = request.config((), ())
    if promise is None and not request.keep_exits:
        return none, []
    if promise is None:
        # Nobody leaves unless a request says at which confidence.
        return request.config([depths[i] for i in chosen], [NEVER] * len(chosen)), []
    config = request.config([depths[i] for i in chosen], promise.thresholds)
    fires = held_out.only(chosen).fires(promise.thresholds)
    forecasts = [forecast(machine, config, chosen, fires, batch) for batch in request.batches]
    if max(item.speed for item in forecasts) < WORTH_IT and not request.keep_exits:
        return none, forecasts
    return config, forecasts


def _frontier(
    path: PricePath,
    chosen: Sequence[int],
    held_out: Sample,
    machine: Machine,
    depths: Sequence[int],
    request: PrepareRequest,
) -> Iterator[Point]:
    """Agreement and forecast speeds along the path, on held-out text."""
    part = held_out.only(chosen)
    for price in PRICES[:: max(1, len(PRICES) // FRONTIER_POINTS)].tolist():
        thresholds = path.thresholds(price)
        fires = part.fires(thresholds)
        config = request.config([depths[i] for i in chosen], thresholds)
        yield Point(
            agreement=1 - float(part.wrong(fires).mean()),
            forecasts=[forecast(machine, config, chosen, fires, b) for b in request.batches],
        )


def exit_reports(
    config: EarlyExitConfig, chosen: Sequence[int], promise: Promise | None, held_out: Sample
) -> list[ExitReport]:
    """A line per exit that was trained."""
    thresholds = dict.fromkeys(range(len(config.exits)), NEVER)
    if promise is not None:
        thresholds.update(zip(chosen, promise.thresholds, strict=True))
    fires = held_out.fires([thresholds[i] for i in range(len(config.exits))])
    reports = []
    for index, point in enumerate(config.exits):
        leaves = fires == index
        right = held_out.agrees[index][leaves]
        reports.append(
            ExitReport(
                depth=point.depth,
                own_agreement=float(np.mean(held_out.agrees[index])),
                threshold=thresholds[index],
                leaves=float(np.mean(leaves)),
                right=float(np.mean(right)) if leaves.any() else None,
            )
        )
    return reports
