"""`effplugin prepare layer-parallel`: text, search, repair, distillation, checkpoint.

Every stage leaves its result in a work directory, so that the same command continues where an
interrupted one stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from torch import Tensor

from vllm_effplugin.config import EfficiencyConfig, parse_efficiency
from vllm_effplugin.config.checkpoint import (
    base_tensors,
    read_model_config,
    replaced_tensor_names,
    require_output,
    write_checkpoint,
)
from vllm_effplugin.config.provenance import collect_provenance
from vllm_effplugin.errors import CheckpointError, ConfigError
from vllm_effplugin.preparation.base import check_base, find_text, fingerprint, load_model
from vllm_effplugin.preparation.text import TextShape
from vllm_effplugin.preparation.workdir import WorkDirectory
from vllm_effplugin.techniques.layer_parallel.config import LayerParallelConfig
from vllm_effplugin.techniques.layer_parallel.distill import (
    Distiller,
    DistillSettings,
    apply_replacements,
    layer_tensors,
    with_own_layers,
)
from vllm_effplugin.techniques.layer_parallel.ray_search import open_evaluator
from vllm_effplugin.techniques.layer_parallel.repair import Repair, RepairSettings
from vllm_effplugin.techniques.layer_parallel.report import (
    Quality,
    QualityMeter,
    frontier_png,
    pairs_table,
    quality_table,
)
from vllm_effplugin.techniques.layer_parallel.search import (
    SearchResult,
    SearchSettings,
    group_sizes,
    search_partition,
)

logger = logging.getLogger(__name__)

SEARCH_SEQUENCES = 4
HELD_OUT_SEQUENCES = 16
LOSS_POINTS = 100
"""Most points of the loss curve that the provenance keeps."""


class PrepareRequest(BaseModel):
    """Everything that decides what comes out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    search: SearchSettings | None = Field(None, description="How to search the groups.")
    groups: tuple[tuple[int, ...], ...] | None = Field(None, description="Or the groups.")
    schedule: Literal["bypass", "fused"] = "bypass"
    bypass: int = Field(0, ge=0)
    repair: RepairSettings | None = Field(None, description="Least squares, before distillation.")
    distill: DistillSettings | None = None
    text: Path | None = Field(None, description="A file; else the model writes the text.")
    text_tokens: int = Field(131072, ge=1, description="Most tokens of training text.")
    sequence_length: int = Field(256, ge=2)
    seed: int = 0

    def text_shape(self) -> TextShape:
        """How much text the stages need."""
        distill = min(self.distill.tokens, self.text_tokens) if self.distill else 0
        repair = min(self.repair.tokens, self.text_tokens) if self.repair else 0
        return TextShape(
            sequence_length=self.sequence_length,
            train=max(SEARCH_SEQUENCES, -(-max(distill, repair) // self.sequence_length)),
            held_out=HELD_OUT_SEQUENCES,
            at_least=SEARCH_SEQUENCES,
        )


def prepare(
    model: Path,
    out: Path,
    request: PrepareRequest,
    *,
    work_dir: Path | None = None,
    use_ray: bool = True,
    overwrite: bool = False,
    console: Console | None = None,
) -> dict[str, Quality]:
    """Make a layer-parallel checkpoint.

    Args:
        model: the base model's checkpoint directory.
        out: directory to write.
        request: what to make.
        work_dir: for unfinished work; beside `out` by default, removed on success.
        use_ray: whether candidates of the search may be measured by Ray actors.
        overwrite: replace a non-empty `out`.
        console: where the tables go.

    Returns:
        quality on held-out text of `original`, `grouped` and, where asked for, `repaired` and
        `distilled`.

    Raises:
        ConfigError: settings or text that cannot work, or an unknown architecture.
        CheckpointError: no model at `model`, or an `out` or work directory that cannot be used.
        UnsupportedError: a model that the reference cannot run.
    """
    console = console or Console()
    require_output(out, overwrite=overwrite)
    num_layers = check_base(model, request.sequence_length)
    block = EfficiencyConfig(layer_parallel=LayerParallelConfig(groups=()))
    block.check_kind(read_model_config(model)["architectures"][0])
    efficiency = _explicit_groups(request, num_layers)
    out = out.absolute()
    work = WorkDirectory(
        work_dir or out.with_name(f".{out.name}.work"),
        fingerprint(model, request.text, request.model_dump(mode="json")),
    )

    text = find_text(model, request.text, request.text_shape(), request.seed, work)

    result: SearchResult | None = None
    if efficiency is None:
        assert request.search is not None
        result = work.result("search", SearchResult)
        if result is None:
            result = _search(model, request.search, text.train[:SEARCH_SEQUENCES], use_ray)
            work.save_result("search", result)
        console.print(pairs_table(result))
        efficiency = _efficiency(request, result.best.groups)

    layer_parallel = efficiency.layer_parallel
    assert layer_parallel is not None
    groups = layer_parallel.resolve_groups(num_layers)
    layers = [layer for group in groups for layer in group]
    original = load_model(model)
    meter = QualityMeter(original, text.held_out)
    quality = {
        "original": meter.original(),
        "grouped": meter.measure(original, layer_parallel, "grouped"),
    }
    trained: dict[str, Tensor] | None = None
    stored: dict[str, Tensor] | None = None

    def measure(stage: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Measure what will be written, rounded to the base's dtypes."""
        rounded = _as_stored(model, efficiency, num_layers, tensors)
        changed = with_own_layers(original, layers)
        apply_replacements(changed, rounded)
        quality[stage] = meter.measure(changed, layer_parallel, stage)
        return rounded

    if request.repair is not None:
        trained = work.tensors("repair")
        if trained is None:
            trained = _repair(original, layer_parallel, request.repair, text.train)
            work.save_tensors("repair", trained)
        stored = measure("repaired", trained)
    training: dict[str, Any] | None = None
    if request.distill is not None:
        trained, training = _distill(
            model, layer_parallel, request.distill, text.train, trained, work
        )
        stored = measure("distilled", trained)

    console.print(quality_table(quality))
    files = {"frontier.png": frontier_png(result, quality, num_layers)} if result else {}
    write_checkpoint(
        model,
        out,
        efficiency,
        tensors=stored,
        provenance={
            **collect_provenance(),
            "technique": "layer_parallel",
            "arguments": {"model": str(model), **request.model_dump(mode="json")},
            "seed": request.seed,
            "quality": {name: item.model_dump() for name, item in quality.items()},
            "search": result.model_dump(mode="json") if result else None,
            "distillation": training,
        },
        files=files,
        overwrite=overwrite,
    )
    work.remove()
    return quality


def _explicit_groups(request: PrepareRequest, num_layers: int) -> EfficiencyConfig | None:
    """The block for `groups`; None where they are to be searched. Refuses impossible wishes."""
    if request.groups is None:
        if request.search is None:
            raise ConfigError("give --target-depth, --max-kl or --groups")
        largest = group_sizes(request.search, num_layers)[0]
        _efficiency(request, [range(largest)])  # the schedule fits the groups to be found
        return None
    if request.search is not None:
        raise ConfigError("--groups excludes --target-depth and --max-kl")
    efficiency = _efficiency(request, request.groups)
    efficiency.validate_for(num_layers)
    return efficiency


def _efficiency(request: PrepareRequest, groups: Sequence[Sequence[int]]) -> EfficiencyConfig:
    return parse_efficiency(
        {
            "layer_parallel": {
                "groups": [list(group) for group in groups],
                "schedule": request.schedule,
                "bypass": request.bypass,
                "trained": request.repair is not None or request.distill is not None,
            }
        }
    )


def _search(model: Path, settings: SearchSettings, tokens: Tensor, use_ray: bool) -> SearchResult:
    with open_evaluator(
        model, load_model, tokens, settings.execution(), use_ray=use_ray
    ) as evaluator:
        return search_partition(evaluator, settings)


def _repair(
    original: Any, config: LayerParallelConfig, settings: RepairSettings, tokens: Tensor
) -> dict[str, Tensor]:
    """Refitted tensors of the grouped layers, fp32."""
    layers = [
        layer for group in config.resolve_groups(len(original.model.layers)) for layer in group
    ]
    grouped = with_own_layers(original, layers)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = tokens[: max(SEARCH_SEQUENCES, settings.tokens // tokens.shape[1])].to(device)
    Repair(original.to(device), grouped.to(device), config, tokens, settings).run()
    original.to("cpu")
    return {name: value.cpu() for name, value in layer_tensors(grouped, layers).items()}


def _distill(
    model: Path,
    config: LayerParallelConfig,
    settings: DistillSettings,
    tokens: Tensor,
    initial: Mapping[str, Tensor] | None,
    work: WorkDirectory,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Trained tensors, and what the provenance says about the training."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    original = load_model(model, "auto").to(device)
    distiller = Distiller(original, config, settings, tokens.to(device), initial)
    distiller.train(work.folder)
    stride = max(1, len(distiller.losses) // LOSS_POINTS)
    training = {
        "steps": distiller.step,
        "tokens": distiller.step * settings.batch * tokens.shape[1],
        "text_tokens": min(tokens.numel(), distiller.step * settings.batch * tokens.shape[1]),
        "seconds": round(distiller.seconds, 1),
        "loss": [round(loss, 5) for loss in distiller.losses[::stride]],
    }
    return distiller.replacement_tensors(), training


def _as_stored(
    model: Path, efficiency: EfficiencyConfig, num_layers: int, trained: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """All tensors of the grouped layers that the base has, in its dtypes.

    The file may hold some that the model does not, such as buffers of older versions.

    Raises:
        CheckpointError: when the base stores a trained tensor under no such name.
    """
    from safetensors import safe_open

    names = replaced_tensor_names(efficiency, num_layers, base_tensors(model))
    if unknown := sorted(trained.keys() - names):
        raise CheckpointError(f"{model} stores no tensor {unknown[0]}")
    tensors: dict[str, Tensor] = {}
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in names.intersection(file.keys()):
                stored = file.get_tensor(name)
                tensors[name] = trained.get(name, stored).to(stored.dtype).contiguous()
    return tensors
