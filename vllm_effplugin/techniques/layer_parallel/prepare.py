"""`effplugin prepare layer-parallel`: text, search, repair, distillation, checkpoint.

Every stage leaves its result in a work directory, so that the same command continues where an
interrupted one stopped.
"""

from __future__ import annotations

import hashlib
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
    stock_architecture,
    write_checkpoint,
)
from vllm_effplugin.config.provenance import collect_provenance
from vllm_effplugin.errors import CheckpointError, ConfigError, UnsupportedError
from vllm_effplugin.techniques.layer_parallel import calibration
from vllm_effplugin.techniques.layer_parallel.calibration import Calibration, TextShape
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
from vllm_effplugin.techniques.layer_parallel.workdir import WorkDirectory

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
    num_layers = _check_model(model, request)
    efficiency = _explicit_groups(request, num_layers)
    out = out.absolute()
    work = WorkDirectory(
        work_dir or out.with_name(f".{out.name}.work"), _fingerprint(model, request)
    )

    text = work.load_text()
    if text is None:
        text = _find_text(model, request)
        work.save_text(text)

    result: SearchResult | None = None
    if efficiency is None:
        assert request.search is not None
        result = work.load_search()
        if result is None:
            result = _search(model, request.search, text.train[:SEARCH_SEQUENCES], use_ray)
            work.save_search(result)
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
        trained = work.load_repair()
        if trained is None:
            trained = _repair(original, layer_parallel, request.repair, text.train)
            work.save_repair(trained)
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


def load_model(model: Path, dtype: torch.dtype | str = torch.float32) -> Any:
    """The checkpoint as a Hugging Face model; `auto` keeps its own dtype."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval().requires_grad_(False)


def _check_model(model: Path, request: PrepareRequest) -> int:
    """Refuse what cannot be prepared; the number of layers otherwise."""
    config = read_model_config(model)
    stock_architecture(config)
    base_tensors(model)
    if config.get("efficiency") is not None:
        raise ConfigError(f"{model} is an efficient checkpoint already; prepare its base model")
    if config.get("quantization_config") is not None:
        raise UnsupportedError(f"{model} is quantised; prepare the unquantised model")
    limit = int(config.get("max_position_embeddings") or request.sequence_length)
    if request.sequence_length > limit:
        raise ConfigError(
            f"--sequence-length {request.sequence_length} exceeds the model's {limit}"
        )
    # Qwen2 carries a window that only counts with `use_sliding_window`.
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if window is not None and window < request.sequence_length:
        raise UnsupportedError(
            f"--sequence-length {request.sequence_length} exceeds the model's attention window "
            f"of {window}, which the reference does not model"
        )
    return int(config["num_hidden_layers"])


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


def _fingerprint(model: Path, request: PrepareRequest) -> dict[str, Any]:
    """What the work directory's content depends on: arguments, model and text."""
    files = [*sorted(model.glob("*.safetensors")), model / "config.json"]
    stats = {file.name: (file.stat().st_size, file.stat().st_mtime_ns) for file in files}
    text = request.text
    digest = None
    if text is not None and text.is_file():
        digest = hashlib.sha256(text.read_bytes()).hexdigest()
    return {
        "model": str(model.resolve()),
        "files": stats,
        "text": digest,
        "request": request.model_dump(mode="json"),
    }


def _find_text(model: Path, request: PrepareRequest) -> Calibration:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{model} has no usable tokenizer: {error}") from None
    shape = request.text_shape()
    if request.text is not None:
        return calibration.from_file(request.text, tokenizer, shape, request.seed)
    logger.warning(
        "generating %d tokens of text with the model",
        (shape.train + shape.held_out) * shape.sequence_length,
    )
    return calibration.generated(model, tokenizer, shape, request.seed)


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
