"""A model's layers in two checkpoints.

Both keep the embedding and the head: the edge reads tokens and has to say something by itself, and
the cloud says what comes next; where the two are tied, the cloud has the one for the other.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vllm_effplugin.config import EfficiencyConfig
from vllm_effplugin.config.checkpoint import (
    EXTRA_FILE,
    EXTRA_FOLDER,
    PROVENANCE,
    base_tensors,
    extra_tensors,
    read_efficiency,
    read_model_config,
    stock_architecture,
    write_checkpoint,
)
from vllm_effplugin.errors import ConfigError
from vllm_effplugin.plan import build_plan

SHARD_BYTES = 4 << 30
_LAYER = re.compile(r"^(model\.layers\.)(\d+)(\..+)$")


def model_name(model: Path) -> str:
    """Names what a checkpoint computes: its weights, and groups of its layers."""
    digest = hashlib.sha256()
    extra = model / EXTRA_FOLDER / EXTRA_FILE
    for path in [*sorted(model.glob("*.safetensors")), *([extra] if extra.exists() else [])]:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    config = read_model_config(model)
    if config.get("efficiency") is not None:
        digest.update(json.dumps(config["efficiency"], sort_keys=True).encode())
    return f"{stock_architecture(config)}-{digest.hexdigest()[:24]}"


def check_partition(model: Path, partition: int) -> int:
    """Check that a model can be split behind so many layers; how many it has.

    Raises:
        ConfigError: naming what is wrong.
        CheckpointError: no model at `model`.
    """
    config = read_model_config(model)
    layers = int(config["num_hidden_layers"])
    if not 1 <= partition < layers:
        raise ConfigError(
            f"--partition {partition} is not inside the model, which has {layers} layers"
        )
    return layers


def write_layers(model: Path, out: Path, first: int, end: int) -> None:
    """Write layers `[first, end)` of a model as a stock checkpoint.

    Args:
        model: the whole model's directory.
        out: an existing, empty directory.
    """
    config = read_model_config(model)
    config["architectures"] = [stock_architecture(config)]
    config.pop("efficiency", None)
    config["num_hidden_layers"] = end - first
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][first:end]
    wanted = {name: new for name in base_tensors(model) if (new := _renamed(name, first, end))}
    index: dict[str, str] = {}
    shard: dict[str, Any] = {}
    size = shards = 0

    def close() -> None:
        nonlocal shard, size, shards
        shards += 1
        file = f"model-{shards:05d}.safetensors"
        save_file(shard, out / file, {"format": "pt"})
        index.update(dict.fromkeys(shard, file))
        shard, size = {}, 0

    total = 0
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if name not in wanted:
                    continue
                tensor = file.get_tensor(name)
                bytes_ = tensor.numel() * tensor.element_size()
                if shard and size + bytes_ > SHARD_BYTES:
                    close()
                shard[wanted[name]] = tensor
                size, total = size + bytes_, total + bytes_
    close()
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (out / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2) + "\n",
        encoding="utf-8",
    )
    for source in model.iterdir():
        skipped = source.name in ("config.json", PROVENANCE) or source.name.endswith(
            (".safetensors", ".safetensors.index.json")
        )
        if source.is_file() and not skipped:
            shutil.copy2(source, out / source.name)


def write_part(
    model: Path,
    out: Path,
    first: int,
    end: int,
    efficiency: EfficiencyConfig,
    *,
    work: Path,
    tensors: Mapping[str, Tensor] | None = None,
    **written: Any,
) -> None:
    """Write layers `[first, end)` of a model as an edge's or a cloud's checkpoint.

    Groups of layers that the model has, it has in its parts.

    Args:
        model: the whole model's directory.
        out: directory to write.
        efficiency: what else the part does.
        work: an existing directory on the same file system, for what is not yet whole.
        tensors: of that.
        **written: further arguments of `write_checkpoint`.

    Raises:
        ConfigError: a group that is cut in two.
    """
    whole = read_efficiency(model)
    layers = int(read_model_config(model)["num_hidden_layers"])
    replaced: dict[str, Tensor] = {}
    if whole.layer_parallel is not None:
        # A partition is a boundary, which may not lie inside a group.
        cuts = tuple(at - 1 for at in (first, end) if 0 < at < layers)
        build_plan(whole.model_copy(update={"split_after": cuts}), layers)
        groups = whole.layer_parallel.part(layers, first, end)
        efficiency = efficiency.model_copy(update={"layer_parallel": groups})
        renamed = ((_renamed(n, first, end), tensor) for n, tensor in extra_tensors(model).items())
        replaced = {name: tensor for name, tensor in renamed if name is not None}
    with TemporaryDirectory(prefix="stock-", dir=work) as folder:
        stock = Path(folder)
        write_layers(model, stock, first, end)
        replaced.update(tensors or {})
        write_checkpoint(stock, out, efficiency, passing=stock, tensors=replaced, **written)


def _renamed(name: str, first: int, end: int) -> str | None:
    """A tensor's name in the part with layers `[first, end)`; None where it is not in it."""
    found = _LAYER.match(name)
    if found is None:
        return name
    layer = int(found[2])
    return f"{found[1]}{layer - first}{found[3]}" if first <= layer < end else None
