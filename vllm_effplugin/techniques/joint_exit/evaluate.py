"""`effplugin eval` of a classifier with exits: against labels, and against the full model.

Shapes: `N` sequences, `C` classes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from vllm import PoolingParams

from vllm_effplugin.config.checkpoint import PROVENANCE, read_model_config
from vllm_effplugin.config.efficiency import parse_efficiency
from vllm_effplugin.offline import run_with_engine
from vllm_effplugin.preparation.base import load_tokenizer
from vllm_effplugin.preparation.classifier import classes_of
from vllm_effplugin.preparation.labelled import (
    Columns,
    DataSettings,
    examples,
    read_rows,
    tokenized,
)
from vllm_effplugin.techniques.joint_exit.measure import open_classifier
from vllm_effplugin.techniques.joint_exit.request import exit_pooling_params
from vllm_effplugin.techniques.joint_exit.uncertainty import (
    calibration_difference,
    calibration_error,
    paired_difference,
    prediction_set,
)


def evaluate_classifier(checkpoint: Path, source: str, columns: Columns) -> dict[str, float]:
    """Classify labelled texts with a checkpoint, print the figures and return them.

    Args:
        checkpoint: of `prepare classify`, with exits or without, or a stock classifier.
        source: a .jsonl or .csv file, or `OWNER/NAME[/CONFIG]@SPLIT` of the hub.
        columns: names of its fields.

    Raises:
        ConfigError: data that cannot be read, or has other classes than the model.
        UnsupportedError: when vLLM is missing or cannot run the model.
    """
    config = read_model_config(checkpoint)
    settings = _prepared_with(checkpoint, source).model_copy(update={"columns": columns})
    rows = read_rows(source, "--data", settings)
    labelled = examples(rows, settings, classes_of(config), "--data")
    length = min(settings.max_length, config.get("max_position_embeddings") or settings.max_length)
    sequences = tokenized(load_tokenizer(checkpoint), labelled.texts, length)
    found = run_with_engine(measure, str(checkpoint), sequences, labelled.labels.tolist(), length)
    table = Table(box=SIMPLE_HEAD, title=f"{len(labelled)} texts")
    for name in ("figure", "value"):
        table.add_column(name)
    for name, value in found.items():
        table.add_row(name, f"{value:.4f}")
    Console().print(table)
    return found


def _prepared_with(checkpoint: Path, source: str) -> DataSettings:
    """How rows became texts when the checkpoint was prepared; the defaults if it was not."""
    path = checkpoint / PROVENANCE
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    settings = known.get("arguments", {}).get("data", {"train": source})
    return DataSettings.model_validate(settings)


def measure(
    model: str, sequences: list[list[int]], labels: list[int], max_length: int, **options: Any
) -> dict[str, float]:
    """What the table shows, by name.

    Args:
        sequences, labels: token ids, and the class of each.
        max_length: of a sequence.
        options: further ones of `vllm.LLM`.
    """
    llm = open_classifier(model, max_length, **options)
    prompts = [{"prompt_token_ids": ids} for ids in sequences]
    found = figures(llm, prompts, np.array(labels))  # and warm
    speeds = [
        (_speed(llm, prompts, full=False), _speed(llm, prompts, full=True))
        for _ in tqdm(range(3), desc="measuring", leave=False)
    ]
    found["requests_s"] = float(np.median([early for early, _ in speeds]))
    found["speed_ratio"] = float(np.median([early / full for early, full in speeds]))
    return found


def _params(*, full: bool, report: bool) -> PoolingParams:
    """Parameters with which nothing leaves or merges, or what the checkpoint says."""
    params = exit_pooling_params(exit=not full, exit_report=report)
    params.extra_kwargs = {**(params.extra_kwargs or {}), "mux": not full}
    return params


def _speed(llm: Any, texts: Sequence[Any], *, full: bool) -> float:
    start = time.perf_counter()
    params = _params(full=full, report=False)
    llm.classify(list(texts), pooling_params=params, use_tqdm=False)
    return len(texts) / (time.perf_counter() - start)


def classify(llm: Any, texts: Sequence[Any], *, full: bool) -> tuple[NDArray[Any], NDArray[Any]]:
    """`[N, C]` probabilities, and `[N]` how many layers gave them.

    Args:
        full: whether nothing may leave or merge.
    """
    params = _params(full=full, report=True)
    outputs = llm.encode(
        list(texts), pooling_task="classify", pooling_params=params, use_tqdm=False
    )
    rows = np.array([output.outputs.data.tolist() for output in outputs])
    return rows[:, :-2], rows[:, -2].round().astype(int)


def figures(llm: Any, texts: Sequence[Any], labels: NDArray[Any]) -> dict[str, float]:
    """Accuracy, calibration, depth and coverage of a running engine, with exits or without.

    `difference` is accuracy less the full model's, paired, with its standard error, and
    `ece_difference` the same of calibration error;
    `coverage_90` how often the prediction set for 0.9 holds the true class, `set_size_90` how many
    classes that has.
    """
    config = llm.llm_engine.model_config.hf_config
    efficiency = parse_efficiency(getattr(config, "efficiency", None))
    exits = efficiency.joint_exit
    if exits is None and efficiency.multiplex is None:
        outputs = llm.classify(list(texts), use_tqdm=False)
        p = full = np.array([output.outputs.probs for output in outputs])
        depths = np.full(len(p), config.num_hidden_layers)
    else:
        p, depths = classify(llm, texts, full=False)
        full, _ = classify(llm, texts, full=True)
    surer, surer_error = calibration_difference(p, full, labels)
    gained, gained_error = paired_difference(p.argmax(1) == labels, full.argmax(1) == labels)
    found = {
        "accuracy": float((p.argmax(1) == labels).mean()),
        "ece": calibration_error(p, labels),
        "ece_difference": surer,
        "ece_difference_se": surer_error,
        "mean_depth": float(depths.mean()),
        "difference": gained,
        "difference_se": gained_error,
    }
    places = [*exits.depths, config.num_hidden_layers] if exits is not None else []
    for level in exits.conformal if exits is not None else ():
        sets = [
            prediction_set(row.tolist(), level.thresholds[places.index(depth)])
            for row, depth in zip(p, depths, strict=True)
        ]
        covered = [label in each for label, each in zip(labels, sets, strict=True)]
        percent = f"{100 * level.coverage:g}"
        found[f"coverage_{percent}"] = float(np.mean(covered))
        found[f"set_size_{percent}"] = float(np.mean([len(each) for each in sets]))
    return found
