"""What exits cost and give, measured through vLLM: computation, speed, agreement, answers.

One engine serves all thresholds, because every request may bring its own. For each, the same
prompts are continued twice: once as they are served, for speed and computation, and once in shadow
mode, where every token that leaves also runs all layers, for the agreement.
"""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from rich.table import Table

from vllm_effplugin.config import EfficiencyConfig


class Setting(BaseModel):
    """What requests ask for: exits off, the checkpoint's thresholds, or one for all exits."""

    name: str
    extra_args: dict[str, Any]


class Measured(BaseModel):
    """One setting.

    Attributes:
        name: of the setting.
        agreement: share of decoded tokens that are the full model's, given what came before.
        layer_tokens: layers run times tokens, relative to the full model; prompts included.
        mean_depth: layers per token.
        tokens_s: decoded tokens per second, prompts included in the time.
        same_output: share of prompts whose whole continuation is the full model's.
        outputs: token ids.
    """

    name: str
    agreement: float
    layer_tokens: float
    mean_depth: float
    tokens_s: float
    same_output: float
    outputs: list[list[int]]


def settings(thresholds: Sequence[float]) -> list[Setting]:
    """Off, the checkpoint's own thresholds, and the given ones."""
    return [
        Setting(name="off", extra_args={"exit": False}),
        Setting(name="checkpoint", extra_args={}),
        *(Setting(name=f"{value:g}", extra_args={"exit_threshold": value}) for value in thresholds),
    ]


def measure_settings(
    checkpoint: str,
    prompts: Sequence[list[int]],
    asked: Sequence[dict[str, Any]],
    max_tokens: int,
    batch: int,
    **options: Any,
) -> list[dict[str, Any]]:
    """`Measured` as JSON for each `Setting`; runs in the engine's process.

    `options` are further arguments of `vllm.LLM`.
    """
    from tqdm.auto import tqdm
    from vllm import LLM, SamplingParams

    longest = max(map(len, prompts)) + max_tokens
    llm = LLM(
        checkpoint,
        max_model_len=longest,
        max_num_seqs=batch,
        enable_prefix_caching=False,
        disable_log_stats=True,
        **options,
    )
    inputs: Any = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    wanted = [Setting.model_validate(item) for item in asked]

    def run(setting: Setting, shadow: float) -> tuple[list[list[int]], float, dict[str, Any]]:
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            extra_args=setting.extra_args,
        )
        llm.collective_rpc("set_exit_shadow", args=(shadow,))
        [before] = llm.collective_rpc("exit_counters")
        start = time.perf_counter()
        outputs = llm.generate(inputs, sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        [after] = llm.collective_rpc("exit_counters")
        spent = {key: after[key] - before[key] for key in after if key != "exits"}
        return [list(output.outputs[0].token_ids) for output in outputs], seconds, spent

    [layers] = llm.collective_rpc("exit_layers")
    run(wanted[0], 0.0)  # not measured: the first run compiles and fills caches
    results: list[dict[str, Any]] = []
    full: list[list[int]] = []
    for setting in tqdm(wanted, desc="settings"):
        outputs, seconds, spent = run(setting, 0.0)
        full = full or outputs
        _, _, watched = run(setting, 1.0)
        wrong = watched["shadowed"] - watched["shadow_agreed"]
        same = sum(one == other for one, other in zip(full, outputs, strict=True))
        share = spent["layer_tokens"] / spent["full_layer_tokens"]
        results.append(
            Measured(
                name=setting.name,
                agreement=1 - wrong / (len(prompts) * max_tokens),
                layer_tokens=share,
                mean_depth=layers * share,
                tokens_s=len(prompts) * max_tokens / seconds,
                same_output=same / len(prompts),
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
            f"{row.tokens_s / rows[0].tokens_s:.3f}",
            "" if score is None else f"{score:.3f}",
        )
    return table


def frontier_plot(rows: Sequence[Measured], batch: int) -> bytes:
    """Tokens per second over agreement, a point per setting."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    swept = sorted(rows[2:] or rows, key=lambda row: row.agreement)
    axes.plot(
        [row.agreement for row in swept], [row.tokens_s for row in swept], "o-", label="swept"
    )
    for row, marker in zip(rows[:2], ("s", "*"), strict=False):
        axes.plot(row.agreement, row.tokens_s, marker, ms=12, label=row.name)
    axes.set(
        xlabel="agreement with the full model", ylabel=f"tokens/s, up to {batch} requests at a time"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
