"""What scale_model.py is held to: figures that were measured here or published, and the model's.

Those of the H200 and of the CPU are this repository's (README, the techniques' pages, and the stock
engines of the same runs); gpt-fast's are from its README, at github.com/pytorch-labs/gpt-fast.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import cost_model as cost
from cost_model import Machine, Shape, Split
from rich.box import SIMPLE_HEAD
from rich.table import Table


@dataclass(frozen=True)
class Check:
    """A row of the first table: figures by batch size, or whatever `...` in `what` stands for.

    Attributes:
        fitted: constants of the machine that figures gave.
        counted: whether the others count as predictions.
    """

    technique: str
    what: str
    measured: Mapping[Any, float]
    predicted: Mapping[Any, float]
    fitted: Mapping[Any, str] = field(default_factory=dict)
    counted: bool = True

    def error(self, at: Any) -> float:
        """Of the model, relative."""
        return self.predicted[at] / self.measured[at] - 1


def decode_ratio(
    machine: Machine, shape: Shape, ours: Callable[..., float], *options: Any, ranks: int = 1
) -> Callable[[Any], float]:
    """Speed against stock, by batch size; from 2,048 on, by prompt tokens in one step."""

    def speed(batch: int) -> float:
        prefill = batch >= 2048
        model, context = (replace(shape, head=0), 0) if prefill else (shape, 64)
        stock = cost.stock_s(machine, model, batch, context, ranks)
        return stock / ours(machine, model, batch, context, *options)

    return speed


def classified(
    machine: Machine, shape: Shape, texts: int, length: float, ours: Callable[..., float], *how: Any
) -> Callable[[Any], float]:
    """The same of texts classified at once, by depth."""
    stock = cost.classify_s(machine, shape, texts, length, 1)
    return lambda depth: stock / ours(machine, shape, texts, length, 1, depth, *how)


def divided(machine: Machine, shape: Shape, clients: int, split: Split) -> Callable[[Any], float]:
    """One server's time over that of edge and cloud, and over that of the cloud's engine."""
    one = cost.server_s(machine, shape, clients, split)
    both, cloud = cost.split_s(machine, machine, shape, clients, split)
    return lambda figure: one / (both if figure == "total" else cloud)


def checks() -> Iterator[Check]:
    """All rows; speeds relative to stock vLLM where no unit is named."""

    def row(
        technique: str, what: str, predict: Callable[[Any], float], measured: Mapping[Any, float],
        fitted: Mapping[Any, str] = {}, counted: bool = True,
    ) -> Check:  # fmt: skip
        predicted = {at: predict(at) for at in measured}
        return Check(technique, what, measured, predicted, fitted, counted)

    def tok_s(machine: Machine, shape: Shape) -> Callable[[int], float]:
        return lambda batch: batch / cost.stock_s(machine, shape, batch, 64)

    def gpt_fast(shape: Shape) -> Callable[[int], float]:
        return lambda ranks: 1 / cost.stock_s(cost.A100, shape, 1, 100, ranks)

    h200, cpu, small, large = cost.H200, cost.CPU, cost.SMOLLM2, cost.LLAMA_3B
    whole = Split(0, 0.0, requests=64, prompt=36, new=32)
    # fmt: off
    yield row("stock", "H200, 3.2B, decode, batch ..., tok/s", tok_s(h200, large),
              {1: 392, 8: 3087, 32: 11041}, {1: "kernel_s"})
    yield row("stock", "H200, 3.2B, ... prompts of 512 tokens, prompts/s",
              lambda n: n / cost.classify_s(h200, large, n, 512, 1), {16: 93297 / 512},
              {16: "flops"})
    yield row("stock", "H200, 3.2B, ... texts of 128 tokens, texts/s",
              lambda n: n / cost.classify_s(h200, large, n, 128, 1), {128: 709})
    yield row("stock", "A100, 7B (gpt-fast), batch 1, ... GPUs, tok/s", gpt_fast(cost.LLAMA_7B),
              {1: 104.9, 2: 168.84, 4: 254.02, 8: 328.43}, {1: "kernel_s", 8: "exchange_s"})
    yield row("stock", "A100, 70B (gpt-fast), batch 1, ... GPUs, tok/s", gpt_fast(cost.LLAMA_70B),
              {2: 21.32, 4: 38.01, 8: 62.50})
    yield row("stock", "CPU, SmolLM2, decode, batch ..., tok/s", tok_s(cpu, small),
              {1: 53.2, 8: 371, 32: 717}, {1: "kernel_s", 32: "flops"})
    yield row("stock", "CPU, Mamba-2 370M, decode, batch ..., tok/s", tok_s(cpu, cost.MAMBA_370M),
              {1: 26.2, 32: 185.8})
    yield row("stock", "CPU, Codestral's width, decode, batch ..., tok/s",
              tok_s(cpu, cost.CODESTRAL), {1: 7.03, 32: 61.7}, {1: "bytes_per_s"})
    yield row("stock", "CPU on another day, SmolLM2, decode, batch ..., tok/s",
              tok_s(cost.QUICK_CPU, small), {1: 1e3 / 10.5, 8: 8e3 / 14.8, 32: 32e3 / 28.1},
              {1: "FASTER"})
    yield row("stock", "CPU on another day, 75M, 2 ranks, decode, batch ..., tok/s",
              lambda b: b / cost.stock_s(cost.RANK, cost.LLAMA_75M, b, 64, 2),
              {1: 1e3 / 8.1, 8: 8e3 / 9.7, 32: 32e3 / 17.5}, {1: "exchange_s"})
    yield row("stock", "one core, 480M, 64 requests of ... clients, requests/s",
              lambda c: 64 / cost.server_s(cost.CORE, cost.LLAMA_480M, c, whole),
              {8: 64 / 31.46, 32: 64 / 23.22}, {8: "bytes_per_s", 32: "flops"})
    yield row("stock", "one core, SmolLM2, 64 requests of ... clients, requests/s",
              lambda c: 64 / cost.server_s(cost.CORE, small, c, whole),
              {8: 64 / 11.49, 32: 64 / 8.48})

    name = "layer parallelism"
    yield row(name, "H200, 3.2B, 13 pairs as wide layers, batch ... (8192: prefill)",
              decode_ratio(h200, large, cost.grouped_s, 1, 13, 2, "wide"),
              {1: 1.20, 8: 1.11, 32: 1.17, 8192: 1.09})
    yield row(name, "CPU, SmolLM2, 14 pairs on one rank, batch ... (2048: prefill)",
              decode_ratio(cpu, small, cost.grouped_s, 1, 14, 2, "members"),
              {1: 1.11, 8: 1.11, 32: 1.08, 2048: 0.99})
    yield row(name, "CPU, 75M, 11 pairs, a layer on each of 2 ranks, batch ... (2048: prefill)",
              decode_ratio(cost.RANK, cost.LLAMA_75M, cost.grouped_s, 2, 11, 2, "members", ranks=2),
              {1: 1.20, 8: 1.16, 32: 1.04, 2048: 1.05})
    for what, shape, size, groups, latency, counted in (
        ("7B, [12, 30) in pairs", cost.LLAMA_7B, 2, 9, 0.262, True),
        ("7B, [14, 30) in fours", cost.LLAMA_7B, 4, 4, 0.374, True),
        ("33B, layers unpublished, guess: [18, 58) in fours", cost.LLAMA_33B, 4, 10, 0.483, False),
    ):
        yield row(name, f"A100, published, {what}, batch ...",
                  decode_ratio(cost.A100, shape, cost.grouped_s, size, groups, size, "published"),
                  {1: 1 / (1 - latency)}, counted=counted)

    name = "early exit"
    for machine, shape, depth, share, policy, measured, fitted in (
        (h200, large, 14, 1, "propagate", {1: 0.63, 8: 0.54, 32: 0.45},
         {1: "exit_s", 32: "fill_s"}),
        (cpu, small, 10, 1, "propagate", {1: 1.83, 8: 1.84, 32: 1.88}, {1: "step_s"}),
        (cpu, small, 10, 1, "recompute", {1: 1.69, 8: 1.48, 32: 0.99}, {}),
        (cpu, small, 10, 0.5, "propagate", {1: 1.10, 8: 0.95, 32: 1.09}, {}),
        (cpu, small, 10, 0.5, "recompute", {1: 1.16, 8: 1.00, 32: 0.95}, {}),
        (cpu, cost.MAMBA_370M, 24, 1, "freeze", {1: 1.66, 32: 1.84}, {}),
        (cpu, cost.MAMBA_370M, 24, 1, "recompute", {1: 1.54, 32: 1.03}, {}),
        (cpu, cost.CODESTRAL, 8, 1, "freeze", {1: 1.84, 32: 1.92}, {}),
    ):
        what = f"{'all' if share == 1 else 'half'} leave at {depth} of {shape.layers}, `{policy}`"
        yield row(name, f"{machine.name}, {shape.name}, {what}, batch ...",
                  decode_ratio(machine, shape, cost.early_exit_s, 1, depth, share, policy),
                  measured, fitted)

    depths: dict[Any, float] = {14.5: 1.95, 15.2: 1.84, 16: 1.80, 13: 2.16, 11: 2.50}
    for machine, shape, length, speeds in (
        (h200, large, 128, {14: 1.75}), (cpu, small, 16, depths),
    ):
        yield row("classifier's exits", f"{machine.name}, {shape.name}, mean depth ...",
                  classified(machine, shape, 128, length, cost.classify_s, 1.0), speeds)
    for lengths, count, size, speeds in (
        ("64", 256, 2, {0: 1.98, 6: 1.63, 15: 1.28}),
        ("64", 256, 4, {0: 3.89, 6: 2.38, 15: 1.55}),
        ("256", 64, 2, {0: 2.01, 6: 1.63, 15: 1.30}),
        ("256", 64, 4, {0: 3.97, 6: 2.42, 15: 1.55}),
        ("32 to 256", 113, 2, {6: 1.59}), ("32 to 256", 113, 4, {6: 2.35}),
    ):
        yield row("multiplexing", f"CPU, SmolLM2, {lengths} tokens, {size} in one from layer ...",
                  classified(cpu, small, count, 256 * 64 / count, cost.multiplexed_s, size), speeds)
    for shape, partition, clients, asked, total, cloud in (
        (cost.LLAMA_480M, 8, 8, 0.50, 1.27, 0.85), (cost.LLAMA_480M, 8, 32, 0.52, 0.90, 0.61),
        (cost.LLAMA_480M, 8, 8, 0.27, 0.99, 0.62), (cost.LLAMA_480M, 8, 32, 0.26, 0.84, 0.54),
        (cost.LLAMA_480M, 8, 8, 0.11, 0.72, 0.40), (cost.LLAMA_480M, 8, 32, 0.10, 0.71, 0.41),
        (cost.LLAMA_480M, 8, 8, 0.00, 0.55, None), (cost.LLAMA_480M, 8, 32, 0.00, 0.53, None),
        (small, 15, 8, 0.73, 2.46, 1.30), (small, 15, 32, 0.74, 1.46, 0.85),
        (small, 25, 32, 0.66, 1.47, 0.48),
    ):
        split = replace(whole, partition=partition, asked=asked)
        what = f"two cores, {shape.name} behind {partition}, {asked:.2f} asked, {clients} clients"
        yield row("edge and cloud", f"{what}, ...", divided(cost.CORE, shape, clients, split),
                  {"total": 1 / total, **({"cloud": 1 / cloud} if cloud else {})})
    for asked, saved in ((0.50, 0.695), (0.28, 0.845)):
        split = Split(16, asked, requests=100, prompt=64, new=64)
        yield row("edge and cloud",
                  f"A100, published, guess: 7B, 64 + 64 tokens, {asked:.2f} asked, ...",
                  divided(cost.A100, cost.LLAMA_7B, 1, split), {"cloud": 1 / (1 - saved)},
                  counted=False)
    # fmt: on


def errors(found: Sequence[Check]) -> dict[str, list[float]]:
    """Absolute errors of the predictions, by technique."""
    by: dict[str, list[float]] = {}
    for check in found:
        own = by.setdefault(check.technique, [])
        if check.counted:
            own += [abs(check.error(at)) for at in check.measured if at not in check.fitted]
    return by


def digits(figure: float) -> str:
    """Three that count, or two behind the point."""
    return (
        f"{figure:.2f}" if figure < 10 else f"{figure:,.0f}" if figure >= 100 else f"{figure:.1f}"
    )


def errors_table(found: Sequence[Check]) -> Table:
    """How far off the predictions are."""
    table = Table("", "predictions", "median error", "largest", box=SIMPLE_HEAD)
    for technique, own in errors(found).items():
        row = (str(len(own)), f"{statistics.median(own):.1%}", f"{max(own):.1%}")
        table.add_row(technique, *row)
    return table


def checks_table(found: Sequence[Check]) -> Table:
    """Measured, predicted, and the error, or the constant that a figure gave."""
    table = Table("", "", "measured", "model", "error", box=SIMPLE_HEAD)
    for before, each in zip([None, *found], found, strict=False):
        marks = {at: each.fitted.get(at, f"{each.error(at):+.1%}") for at in each.measured}
        table.add_row(
            "" if before and before.technique == each.technique else each.technique,
            each.what.replace("...", "/".join(map(str, each.measured))),
            " ".join(map(digits, each.measured.values())),
            " ".join(map(digits, each.predicted.values())),
            " ".join(marks.values()) + ("" if each.counted else " (not counted)"),
        )
    return table
