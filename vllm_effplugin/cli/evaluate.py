"""`effplugin eval`: quality of a checkpoint against its base model, measured through vLLM."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vllm_effplugin.cli.options import parse_numbers
from vllm_effplugin.config.checkpoint import (
    check_checkpoint,
    is_classifier,
    read_model_config,
    stock_architecture,
)
from vllm_effplugin.errors import ConfigError, UnsupportedError

WINDOWS_PER_CALL = 32
"""Windows whose log probabilities exist as Python objects at a time."""


@dataclass(frozen=True)
class Scores:
    """One engine's view of the text: for each position but the first of each window."""

    log_probabilities: list[float]
    """Of the token that the text has there, natural logarithm."""
    predictions: list[int]
    """The most likely token there."""


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint directory to measure.")],
    text: Annotated[
        Path | None, typer.Option(help="Measure perplexity and agreement on this file.")
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(help="Base model; by default CHECKPOINT without its `efficiency` block."),
    ] = None,
    lm_eval: Annotated[
        str | None, typer.Option(help="Tasks for lm-eval, which runs after the rest.")
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens per window.", min=2)] = 512,
    max_tokens: Annotated[
        int | None, typer.Option(help="Measure on the first so many tokens of the text.", min=2)
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file.")
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option(help="With exits: jsonl with `question` and `answers`, or CoQA's json."),
    ] = None,
    thresholds: Annotated[
        str, typer.Option(help="With exits: thresholds to sweep.")
    ] = "0.5,0.7,0.8,0.9,0.95",
    prompts: Annotated[int, typer.Option(help="With exits: most prompts.", min=1)] = 64,
    prompt_tokens: Annotated[
        int, typer.Option(help="With exits: tokens of a prompt taken from --text.", min=1)
    ] = 32,
    new_tokens: Annotated[
        int, typer.Option(help="With exits: tokens that continue each prompt.", min=1)
    ] = 64,
    batch: Annotated[
        int, typer.Option(help="With exits: requests at a time, for speed.", min=1)
    ] = 8,
    repetition_penalty: Annotated[
        float, typer.Option(help="With exits: of what has been said; 1 for none.", min=0.01)
    ] = 1.0,
    plot: Annotated[
        Path | None, typer.Option(help="With exits: write the frontier to this PNG file.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Of a classifier: labelled texts, as in `prepare`."),
    ] = None,
    text_column: Annotated[str, typer.Option(help="Of --data.")] = "text",
    pair_column: Annotated[str, typer.Option(help="Of --data.")] = "text_pair",
    label_column: Annotated[str, typer.Option(help="Of --data.")] = "label",
) -> None:
    """Measure a checkpoint against its base model through vLLM.

    Perplexity and next-token agreement on a text, which is cut into contiguous windows; every
    position but the first of each counts. A checkpoint with exits continues prompts instead, from
    the text or from questions, under a sweep of thresholds: computation saved, agreement with the
    full model, and accuracy of the answers. A classifier with exits classifies labelled texts.
    """
    efficiency = check_checkpoint(checkpoint)
    if is_classifier(read_model_config(checkpoint)):
        if data is None:
            raise ConfigError(f"{checkpoint} is a classifier: give --data FILE")
        from vllm_effplugin.preparation.labelled import Columns
        from vllm_effplugin.techniques.joint_exit.evaluate import evaluate_classifier

        columns = Columns(text=text_column, text_pair=pair_column, label=label_column)
        found = evaluate_classifier(checkpoint, data, columns)
        if json_file is not None:
            json_file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        return
    if efficiency.early_exit is not None and efficiency.early_exit.exits:
        from vllm_effplugin.techniques.early_exit.evaluate import Shape, measure_exits

        shape = Shape(
            thresholds=parse_numbers("--thresholds", thresholds, float),
            prompts=prompts,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            batch=batch,
            repetition_penalty=repetition_penalty,
        )
        figures = measure_exits(checkpoint, efficiency, text, questions, shape, plot)
        if json_file is not None:
            json_file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        return
    if base is not None:
        read_model_config(base)
    if text is None and lm_eval is None:
        raise ConfigError("give --text FILE, --lm-eval TASKS or both")
    if lm_eval is not None and importlib.util.find_spec("lm_eval") is None:
        raise UnsupportedError("--lm-eval needs lm-eval: install the extra `bench`")
    if text is not None:
        figures = measure(checkpoint, text, base=base, context=context, max_tokens=max_tokens)
        Console().print(_table(figures))
        if json_file is not None:
            json_file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if lm_eval is not None:
        run_lm_eval(checkpoint, lm_eval)


def measure(
    checkpoint: Path,
    text: Path,
    *,
    base: Path | None = None,
    context: int = 512,
    max_tokens: int | None = None,
) -> dict[str, Any]:
    """Perplexity of a checkpoint and of its base, and their agreement.

    Each of the two engines runs in a process of its own, one after the other.

    Raises:
        ConfigError: for a text that cannot be read or is shorter than two tokens.
        CheckpointError: for a checkpoint without a tokenizer.
        UnsupportedError: when vLLM cannot run one of them.
    """
    from vllm_effplugin.offline import run_with_engine
    from vllm_effplugin.preparation.base import text_windows

    windows = text_windows(checkpoint, text, context, max_tokens)
    stock = {
        "architectures": [stock_architecture(read_model_config(base or checkpoint))],
        "efficiency": None,
    }
    console = Console(stderr=True)
    console.print(f"measuring the base model on {sum(map(len, windows))} tokens")
    reference = run_with_engine(_score, str(base or checkpoint), windows, stock)
    console.print("measuring the checkpoint")
    scores = run_with_engine(_score, str(checkpoint), windows, {})
    return summarise(reference, scores, context)


def summarise(reference: Scores, scores: Scores, context: int) -> dict[str, Any]:
    """The figures that `--json` writes."""
    pairs = list(zip(reference.predictions, scores.predictions, strict=True))
    before, after = _perplexity(reference), _perplexity(scores)
    return {
        "context": context,
        "positions": len(pairs),
        "base_perplexity": before,
        "perplexity": after,
        "perplexity_ratio": after / before,
        "agreement": sum(ours == theirs for ours, theirs in pairs) / len(pairs),
    }


def run_lm_eval(checkpoint: Path, tasks: str) -> None:
    """Run lm-eval on the checkpoint through vLLM; its output and exit code are passed on.

    Raises:
        UnsupportedError: when lm-eval fails.
    """
    command = [sys.executable, "-m", "lm_eval", "--model", "vllm"]
    command += ["--model_args", f"pretrained={checkpoint}", "--tasks", tasks]
    script = shutil.which("lm_eval", path=str(Path(sys.executable).parent))
    if script is not None:
        command[:3] = [script]
    code = subprocess.run(command, check=False).returncode
    if code:
        raise UnsupportedError(f"lm-eval ended with exit code {code}")


def _score(model: str, windows: Sequence[list[int]], overrides: Mapping[str, Any]) -> Scores:
    """Log probabilities and predictions of one model; runs in the engine's process."""
    from tqdm.auto import tqdm
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        hf_overrides=dict(overrides),
        max_model_len=max(map(len, windows)) + 1,
        max_num_seqs=WINDOWS_PER_CALL,
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1, detokenize=False)
    scores = Scores([], [])
    with tqdm(total=sum(map(len, windows)), desc="scoring", unit="tok", unit_scale=True) as bar:
        for start in range(0, len(windows), WINDOWS_PER_CALL):
            part = windows[start : start + WINDOWS_PER_CALL]
            prompts: Any = [{"prompt_token_ids": window} for window in part]
            for output in llm.generate(prompts, sampling, use_tqdm=False):
                _collect(output, scores)
            bar.update(sum(map(len, part)))
    return scores


def _collect(output: Any, scores: Scores) -> None:
    """Add a request's positions; vLLM lists the text's token and the most likely one for each."""
    tokens = output.prompt_token_ids
    for token, choices in zip(tokens[1:], output.prompt_logprobs[1:], strict=True):
        scores.log_probabilities.append(choices[token].logprob)
        scores.predictions.append(min(choices, key=lambda choice: choices[choice].rank))


def _perplexity(scores: Scores) -> float:
    return math.exp(-sum(scores.log_probabilities) / len(scores.log_probabilities))


def _table(figures: Mapping[str, Any]) -> Table:
    table = Table(title=f"{figures['positions']} positions, windows of {figures['context']}")
    for name in ("model", "perplexity", "ratio", "agreement"):
        table.add_column(name, justify="left" if name == "model" else "right")
    table.add_row("base", f"{figures['base_perplexity']:.3f}", "1.000", "1.000")
    table.add_row(
        "checkpoint",
        f"{figures['perplexity']:.3f}",
        f"{figures['perplexity_ratio']:.3f}",
        f"{figures['agreement']:.3f}",
    )
    return table
