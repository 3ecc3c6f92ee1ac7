"""Work in a process of its own."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from vllm_effplugin import offline
from vllm_effplugin.errors import UnsupportedError
from vllm_effplugin.offline import run_with_engine


def describe(number: int) -> tuple[int, int, str]:
    return number + 1, os.getpid(), os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"]


def fail() -> None:
    raise KeyError("no such layer")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_runs_elsewhere_with_the_engine_in_that_process() -> None:
    number, process, in_process = run_with_engine(describe, 1)
    assert number == 2
    assert process != os.getpid()
    assert in_process == "0"


@pytest.mark.parametrize(("function", "message"), [(fail, "no such layer"), (die, "code -9")])
def test_failures_are_told(function: Any, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        run_with_engine(function)


def test_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="needs vLLM"):
        run_with_engine(describe, 1)
