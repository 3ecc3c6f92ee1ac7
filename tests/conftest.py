"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.update(VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1", RAY_USAGE_STATS_ENABLED="0")
# On a GPU Triton's attention kernels multiply fp32 in TF32, whose error is what tests look for.
os.environ["TRITON_F32_DEFAULT"] = "ieee"


def _take_a_core(worker: str) -> None:
    """Give a worker of pytest-xdist one core: two pools of threads on the same cores collapse.

    Before torch is imported, which counts the cores. What the worker starts inherits it.
    """
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
    os.environ["OMP_NUM_THREADS"] = "1"


if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    _take_a_core(os.environ["PYTEST_XDIST_WORKER"])

from tests import matrix  # noqa: E402
from tests.tiny import make_checkpoint, make_classifier  # noqa: E402


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real data sets; tests that need it are skipped without."""
    folder = os.environ.get("EFFPLUGIN_DATA")
    if not folder:
        pytest.skip("EFFPLUGIN_DATA is not set")
    return Path(folder)


def _once_per_family(folders: pytest.TempPathFactory, make: Callable[[Path, str], Path]):
    made: dict[str, Path] = {}

    def checkpoint(family: str = "Llama") -> Path:
        if family not in made:
            made[family] = make(folders.mktemp(family), family)
        return made[family]

    return checkpoint


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    """Makes, once per session, the tiny checkpoint of a family: `tiny("Qwen3")`."""
    return _once_per_family(tmp_path_factory, make_checkpoint)


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory):
    """The same for stock classifiers: `classifier("Bert")`."""
    return _once_per_family(tmp_path_factory, make_classifier)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-matrix", action="store_true", help="write README.md's support matrix")


def pytest_collection_finish(session: pytest.Session) -> None:
    # A module that cannot be imported would leave its cells empty.
    if session.config.getoption("--write-matrix") and not session.testsfailed:
        matrix.write(session.items)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes first: at the end it would keep one worker busy and the other idle."""
    items.sort(key=lambda item: item.path.name != "test_runner_v2.py")
