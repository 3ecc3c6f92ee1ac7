"""vLLM for offline work, in a process of its own: what it holds is given back when it ends."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from vllm_effplugin.errors import UnsupportedError

T = TypeVar("T")

SMALL_MACHINE = 4
"""Cores up to which vLLM's habit of leaving one idle costs more than it gives."""

EXIT_SECONDS = 30
"""Time that the process gets to end by itself, once it has answered."""


def require_vllm() -> None:
    """Raise `UnsupportedError` without vLLM: before hours of work that end with it."""
    if importlib.util.find_spec("vllm") is None:
        raise UnsupportedError("this needs vLLM, which is not installed (extra `cpu` or `cuda`)")


def run_with_engine(function: Callable[..., T], *arguments: Any) -> T:
    """Call a module-level function that makes a `vllm.LLM`, in a fresh process.

    The engine core runs inside that process, and the process ends with this call, so that an
    interruption leaves nothing behind. Settings that the user made in the environment win over
    those made here.

    Raises:
        UnsupportedError: without vLLM, or when the function or its engine fails, with the reason.
    """
    require_vllm()
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        result, failure = receiver.recv()
        process.join(EXIT_SECONDS)
    except EOFError:
        process.join()
        raise UnsupportedError(
            f"the process that ran vLLM died with exit code {process.exitcode}; "
            "where its output says nothing, memory is the usual reason"
        ) from None
    finally:
        receiver.close()
        process.terminate()
        process.join()
    if failure is not None:
        raise UnsupportedError(f"vLLM failed: {failure}")
    return result


def _answer(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Send the result, or the failure as text: not every exception of vLLM survives pickling."""
    _set_environment()
    answer: tuple[Any, str | None]
    try:
        answer = function(*arguments), None
    except Exception as error:
        answer = None, f"{type(error).__name__}: {error}"
    sender.send(answer)


def _set_environment() -> None:
    defaults = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_KVCACHE_SPACE": "2",
    }
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if 0 < len(cores) <= SMALL_MACHINE:
        defaults["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
