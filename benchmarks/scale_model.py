"""Where the techniques pay on machines that are not here: a small model of a step's time.

    python benchmarks/scale_model.py --json result.json --plot result.png

Nothing is measured: cost_model.py has the formulas and constants. The first table holds them to
what was measured and published (scale_checks.py): some figures gave a constant, which is named, all
others are predicted. The next tables tell how much faster models of 7, 33 and 70 billion parameters
get on A100 and H100, relative to stock vLLM on the same devices; x is where weights and cache have
no room. The last lines tell where each technique pays: where it is faster by more than the model's
median error on it. See docs/scale-model.md.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import cost_model as cost
from cost_model import Machine, Shape, Split
from harness import Metric, Row, describe_run, write_json
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from scale_checks import Check, checks, checks_table, errors, errors_table

from vllm_effplugin.preparation.tables import print_whole

MODELS, MACHINES = (cost.LLAMA_7B, cost.LLAMA_33B, cost.LLAMA_70B), (cost.A100, cost.H100)
RANKS, BATCHES = (1, 2, 4, 8), (1, 8, 32, 128, 256)
CONTEXT, TEXT, NEW = 512, 128, 64
"""Positions before a decoded token; tokens of a text; of a prompt and of an answer that an edge and
a cloud give together."""
LEAST_GAIN = 0.05
"""That counts as one, where the model's error is less."""

Seconds = Callable[[Machine, Shape, int, int], float]
"""For a machine, a model, a batch, and a number of ranks."""
Case = tuple[Machine, Shape, int, int]
Found = Mapping[Case, tuple[float, float] | None]
"""Seconds of stock vLLM and ours; None where weights and cache have no room."""

# --- Techniques as they would be used -------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    """A technique's table.

    Attributes:
        technique: whose error counts.
        room: positions of a request that the cache holds.
        alone: whether the baseline is one device, which has to hold everything.
        note: something else that its figures say.
    """

    name: str
    technique: str
    stock: Seconds
    ours: Seconds
    room: int = CONTEXT
    ranks: Sequence[int] = RANKS
    alone: bool = False
    note: Callable[[Found], str] = lambda found: ""

    def cases(self, machines: Iterable[Machine], batches: Iterable[int]) -> Found:
        """Of all models."""
        return {
            (machine, shape, batch, ranks): (
                (self.stock(machine, shape, batch, ranks), self.ours(machine, shape, batch, ranks))
                if cost.fits(machine, shape, batch * self.room, 1 if self.alone else ranks)
                else None
            )
            for shape, machine in itertools.product(MODELS, machines)
            for ranks, batch in itertools.product(self.ranks, batches)
        }


def decode_s(m: Machine, s: Shape, batch: int, ranks: int) -> float:
    return cost.stock_s(m, s, batch, CONTEXT, ranks)


def texts_s(m: Machine, s: Shape, batch: int, ranks: int) -> float:
    return cost.classify_s(m, s, batch, TEXT, ranks)


def grouped(how: Any, size: int | None = None) -> Seconds:
    """Groups of `size`, or of as many layers as there are ranks.

    As in the published choices, the first three eighths and the last two layers are in none.
    """

    def seconds(m: Machine, s: Shape, batch: int, ranks: int) -> float:
        members = size or ranks
        groups = (s.layers * 5 // 8 - 2) // members
        return cost.grouped_s(m, s, batch, CONTEXT, ranks, groups, members, how)

    return seconds


def free(m: Machine) -> Machine:
    """If exits cost the host nothing: inside a CUDA graph."""
    return replace(m, exit_s=0.0, fill_s=0.0)


def exit_s(m: Machine, s: Shape, batch: int, ranks: int, share: float) -> float:
    half = s.layers // 2
    return cost.early_exit_s(m, s, batch, CONTEXT, ranks, half, share, "propagate")


@cache
def server_s(m: Machine, s: Shape, batch: int, ranks: int) -> float:
    return cost.server_s(m, s, batch, Split(0, 0.0, 2 * batch, NEW, NEW), ranks)


@cache
def split_s(
    m: Machine, s: Shape, batch: int, ranks: int, asked: float = 0.5,
    link: tuple[float, float] = (0.040, 1e9),
) -> tuple[float, float]:  # fmt: skip
    """Of both together, and of the cloud's engine; the edge is the same machine."""
    half = Split(s.layers // 2, asked, 2 * batch, NEW, NEW, *link)
    return cost.split_s(m, m, s, batch, half, ranks)


def speeds(found: Found) -> dict[Case, float]:
    """Of ours against stock, where there is room."""
    return {case: pair[0] / pair[1] for case, pair in found.items() if pair}


def against_wide(found: Found) -> str:
    """The same groups, on the same ranks."""
    own = {case: grouped("wide")(*case) / pair[1] for case, pair in found.items() if pair}
    return (
        f"Faster than the same groups as wide layers in {sum(r > 1 for r in own.values())} of "
        f"{len(own)} cases, by a factor of {max(own.values()):.2f} at most."
    )


def against_tensor_parallelism(found: Found) -> str:
    """On as many devices."""
    own = [pair[1] / decode_s(*case) for case, pair in found.items() if pair]
    return (
        f"Stock tensor parallelism on the same devices is faster in {sum(r > 1 for r in own)} of "
        f"{len(own)} cases, by a factor of {min(own):.2f} to {max(own):.2f}."
    )


def before_the_host(found: Found) -> str:
    """Milliseconds that there are to lose."""
    parts = []
    for batch in (BATCHES[0], BATCHES[-1]):
        own = [case for case in speeds(found) if case[2] == batch]
        saved = [1e3 * (decode_s(*case) - exit_s(free(case[0]), *case[1:], 1.0)) for case in own]
        parts.append(f"{min(saved):.1f} to {max(saved):.1f} ms at batch {batch}")
    host = 1e3 * cost.H200.exit_s, 1e3 * (cost.H200.exit_s + cost.H200.fill_s)
    return (
        f"Exits save {' and '.join(parts)}, of which the host takes {host[0]:.1f} to {host[1]:.1f}."
    )


def least_share(found: Found) -> str:
    """That has to leave."""
    parts = []
    for batch in BATCHES[:-1]:
        case = (free(cost.H100), cost.LLAMA_7B, batch, 1)
        target = decode_s(*case) / (1 + LEAST_GAIN)
        enough = (f"{n} %" for n in range(1, 101) if exit_s(*case, n / 100) < target)
        parts.append(f"{next(enough, 'none')} at batch {batch}")
    return f"Share of the tokens that a gain of 5 % takes (7B, H100, TP 1): {', '.join(parts)}."


def other_links(found: Found) -> str:
    """What a better link or fewer questions would make of it."""

    def best(*, gratis: bool = False, **options: Any) -> str:
        own = (
            server_s(machine, *case)
            / split_s(free(machine) if gratis else machine, *case, **options)[0]
            for machine, *case in speeds(found)
        )
        return f"{max(own):.2f}"

    return (
        f"The best case would be {best(link=(0.0, math.inf))} if the link took no time, "
        f"{best(asked=0.1)} if a tenth of the tokens were asked, and {best(gratis=True)} (or "
        f"{best(asked=0.1, gratis=True)}) if exits cost the host nothing."
    )


SCENARIOS = (
    Scenario("pairs as wide layers", "layer parallelism", decode_s, grouped("wide", 2)),
    Scenario("one layer of a group on each rank", "layer parallelism", decode_s,
             grouped("members"), ranks=(2, 4), note=against_wide),
    Scenario("the same as published, against one device", "layer parallelism",
             lambda m, s, b, r: decode_s(m, s, b, 1), grouped("published"),
             ranks=(2, 4), alone=True, note=against_tensor_parallelism),
    Scenario("early exit, all tokens leave half-way", "early exit", decode_s,
             lambda m, s, b, r: exit_s(m, s, b, r, 1.0), note=before_the_host),
    Scenario("early exit, half of them, if exits cost the host nothing", "early exit", decode_s,
             lambda m, s, b, r: exit_s(free(m), s, b, r, 0.5), note=least_share),
    Scenario("classifier, 3/4 of the texts leave half-way", "classifier's exits", texts_s,
             lambda m, s, b, r: cost.classify_s(m, s, b, TEXT, r, s.layers // 2, 0.75), TEXT),
    Scenario("multiplexing, two texts in one from half-way", "multiplexing", texts_s,
             lambda m, s, b, r: cost.multiplexed_s(m, s, b, TEXT, r, s.layers // 2, min(2, b)),
             TEXT),
    Scenario("edge and cloud, half of the tokens asked: total", "edge and cloud",
             server_s, lambda *case: split_s(*case)[0], 2 * NEW,
             note=other_links),
    Scenario("edge and cloud, half of the tokens asked: cloud's engine", "edge and cloud",
             server_s, lambda *case: split_s(*case)[1], 2 * NEW),
)  # fmt: skip

# --- Output ---------------------------------------------------------------------------------------


def table_of(scenario: Scenario, found: Found, least: float) -> Table:
    """Speed against stock; green where it pays, red where stock is faster."""
    table = Table(title=scenario.name, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("TP\nbatch", no_wrap=True)
    for ranks, batch in itertools.product(scenario.ranks, BATCHES):
        top = ranks if batch == BATCHES[0] else ""
        table.add_column(f"{top}\n{batch}", justify="right", no_wrap=True)
    known = speeds(found)
    for shape, machine in itertools.product(MODELS, MACHINES):
        row = []
        for case in found:
            if case[:2] == (machine, shape):
                speed = known.get(case, math.nan)
                colour = "green" if speed > least else "red" if speed < 1 else "default"
                row.append(f"[{colour}]{speed:.2f}[/]" if case in known else "x")
        table.add_row(f"{shape.name} {machine.name}", *row)
    return table


def verdict(scenario: Scenario, found: Found, least: float) -> str:
    """Where it pays and where not, in words made of the figures."""
    known = speeds(found)

    def share(**where: Any) -> float:
        """Of the cases that pay; NaN where none has room."""
        axes = {"shape": 1, "batch": 2, "ranks": 3}
        own = [
            s > least for c, s in known.items() if all(c[axes[n]] == v for n, v in where.items())
        ]
        return sum(own) / len(own) if own else math.nan

    def named(case: Case) -> str:
        machine, shape, batch, ranks = case
        return f"{known[case]:.2f} ({shape.name}, {machine.name}, TP {ranks}, batch {batch})"

    def paying(ranks: int) -> str:
        """Batches at which most cases pay."""
        own = [n for n, batch in enumerate(BATCHES) if share(ranks=ranks, batch=batch) > 0.5]
        if not own:
            return f"TP {ranks} never"
        if len(own) > 1 and own[-1] - own[0] == len(own) - 1:
            return f"TP {ranks} at batch {BATCHES[own[0]]} to {BATCHES[own[-1]]}"
        return f"TP {ranks} at batch {', '.join(str(BATCHES[n]) for n in own)}"

    ends = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
    never = [f"batch {batch}" for batch in BATCHES if share(batch=batch) == 0]
    never += [f"TP {ranks}" for ranks in scenario.ranks if share(ranks=ranks) == 0]
    never += [shape.name for shape in MODELS if share(shape=shape) == 0]
    models = (f"{s.name} {share(shape=s):.0%}" for s in MODELS if share(shape=s) >= 0)
    sentences = [
        f"{scenario.name}: faster by more than {least - 1:.0%} in {share():.0%} of the cases "
        f"({', '.join(models)}), from {named(ends[0])} to {named(ends[1])}."
    ]
    if share():
        sentences.append(f"Most cases pay: {'; '.join(map(paying, scenario.ranks))}.")
        if never:
            sentences.append(f"None pays at {' or '.join(never)}.")
    return " ".join([*sentences, scenario.note(found)]).strip()


def draw(path: Path) -> None:
    """A panel per scenario on H100: speed over batch, a line per model and number of ranks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(13, 11), layout="constrained")
    FigureCanvasAgg(figure)
    batches = [2**n for n in range(9)]
    colours = dict(zip((shape.name for shape in MODELS), ("C0", "C1", "C3"), strict=True))
    styles = dict(zip(RANKS, ("-", "--", "-.", ":"), strict=True))
    for axes, scenario in zip(figure.subplots(3, 3).flat, SCENARIOS, strict=True):
        known = speeds(scenario.cases([cost.H100], batches))
        for shape, ranks in itertools.product(MODELS, scenario.ranks):
            line = [(case[2], s) for case, s in known.items() if case[1::2] == (shape, ranks)]
            if line:
                axes.plot(*zip(*line, strict=True), styles[ranks], color=colours[shape.name])
        axes.axhline(1.0, color="black", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.set_title(scenario.name, fontsize=10)
        axes.set(xlabel="batch", ylabel="speed / stock vLLM")
        axes.grid(alpha=0.3)
    handles = [Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
    handles += [
        Line2D([], [], color="grey", linestyle=style, label=f"TP {ranks}")
        for ranks, style in styles.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    figure.suptitle("Model of an H100: 1 is stock vLLM; lines end where memory does")
    figure.savefig(path, dpi=110)


def path_of(scenario: Scenario, case: Case) -> str:
    """Of a row."""
    machine, shape, batch, ranks = case
    return f"scale_model/{scenario.name}/{shape.name}/{machine.name}/tp{ranks}/b{batch}"


def rows_of(found: Sequence[Check], tables: Mapping[Scenario, Found]) -> Iterator[Row]:
    """As other benchmarks have them; of checks, `baseline` is what was measured."""
    for check in found:
        path = f"scale_model/checks/{check.technique}/{check.what}"
        for at, measured in check.measured.items():
            metric = Metric(str(at), lambda engine: 0.0, "higher")
            yield Row(path, metric, [measured], [check.predicted[at]])
    metric = Metric("ms", lambda engine: 0.0, "lower")
    for scenario, cases in tables.items():
        for case, pair in cases.items():
            if pair:
                yield Row(path_of(scenario, case), metric, [1e3 * pair[0]], [1e3 * pair[1]])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the speeds as PNG")
    arguments = parser.parse_args()
    console = Console()
    found = list(checks())
    off = errors(found)
    print_whole(console, checks_table(found))
    print_whole(console, errors_table(found))
    tables = {scenario: scenario.cases(MACHINES, BATCHES) for scenario in SCENARIOS}
    verdicts = []
    for scenario, cases in tables.items():
        least = 1 + max(LEAST_GAIN, statistics.median(off[scenario.technique]))
        print_whole(console, table_of(scenario, cases, least))
        verdicts.append(verdict(scenario, cases, least))
    print(*verdicts, sep="\n\n")
    if arguments.json is not None:
        meta = describe_run(argparse.Namespace(quick=False))
        meta["verdicts"] = verdicts
        meta["fitted"] = [
            [check.what, str(at), name] for check in found for at, name in check.fitted.items()
        ]
        meta["no_room"] = [
            path_of(scenario, case)
            for scenario, cases in tables.items()
            for case, pair in cases.items()
            if not pair
        ]
        write_json(arguments.json, meta, list(rows_of(found, tables)))
    if arguments.plot is not None:
        draw(arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
