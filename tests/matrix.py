"""The support matrix of README.md, from the tests themselves.

Tests say what they show: `@pytest.mark.works("early_exit", "preemption")`, or `refuses`. Names of
techniques and features mix; every technique named works with every feature and technique named.
What start-up refuses is read off the parameters of the tests that show it. `make matrix` writes the
table, and a test compares it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- matrix -->\n", "<!-- /matrix -->\n"

TECHNIQUES = {
    "layer_parallel": "layer parallelism",
    "joint_exit": "classifier's exits",
    "multiplex": "multiplexing",
    "early_exit": "early exit",
    "edge": "edge",
    "cloud": "cloud",
}
GENERATING = ("layer_parallel", "early_exit", "edge", "cloud")
FAMILIES = {
    "Llama": "",
    "Mistral": "",
    "Qwen2": "",
    "Qwen3": "",
    "Mamba2": "Mamba-2",
    "Bert": "BERT",
}
GROUPS = {
    "model": tuple(name or family for family, name in FAMILIES.items()),
    "together with": tuple(TECHNIQUES.values()),
    "runner": ("V1 on CPU", "V2 on CPU (Triton's interpreter)", "V2 on CUDA", "V1 on CUDA"),
    "parallelism": (
        "tensor parallelism",
        "data parallelism, several API servers",
        "pipeline parallelism",
        "context parallelism",
        "executor `ray`",
        "replicas on Ray Serve",
    ),
    "engine": (
        "compiled",
        "chunked prefill",
        "preemption",
        "prefix caching",
        "async scheduling",
        "speculation (ngram)",
        "speculation (verified exits)",
        "quantised weights",
        "LoRA at run time",
        "KV connectors",
        "prompt embeddings",
    ),
    "sampling": (
        "temperature, seeds, `n`",
        "penalties, biases, allowed tokens",
        "logprobs",
        "prompt logprobs",
        "structured output",
        "streaming",
    ),
}
FEATURES = [feature for features in GROUPS.values() for feature in features]

OPTIONS = {
    "pipeline_parallel_size": "pipeline parallelism",
    "decode_context_parallel_size": "context parallelism",
    "prefill_context_parallel_size": "context parallelism",
    "tensor_parallel_size": "tensor parallelism",
    "enable_lora": "LoRA at run time",
    "quantization": "quantised weights",
    "kv_transfer_config": "KV connectors",
    "enable_prompt_embeds": "prompt embeddings",
    "enable_prefix_caching": "prefix caching",
    "async_scheduling": "async scheduling",
}
"""What an engine option asks for; of several in one test, the first here is what is refused."""

Cell = tuple[str, str]
"""A technique and a feature."""


def cells(items: Iterable[pytest.Item]) -> dict[Cell, set[str]]:
    """`works`, `refused` or both, for every cell that a test says something about."""
    found: dict[Cell, set[str]] = {}
    for item in items:
        for outcome, named in _claims(item):
            techniques = [name for name in named if name in TECHNIQUES]
            features = [name for name in named if name not in TECHNIQUES]
            unknown = set(features) - set(FEATURES)
            assert techniques, f"{item.nodeid} names no technique"
            assert not unknown, f"{item.nodeid} names {unknown}"
            for technique in techniques:
                for feature in features:
                    found.setdefault((technique, feature), set()).add(outcome)
            # Where one of a pair is refused, so is a feature of the pair, but not the pair.
            if outcome == "works" or not features:
                for one, other in permutations(techniques, 2):
                    found.setdefault((one, TECHNIQUES[other]), set()).add(outcome)
    return found


def _claims(item: pytest.Item) -> Iterator[tuple[str, tuple[str, ...]]]:
    parameters: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
    family = parameters.get("family")
    for mark in item.iter_markers():
        if mark.name == "works":
            yield "works", (*mark.args, *((FAMILIES[family] or family,) if family else ()))
        elif mark.name == "refuses":
            extra = () if mark.args[-1:] and mark.args[-1] in FEATURES else _refused(parameters)
            named = (*mark.args, *(extra or ()))
            if len(named) > 1:
                yield "refused", named


def _refused(parameters: dict[str, Any]) -> tuple[str, ...] | None:
    """What the parameters of a test ask for that start-up refuses; None where it is no feature."""
    if "feature" in parameters:
        return parameters["technique"], parameters["feature"]
    options = parameters.get("options", {})
    named = tuple(dict.fromkeys(_sections(parameters.get("efficiency") or {})))
    for option, feature in OPTIONS.items():
        if option in options:
            return (*named, feature)
    speculative = options.get("speculative_config")
    if speculative is not None:
        verifies = speculative["method"] == "custom_class"
        return (*named, f"speculation ({'verified exits' if verifies else 'ngram'})")
    return named if len(named) > 1 else None


def _sections(efficiency: dict[str, Any]) -> Iterator[str]:
    split = efficiency.get("edge_cloud")
    if split is not None:
        yield split["role"]
        return
    yield from (name for name in efficiency if name in TECHNIQUES)


def table(found: dict[Cell, set[str]]) -> str:
    """As Markdown."""
    lines = [
        "| | " + " | ".join(TECHNIQUES.values()) + " |",
        "| --- |" + " --- |" * len(TECHNIQUES),
    ]
    for group, features in GROUPS.items():
        lines.append(f"| **{group}** |" + " |" * len(TECHNIQUES))
        for feature in features:
            row = [_shown(found, technique, feature) for technique in TECHNIQUES]
            lines.append(f"| {feature} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def _shown(found: dict[Cell, set[str]], technique: str, feature: str) -> str:
    if feature == TECHNIQUES[technique]:
        return ""
    if feature in GROUPS["sampling"] and technique not in GENERATING:
        return "does not apply"
    outcomes = found.get((technique, feature), set())
    if len(outcomes) == 2:
        return "yes, in part"
    return (
        {"works": "yes", "refused": "refused"}[next(iter(outcomes))] if outcomes else "not tested"
    )


def in_readme() -> str:
    """The table that README.md has."""
    return README.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]


def write(items: Iterable[pytest.Item]) -> None:
    """Put the table into README.md."""
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    README.write_text(before + BEGIN + table(cells(items)) + END + rest.split(END)[1], "utf-8")
