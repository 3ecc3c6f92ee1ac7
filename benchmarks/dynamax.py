"""DYNAMAX's evaluation: what kinds of gates save and spoil in answering questions.

    python benchmarks/dynamax.py smollm2 --json result.json --plot result.png
    python benchmarks/dynamax.py mamba2 --json result.json --plot result.png

Each kind of gate gets its exits from `effplugin prepare early-exit`, trained alike. One engine per
kind answers TruthfulQA, TriviaQA (both from `EFFPLUGIN_DATA`) and conversations in CoQA's format
under a sweep of thresholds, in shadow mode, which tells for every token what the full model says
after the same words. Rows `layer N` let every token leave there, whatever its gate says. `mamba2`
is what `train_mamba.py` makes.

- `saved`: layers that decoded tokens did not run, of all they would have run.
- `consistent`: decoded tokens that are the full model's.
- `accuracy`: see `vllm_effplugin.techniques.early_exit.questions`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from checkpoints import build_smollm2
from early_exit import prepare
from harness import CACHE, describe_run
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from vllm_effplugin.config.checkpoint import check_checkpoint, read_model_config
from vllm_effplugin.offline import run_with_engine
from vllm_effplugin.preparation.base import load_tokenizer
from vllm_effplugin.preparation.tables import print_whole
from vllm_effplugin.techniques.early_exit.evaluate import Prompts, Setting, replies, same_outputs
from vllm_effplugin.techniques.early_exit.questions import Question, accuracy, read_questions

GATES = ("linear", "mlp", "mamba")
PUBLISHED = {"smollm2": "copy", "mamba2": "freeze"}
"""The paper's policies for what skipped layers owe the cache, by backbone."""
THRESHOLDS = (0.5, 0.7, 0.85, 0.95)
BATCH = 32
CONVERSATIONS = Path(__file__).with_name("conversations.json")
FULL = Setting(name="full model", extra_args={"exit": False})


@dataclass(frozen=True)
class Answers:
    """One setting on one data set.

    Attributes:
        gate, threshold: what let tokens leave; a fixed depth or nothing without a gate.
        questions: the data set.
        saved, consistent, accuracy: see the module.
        same_reply: share of replies that are the full model's, word for word.
        mean_depth: layers per decoded token.
    """

    gate: str
    threshold: str
    questions: str
    saved: float
    consistent: float
    accuracy: float
    same_reply: float
    mean_depth: float

    @property
    def setting(self) -> tuple[str, str]:
        """Its row of the table."""
        return self.gate, self.threshold


def prepared(model: Path, gate: str, cache: str) -> Path:
    """The checkpoint with trained exits; made unless it is there."""
    out = CACHE / "benchmarks" / f"{model.name}-dynamax-{gate}"
    options = ("--gate", gate, "--cache", cache, "--batches", "8", "--held-out-tokens", "16384")
    prepare(model, out, *options, "--keep-exits")
    return out


def settings(depths: Sequence[int], *, fixed: bool) -> list[Setting]:
    """The full model, thresholds, and on request the exits without gates."""
    swept = [
        Setting(name=f"{threshold:g}", extra_args={"exit_threshold": threshold})
        for threshold in THRESHOLDS
    ]
    everyone = [
        Setting(name=f"layer {depth}", extra_args={"exit_threshold": 0.0, "exit_min_layer": depth})
        for depth in depths
    ]
    return [FULL, *(everyone if fixed else ()), *swept]


def answer(
    checkpoint: str,
    efficiency: dict[str, Any],
    sets: dict[str, list[list[int]]],
    asked: list[dict[str, Any]],
    new_tokens: int,
    penalty: float,
) -> dict[str, list[dict[str, Any]]]:
    """For each data set and setting, outputs and what exits did; runs in the engine's process."""
    from tqdm.auto import tqdm
    from vllm import LLM

    longest = max(len(prompt) for prompts in sets.values() for prompt in prompts)
    llm = LLM(
        checkpoint,
        hf_overrides={"efficiency": efficiency},
        max_model_len=longest + new_tokens,
        max_num_seqs=BATCH,
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sets}
    with tqdm(total=len(sets) * len(asked), desc="answering") as bar:
        for name, ids in sets.items():
            prompts = Prompts(llm, ids, new_tokens, penalty)
            for item in asked:
                outputs, spent = prompts.watched(Setting.model_validate(item))
                consistent = spent.agreement(prompts.tokens)
                found[name].append(
                    {"outputs": outputs, "consistent": consistent, "exits": spent.exits}
                )
                bar.update()
    return found


def evaluate(
    checkpoint: Path,
    gate: str,
    cache: str,
    questions: dict[str, list[Question]],
    new_tokens: int,
    penalty: float,
    *,
    fixed: bool,
) -> list[Answers]:
    """All settings of one kind of gate."""
    config = check_checkpoint(checkpoint).model_dump(mode="json", exclude_none=True)
    config["early_exit"]["cache"] = cache
    depths = [point["depth"] for point in config["early_exit"]["exits"]]
    layers = int(read_model_config(checkpoint)["num_hidden_layers"])
    tokenizer = load_tokenizer(checkpoint)
    sets = {
        name: [tokenizer(question.prompt)["input_ids"] for question in asked]
        for name, asked in questions.items()
    }
    wanted = settings(depths, fixed=fixed)
    found = run_with_engine(
        answer,
        str(checkpoint),
        config,
        sets,
        [setting.model_dump() for setting in wanted],
        new_tokens,
        penalty,
    )
    rows = []
    for name, results in found.items():
        tokens = len(sets[name]) * new_tokens
        for setting, result in zip(wanted, results, strict=True):
            skipped = sum(
                count * (layers - depth)
                for count, depth in zip(result["exits"], depths, strict=True)
            )
            said = replies(checkpoint, tokenizer, result["outputs"])
            ungated = setting is FULL or "exit_min_layer" in setting.extra_args
            if setting is FULL and not fixed:
                continue  # the same in every engine
            rows.append(
                Answers(
                    gate=setting.name if ungated else gate,
                    threshold="" if ungated else setting.name,
                    questions=name,
                    saved=skipped / (tokens * layers),
                    consistent=result["consistent"],
                    accuracy=accuracy(questions[name], said),
                    same_reply=same_outputs(results[0]["outputs"], result["outputs"]),
                    mean_depth=layers - skipped / tokens,
                )
            )
    return rows


def as_table(rows: Sequence[Answers], names: Sequence[str]) -> Table:
    """A row per setting, three columns per data set."""
    table = Table(box=MARKDOWN)
    table.add_column("gate", no_wrap=True)
    table.add_column("threshold", justify="right")
    for name in names:
        for figure in (f"{name}: saved", "consistent", "accuracy"):
            table.add_column(figure, justify="right", no_wrap=True)
    by_setting = {(row.setting, row.questions): row for row in rows}
    for setting in dict.fromkeys(row.setting for row in rows):
        cells: list[str] = []
        for name in names:
            row = by_setting[setting, name]
            cells += [f"{row.saved:.3f}", f"{row.consistent:.3f}", f"{row.accuracy:.3f}"]
        table.add_row(*setting, *cells)
    return table


def draw(path: Path, rows: Sequence[Answers], names: Sequence[str], title: str) -> None:
    """Consistency (above) and accuracy (below) over computation saved, a column per data set."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(names), 7), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, len(names), squeeze=False, sharey="row")
    for (line, value), (column, name) in itertools.product(
        enumerate(("consistent", "accuracy")), enumerate(names)
    ):
        axes = grid[line][column]
        for gate in GATES:
            part = sorted(
                (row.saved, getattr(row, value))
                for row in rows
                if row.questions == name and row.gate in (gate, FULL.name)
            )
            axes.plot(*zip(*part, strict=True), "o-", ms=4, label=gate)
        ungated = [
            (row.saved, getattr(row, value))
            for row in rows
            if row.questions == name and row.gate not in (*GATES, FULL.name)
        ]
        axes.plot(*zip(*ungated, strict=True), "kx", label="everyone at one exit")
        axes.grid(alpha=0.3)
        axes.set(ylabel=value if column == 0 else None, title=name if line == 0 else None)
        axes.set_xlabel("layers saved" if line else None)
    grid[0][0].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def question_files() -> dict[str, Path]:
    """The data sets, by name."""
    data = os.environ.get("EFFPLUGIN_DATA")
    if data is None:
        sys.exit(
            "set EFFPLUGIN_DATA to the folder with truthfulqa/dev.jsonl and triviaqa/dev.jsonl"
        )
    folders = (("TruthfulQA", "truthfulqa"), ("TriviaQA", "triviaqa"))
    return {name: Path(data) / folder / "dev.jsonl" for name, folder in folders}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("backbone", choices=PUBLISHED)
    parser.add_argument("--model", type=Path, help="its checkpoint directory")
    parser.add_argument(
        "--coqa", type=Path, default=CONVERSATIONS, help="CoQA's json; else conversations of ours"
    )
    parser.add_argument("--cache", help="policy; by default the paper's: copy or freeze")
    parser.add_argument("--questions", type=int, default=200, help="most, of each data set")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--repetition-penalty", type=float, default=1.2)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.set_defaults(quick=False)
    arguments = parser.parse_args()
    model = arguments.model or CACHE / arguments.backbone
    if arguments.backbone == "smollm2":
        build_smollm2(model)
    elif not (model / "config.json").exists():
        sys.exit(f"{model} is not there: python benchmarks/train_mamba.py makes it")
    published = PUBLISHED[arguments.backbone]
    cache = arguments.cache or published
    coqa = "CoQA's format" if arguments.coqa == CONVERSATIONS else "CoQA"
    files = {**question_files(), coqa: arguments.coqa}
    questions = {name: read_questions(path)[: arguments.questions] for name, path in files.items()}
    meta = describe_run(arguments)
    rows: list[Answers] = []
    for gate in GATES:
        checkpoint = prepared(model, gate, published)
        rows += evaluate(
            checkpoint,
            gate,
            cache,
            questions,
            arguments.new_tokens,
            arguments.repetition_penalty,
            fixed=gate == GATES[0],
        )
    title = (
        f"{model.name}, {cache}, repetition penalty {arguments.repetition_penalty:g}, "
        f"{', '.join(f'{len(asked)} x {name}' for name, asked in questions.items())}"
    )
    print(title)
    print_whole(Console(), as_table(rows, list(questions)))
    if arguments.json is not None:
        content = {"meta": meta, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if arguments.plot is not None:
        draw(arguments.plot, rows, list(questions), title)


if __name__ == "__main__":
    main()
