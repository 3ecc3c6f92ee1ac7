"""The built wheel and source archive, installed beside an existing vLLM, are found by it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
from pathlib import Path

import pytest

from vllm_effplugin.config import ARCHITECTURES

ROOT = Path(__file__).resolve().parent.parent

# vLLM's loader, called as its processes call it, says which architectures it then knows.
PROBE = """
import json, sys
from importlib.metadata import entry_points
from vllm import ModelRegistry
from vllm.plugins import load_general_plugins

load_general_plugins()
[point] = [p for p in entry_points(group="vllm.general_plugins") if p.name == "effplugin"]
import vllm_effplugin
json.dump(
    {
        "module": vllm_effplugin.__file__,
        "distribution": str(point.dist.locate_file("")),
        "architectures": sorted(ModelRegistry.get_supported_archs()),
    },
    sys.stderr,
)
"""


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command that must succeed, away from the checkout."""
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive, of a copy: setuptools would pick up a stale `build` folder here."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("archive")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "vllm_effplugin", source / "vllm_effplugin")
    build = f"import setuptools.build_meta as b; b.build_sdist({str(out)!r})"
    run(sys.executable, "-c", build, cwd=source)
    [built] = out.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, of the source archive alone."""
    out = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation")
    run(*pip, "--wheel-dir", out, archive, cwd=out)
    [built] = out.iterdir()
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a new environment with the wheel, which sees this one's vLLM but no more.

    The `.pth` file adds our site-packages as a plain folder: the editable installation in it, a
    `.pth` file itself, stays without effect there.
    """
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index")
    run(*pip, wheel, cwd=folder)
    [site] = folder.glob("lib/python*/site-packages")
    (site / "vllm-from-outside.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_the_archive_is_complete_and_clean(archive: Path, wheel: Path) -> None:
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "vllm_effplugin/py.typed"} <= names
    kept = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("vllm_effplugin/**/*.py")}
    assert kept <= names
    assert not [name for name in names if "__pycache__" in name]
    assert wheel.name.split("-")[1] == archive.name.removesuffix(".tar.gz").split("-")[1]


def test_the_changelog_has_this_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    headings = re.findall(
        r"^## (\S+) \(\d{4}-\d\d-\d\d\)$", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
    assert headings[0] == project["version"]


def test_registers_itself(environment: Path) -> None:
    # Isolated (-I), so that neither the working directory nor PYTHONPATH offers the checkout.
    output = run(environment, "-I", "-c", PROBE, cwd=environment.parent).stderr
    found = json.loads(output[output.rindex('{"module"') :])
    home = environment.parent.parent
    assert Path(found["module"]).is_relative_to(home)
    assert Path(found["distribution"]).is_relative_to(home)
    assert set(ARCHITECTURES.values()) <= set(found["architectures"])


def test_doctor_finds_nothing_broken(environment: Path) -> None:
    command = (environment.parent / "effplugin", "doctor", "--json")
    report = json.loads(run(*command, cwd=environment.parent).stdout)
    assert [check for check in report["checks"] if not check["ok"]] == []
    assert report["platform"]["runner"] in ("V1", "V2")


def test_brings_its_types_and_no_tests(environment: Path) -> None:
    [site] = environment.parent.parent.glob("lib/python*/site-packages")
    assert (site / "vllm_effplugin" / "py.typed").is_file()
    assert not (site / "tests").exists()
