"""Efficient checkpoints on disk: written whole or not at all, checked before they are served.

Layout of a checkpoint directory:

    config.json                      the base model's, plus `efficiency` and our architecture name
    model*.safetensors, tokenizer*   the base model's files, linked
    efficiency/tensors.safetensors   tensors of the techniques, if there are any
    efficiency/frontier.png          plots
    provenance.json                  how it was made and what was measured

The extra tensors live in a subfolder because loaders read every `*.safetensors` of the top level:
without the `efficiency` block the directory then still is the stock model.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_effplugin.config.efficiency import (
    CLASSIFIERS,
    EfficiencyConfig,
    efficient_architecture,
    parse_efficiency,
)
from vllm_effplugin.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

EXTRA_FOLDER = "efficiency"
EXTRA_FILE = "tensors.safetensors"
PROVENANCE = "provenance.json"


def read_model_config(checkpoint: Path) -> dict[str, Any]:
    """The directory's `config.json`.

    Raises:
        CheckpointError: when it is missing or not a JSON object.
    """
    path = checkpoint / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{checkpoint} is not a checkpoint directory: no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return config


def read_efficiency(checkpoint: Path) -> EfficiencyConfig:
    """The directory's validated `efficiency` block; an empty one where there is none."""
    config = read_model_config(checkpoint)
    efficiency = parse_efficiency(config.get("efficiency"))
    efficiency.validate_for(int(config["num_hidden_layers"]))
    efficiency.check_kind((config.get("architectures") or [""])[0])
    return efficiency


def stock_architecture(model_config: Mapping[str, Any]) -> str:
    """The base model's architecture name.

    Raises:
        ConfigError: when the family is not supported.
    """
    from vllm_effplugin.config.efficiency import ARCHITECTURES

    name = (model_config.get("architectures") or ["(none)"])[0]
    ours = efficient_architecture(name)
    return next(stock for stock, efficient in ARCHITECTURES.items() if efficient == ours)


def is_classifier(model_config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint has a classification head, by its architecture: ours or stock."""
    name = (model_config.get("architectures") or [""])[0]
    return name in CLASSIFIERS or name in CLASSIFIERS.values()


def stored_tensors(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors file, read from its header alone.

    Raises:
        CheckpointError: when the file is missing, truncated or damaged.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise CheckpointError(f"{path} is truncated: its header is cut off")
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError, struct.error) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from None
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if 8 + length + end != size:
        raise CheckpointError(
            f"{path} is truncated or damaged: {size} bytes, its header promises {8 + length + end}"
        )
    return {name: tuple(entry["shape"]) for name, entry in header.items()}


def base_tensors(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all top-level safetensors files of a checkpoint.

    Raises:
        CheckpointError: when there are none, or one is damaged.
    """
    files = sorted(checkpoint.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{checkpoint} holds no safetensors file")
    tensors: dict[str, tuple[int, ...]] = {}
    for file in files:
        tensors.update(stored_tensors(file))
    return tensors


def replaced_tensor_names(
    efficiency: EfficiencyConfig, num_layers: int, available: Mapping[str, Any]
) -> set[str]:
    """Names of base tensors that the extra file has to replace."""
    layer_parallel = efficiency.layer_parallel
    if layer_parallel is None or not layer_parallel.trained:
        return set()
    prefixes = tuple(
        f"model.layers.{layer}."
        for group in layer_parallel.resolve_groups(num_layers)
        for layer in group
    )
    return {name for name in available if name.startswith(prefixes)}


def added_tensors(
    efficiency: EfficiencyConfig,
    model_config: Mapping[str, Any],
    base: Mapping[str, tuple[int, ...]],
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of tensors of the extra file that the base model has none of.

    Args:
        base: names and shapes of the base model's tensors.
    """
    if efficiency.joint_exit is not None or efficiency.multiplex is not None:
        hidden_size = int(model_config["hidden_size"])
        found = {} if efficiency.multiplex is None else efficiency.multiplex.tensors(hidden_size)
        if efficiency.joint_exit is not None:
            classes = len(model_config.get("id2label") or (0, 1))
            found |= efficiency.joint_exit.tensors(hidden_size, classes)
        return found
    if efficiency.early_exit is None:
        return {}
    first = "model.layers.0."
    layer = {
        name.removeprefix(first): shape
        for name, shape in base.items()
        if name.startswith(first) and not name.endswith("rotary_emb.inv_freq")  # no parameter
    }
    return efficiency.early_exit.tensors(int(model_config["hidden_size"]), layer)


def extra_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Those of the techniques that a checkpoint has; none in a stock one."""
    path = checkpoint / EXTRA_FOLDER / EXTRA_FILE
    if not path.exists():
        return {}
    from safetensors.torch import load_file

    return load_file(path)


def check_checkpoint(checkpoint: Path) -> EfficiencyConfig:
    """Check everything about a checkpoint directory that can be known without loading it.

    Raises:
        ConfigError: an `efficiency` block that is invalid or does not fit the model.
        CheckpointError: extra tensors that are missing, surplus, misshapen or damaged, by name.
    """
    efficiency = read_efficiency(checkpoint)
    check_extra_tensors(checkpoint, efficiency)
    return efficiency


def check_extra_tensors(checkpoint: Path, efficiency: EfficiencyConfig) -> None:
    """Check that a directory holds the extra tensors that `efficiency` asks for, and no others.

    Raises:
        CheckpointError: naming what is missing, surplus, misshapen or damaged.
    """
    path = checkpoint / EXTRA_FOLDER / EXTRA_FILE
    config = read_model_config(checkpoint)
    base = base_tensors(checkpoint)
    replaced = replaced_tensor_names(efficiency, int(config["num_hidden_layers"]), base)
    expected = {name: base[name] for name in replaced} | added_tensors(efficiency, config, base)
    if not expected and not path.exists():
        return
    stored = stored_tensors(path)
    missing = sorted(expected.keys() - stored.keys())
    surplus = sorted(stored.keys() - expected.keys())
    misshapen = sorted(n for n in expected.keys() & stored.keys() if stored[n] != expected[n])
    for problem, names in (("lacks", missing), ("has surplus", surplus), ("misshapes", misshapen)):
        if names:
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")
            raise CheckpointError(f"{path} {problem} tensors: {shown}")


def require_output(out: Path, *, overwrite: bool) -> None:
    """Refuse early what `write_checkpoint` would refuse late.

    Raises:
        CheckpointError: when `out` is not empty, not a directory, or cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} exists and is not a directory")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise CheckpointError(f"{out} is not empty; give another directory or --overwrite")
    parent = next(folder for folder in (out, *out.resolve().parents) if folder.is_dir())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"{out} cannot be written: no permission in {parent}")


def write_checkpoint(
    base: Path,
    out: Path,
    efficiency: EfficiencyConfig,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    provenance: Mapping[str, Any],
    files: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
    copy: bool = False,
    passing: Path | None = None,
) -> None:
    """Write an efficient checkpoint beside its final place, check it, then move it there.

    Args:
        base: the base model's directory; its files are linked (hard links where the file system
            allows, else symbolic ones).
        out: the new directory.
        efficiency: the block to write.
        tensors: replacement tensors under their checkpoint names.
        provenance: what `provenance.json` says.
        files: further files of the `efficiency` folder, such as plots.
        overwrite: replace a non-empty `out`.
        copy: copy the base model's files instead.
        passing: a folder that will not last, from which nothing is linked symbolically.

    Raises:
        CheckpointError: when `out` must not or cannot be written.
    """
    config = read_model_config(base)
    config["architectures"] = [efficient_architecture(stock_architecture(config))]
    config["efficiency"] = efficiency.model_dump(mode="json", exclude_defaults=True)
    config["efficiency"].setdefault("version", efficiency.version)
    with staged_directory(out, overwrite=overwrite) as staging:
        for source in base.iterdir():
            if source.name not in ("config.json", PROVENANCE) and source.is_file():
                target = staging / source.name
                shutil.copy2(source, target) if copy else link(source, target, passing)
        (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (staging / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
        if tensors or files:
            (staging / EXTRA_FOLDER).mkdir()
        if tensors:
            from safetensors.torch import save_file

            save_file(dict(tensors), staging / EXTRA_FOLDER / EXTRA_FILE, {"format": "pt"})
        for name, content in (files or {}).items():
            (staging / EXTRA_FOLDER / name).write_bytes(content)
        check_checkpoint(staging)


@contextlib.contextmanager
def staged_directory(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """A new directory that takes the place of `out` when the block ends without an error.

    It lies beside `out`, so that it moves there in one step and an interruption leaves nothing
    half.

    Raises:
        CheckpointError: when `out` must not or cannot be written.
    """
    require_output(out, overwrite=overwrite)
    out = out.absolute()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error}") from None
    try:
        staging.chmod(0o755)
        yield staging
        if out.exists():
            shutil.rmtree(out)
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def link(source: Path, target: Path, passing: Path | None = None) -> None:
    """Make `target` the same file: a hard link where the file system allows, else a symbolic one.

    Args:
        passing: a folder that will not last. What lies in it is copied where it cannot be linked.
    """
    real = source.resolve()
    try:
        os.link(real, target)
    except OSError:
        if passing is not None and real.is_relative_to(passing.resolve()):
            shutil.copy2(real, target)
        else:
            target.symlink_to(real)
