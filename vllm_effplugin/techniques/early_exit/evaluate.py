"""What exits cost and give, measured through vLLM: computation, speed, agreement, answers.

One engine serves all thresholds, because every request may bring its own. For each, the same
prompts are continued as they are served, in turn with the full model, for speed and computation;
and once in shadow mode, where every token that leaves also runs all layers, for the agreement.
"""

from __future__ import annotations

import itertools
import json
import operator
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from vllm_effplugin.config import EfficiencyConfig
from vllm_effplugin.errors import ConfigError
from vllm_effplugin.offline import run_with_engine
from vllm_effplugin.preparation.base import load_tokenizer, text_windows
from vllm_effplugin.preparation.plot import new_axes, to_png
from vllm_effplugin.techniques.early_exit.questions import accuracy, read_questions

ROUNDS = 3
"""Turns of each setting and the full model: their speeds are medians, because machines drift."""


class Setting(BaseModel):
    """What requests ask for: exits off, the checkpoint's thresholds, or one for all exits."""

    name: str
    extra_args: dict[str, Any]


class Shape(BaseModel):
    """How to measure.

    Attributes:
        thresholds: to sweep.
        prompts: most prompts.
        prompt_tokens: of a prompt that is taken from a text.
        new_tokens: that continue each prompt.
        batch: requests at a time.
        repetition_penalty: of what has been said, 1 for none.
    """

    thresholds: list[float]
    prompts: int
    prompt_tokens: int
    new_tokens: int
    batch: int
    repetition_penalty: float = 1.0


class Measured(BaseModel):
    """One setting.

    Attributes:
        name: of the setting.
        agreement: share of decoded tokens that are the full model's, given what came before.
        layer_tokens: layers run times tokens, relative to the full model; prompts included.
        mean_depth: layers per token.
        tokens_s: decoded tokens per second, prompts included in the time.
        relative: the same, relative to the full model in its turns.
        same_output: share of prompts whose whole continuation is the full model's.
        outputs: token ids.
    """

    name: str
    agreement: float
    layer_tokens: float
    mean_depth: float
    tokens_s: float
    relative: float
    same_output: float
    outputs: list[list[int]]


def settings(thresholds: Sequence[float]) -> list[Setting]:
    """Off, the checkpoint's own thresholds, and the given ones."""
    return [
        Setting(name="off", extra_args={"exit": False}),
        Setting(name="checkpoint", extra_args={}),
        *(Setting(name=f"{value:g}", extra_args={"exit_threshold": value}) for value in thresholds),
    ]


class Spent:
    """What the exits did in a while.

    Attributes:
        counts: by how much each counter grew.
        exits: tokens whose gate fired, at each exit.
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.exits: list[int] = []

    def agreement(self, tokens: int) -> float:
        """Share of `tokens` decoded in shadow mode that are the full model's."""
        return 1 - (self.counts["shadowed"] - self.counts["shadow_agreed"]) / tokens


@contextmanager
def counting(llm: Any, shadow: float = 0.0) -> Iterator[Spent]:
    """Count what an engine's exits do meanwhile.

    Args:
        llm: a `vllm.LLM` with exits.
        shadow: share of the tokens that leave that also run all layers.
    """
    llm.collective_rpc("set_exit_shadow", args=(shadow,))
    before = llm.collective_rpc("loop_counters")[0]
    spent = Spent()
    yield spent
    after = llm.collective_rpc("loop_counters")[0]
    llm.collective_rpc("set_exit_shadow", args=(0.0,))
    grown = {key: np.subtract(after[key], before[key]).tolist() for key in after}
    spent.exits = grown.pop("exits")
    spent.counts = grown


@dataclass(frozen=True)
class Prompts:
    """Prompts, and how an engine with exits goes on with them: greedily, past what would end it.

    Attributes:
        llm: a `vllm.LLM`.
        ids: of each prompt.
        new_tokens: that continue each.
        repetition_penalty: of what has been said, 1 for none.
    """

    llm: Any
    ids: Sequence[list[int]]
    new_tokens: int
    repetition_penalty: float = 1.0

    @property
    def tokens(self) -> int:
        """Tokens decoded in all."""
        return len(self.ids) * self.new_tokens

    def continued(self, setting: Setting) -> list[list[int]]:
        """Token ids behind each prompt."""
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=self.new_tokens,
            ignore_eos=True,
            detokenize=False,
            repetition_penalty=self.repetition_penalty,
            extra_args=setting.extra_args,
        )
        inputs = [{"prompt_token_ids": list(ids)} for ids in self.ids]
        outputs = self.llm.generate(inputs, sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def watched(self, setting: Setting) -> tuple[list[list[int]], Spent]:
        """The same in shadow mode, and what the exits did."""
        with counting(self.llm, shadow=1.0) as spent:
            outputs = self.continued(setting)
        return outputs, spent


def same_outputs(one: Sequence[list[int]], other: Sequence[list[int]]) -> float:
    """Share of prompts whose whole continuation is the same."""
    return sum(map(operator.eq, one, other)) / len(one)


def measure_settings(
    checkpoint: str,
    prompts: Sequence[list[int]],
    asked: Sequence[dict[str, Any]],
    max_tokens: int,
    batch: int,
    repetition_penalty: float = 1.0,
    **options: Any,
) -> list[dict[str, Any]]:
    """`Measured` as JSON for each `Setting`; runs in the engine's process.

    `options` are further arguments of `vllm.LLM`.
    """
    from tqdm.auto import tqdm
    from vllm import LLM

    longest = max(map(len, prompts)) + max_tokens
    llm = LLM(
        checkpoint,
        max_model_len=longest,
        max_num_seqs=batch,
        enable_prefix_caching=False,
        disable_log_stats=True,
        **options,
    )
    wanted = [Setting.model_validate(item) for item in asked]
    served = Prompts(llm, prompts, max_tokens, repetition_penalty)

    def timed(setting: Setting) -> tuple[list[list[int]], float]:
        start = time.perf_counter()
        return served.continued(setting), time.perf_counter() - start

    layers = llm.collective_rpc("exit_layers")[0]
    served.continued(wanted[0])  # not measured: the first run compiles and fills caches
    results: list[dict[str, Any]] = []
    full: list[list[int]] = []
    for setting in tqdm(wanted, desc="settings"):
        times: list[float] = []
        ratios: list[float] = []
        for _ in range(ROUNDS):
            with counting(llm) as spent:
                outputs, seconds = timed(setting)
            times.append(seconds)
            ratios.append(timed(wanted[0])[1] / seconds)
        full = full or outputs
        _, watched = served.watched(setting)
        share = spent.counts["layer_tokens"] / spent.counts["full_layer_tokens"]
        results.append(
            Measured(
                name=setting.name,
                agreement=watched.agreement(served.tokens),
                layer_tokens=share,
                mean_depth=layers * share,
                tokens_s=served.tokens / statistics.median(times),
                relative=statistics.median(ratios),
                same_output=same_outputs(full, outputs),
                outputs=outputs,
            ).model_dump()
        )
    return results


def describe(efficiency: EfficiencyConfig) -> str:
    """The exits in one line."""
    early_exit = efficiency.early_exit
    assert early_exit is not None
    points = ", ".join(f"{p.depth} ({p.gate}, {p.threshold:.3f})" for p in early_exit.exits)
    return f"exits at {points}; cache policy {early_exit.cache}"


def settings_table(rows: Sequence[Measured], scores: Sequence[float | None], title: str) -> Table:
    """One row per setting."""
    table = Table(title=title)
    names = ("threshold", "agreement", "same output", "layer-tokens", "mean depth", "tokens/s")
    for name in (*names, "relative", "accuracy"):
        table.add_column(name, justify="left" if name == "threshold" else "right")
    for row, score in zip(rows, scores, strict=True):
        table.add_row(
            row.name,
            f"{row.agreement:.4f}",
            f"{row.same_output:.3f}",
            f"{row.layer_tokens:.3f}",
            f"{row.mean_depth:.2f}",
            f"{row.tokens_s:.1f}",
            f"{row.relative:.3f}",
            "" if score is None else f"{score:.3f}",
        )
    return table


def frontier_plot(rows: Sequence[Measured], batch: int) -> bytes:
    """Tokens per second over agreement, a point per setting."""
    axes = new_axes("agreement with the full model", f"tokens/s, up to {batch} requests at a time")
    swept = sorted(rows[2:] or rows, key=lambda row: row.agreement)
    axes.plot(
        [row.agreement for row in swept], [row.tokens_s for row in swept], "o-", label="swept"
    )
    for row, marker in zip(rows[:2], ("s", "*"), strict=False):
        axes.plot(row.agreement, row.tokens_s, marker, ms=12, label=row.name)
    return to_png(axes)


def measure_exits(
    checkpoint: Path,
    efficiency: EfficiencyConfig,
    text: Path | None,
    questions: Path | None,
    shape: Shape,
    plot: Path | None,
) -> dict[str, Any]:
    """Computation, agreement and accuracy over a sweep of thresholds; shows a table.

    Raises:
        ConfigError: for a text, questions or thresholds that cannot be used.
        CheckpointError: for a checkpoint without a tokenizer.
        UnsupportedError: when vLLM cannot run it.
    """
    if (text is None) == (questions is None):
        raise ConfigError("a checkpoint with exits is measured on one of --text and --questions")
    swept = settings(shape.thresholds)
    tokenizer = load_tokenizer(checkpoint)
    asked = read_questions(questions)[: shape.prompts] if questions is not None else []
    if text is not None:
        windows = text_windows(checkpoint, text, shape.prompt_tokens + shape.new_tokens)
        # Spread over the whole text.
        chosen = windows[:: max(1, len(windows) // shape.prompts)][: shape.prompts]
        inputs = [window[: shape.prompt_tokens] for window in chosen]
    else:
        inputs = [tokenizer(question.prompt)["input_ids"] for question in asked]
    asked_for = [item.model_dump() for item in swept]
    arguments = (inputs, asked_for, shape.new_tokens, shape.batch, shape.repetition_penalty)
    rows = [
        Measured.model_validate(row)
        for row in run_with_engine(measure_settings, str(checkpoint), *arguments)
    ]
    scores = [
        accuracy(asked, replies(checkpoint, tokenizer, row.outputs)) if asked else None
        for row in rows
    ]
    title = f"{len(inputs)} prompts, {shape.new_tokens} tokens each; {describe(efficiency)}"
    Console().print(settings_table(rows, scores, title))
    if plot is not None:
        plot.write_bytes(frontier_plot(rows, shape.batch))
    return {
        "prompts": len(inputs),
        "new_tokens": shape.new_tokens,
        "batch": shape.batch,
        "repetition_penalty": shape.repetition_penalty,
        "settings": [
            {**row.model_dump(exclude={"outputs"}), "accuracy": score}
            for row, score in zip(rows, scores, strict=True)
        ],
    }


def replies(checkpoint: Path, tokenizer: Any, outputs: Sequence[list[int]]) -> list[str]:
    """Outputs as text, each up to the first token that ends a reply."""
    ends = _end_tokens(checkpoint, tokenizer)
    said = [list(itertools.takewhile(lambda token: token not in ends, ids)) for ids in outputs]
    return list(tokenizer.batch_decode(said))


def _end_tokens(checkpoint: Path, tokenizer: Any) -> set[int]:
    """Tokens that end a reply."""
    ends = {tokenizer.eos_token_id}
    path = checkpoint / "generation_config.json"
    if path.is_file():
        listed = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        ends.update(listed if isinstance(listed, list) else [listed])
    return {end for end in ends if end is not None}
