"""One way to compare an engine with stock vLLM, for every technique.

A benchmark is a list of cases. A case has a candidate engine, usually a baseline (stock vLLM), and
metrics: functions from a running engine to one number. Both engines run the same code and differ
only in their `EngineSpec`. They are alive together and measured in turn, never at the same time:
each round measures every metric on both, A B in one round and B A in the next, so a drift of the
machine falls on both alike. What is reported is the median of the per-round ratios
(candidate / baseline) and their interquartile range.

A benchmark script defines its cases and ends with `sys.exit(main(parser.parse_args(), cases))`.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import platform
import random
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, Protocol

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parents[1]
CACHE = REPOSITORY / ".cache"
DTYPE = "bfloat16"
SEED = 0
"""Seeds the prompts and vLLM itself."""

START_LIMIT_S = 1800
MEASURE_LIMIT_S = 1800


# --- What is compared -----------------------------------------------------------------------------


@dataclass(frozen=True)
class EngineSpec:
    """What tells one engine from another.

    `model` is a checkpoint directory, `hf_overrides` changes its `config.json`, and `options` are
    further arguments of `vllm.LLM`, which win over the harness's own.
    """

    model: str
    tensor_parallel: int = 1
    hf_overrides: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


def efficient(stock: EngineSpec, family: str = "Llama", **sections: Any) -> EngineSpec:
    """`stock`, a model of a family, with sections of an `efficiency` block."""
    overrides = {
        "architectures": [f"Efficient{family}ForCausalLM"],
        "efficiency": {"version": 1, **sections},
    }
    return replace(stock, hf_overrides=overrides)


@dataclass(frozen=True)
class Metric:
    """A plainly named number, unit in the name. `measure` must be picklable (it is sent over).

    `once` is for what does not change from round to round, `alone` for what only the candidate has.
    """

    name: str
    measure: Callable[[Engine], float]
    better: Literal["lower", "higher"]
    once: bool = False
    alone: bool = False

    def turns(self, rounds: int, engines: int) -> int:
        """How often it is measured, warm-up included."""
        return (1 if self.once else rounds + 1) * (1 if self.alone else engines)


@dataclass(frozen=True)
class Case:
    """One comparison. `path` is its stable name; `quick` cases run under `--quick`."""

    path: str
    baseline: EngineSpec | None
    candidate: EngineSpec
    metrics: Sequence[Metric]
    quick: bool = False


@dataclass(frozen=True)
class Row:
    """All rounds of one metric in one case; `baseline` is None where there is nothing to compare.

    Values are in the metric's unit, one per round.
    """

    case: str
    metric: Metric
    baseline: Sequence[float] | None
    candidate: Sequence[float]

    @property
    def ratios(self) -> list[float]:
        """Candidate / baseline, round by round; empty without a baseline."""
        return [c / b for b, c in zip(self.baseline or (), self.candidate, strict=False)]

    @property
    def ratio(self) -> float | None:
        """Median of the per-round ratios: not the ratio of the medians, which would mix rounds."""
        return statistics.median(self.ratios) if self.baseline else None

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile of the ratios.

        Without a baseline: of the candidate's values over their median, so that a spread always is
        a fraction.
        """
        median = statistics.median(self.candidate) or 1.0
        return _quartiles(self.ratios or [value / median for value in self.candidate])

    def as_json(self) -> dict[str, Any]:
        """The row as written by `--json`."""
        low, high = self.quartiles
        return {
            "case": self.case,
            "metric": self.metric.name,
            "baseline": statistics.median(self.baseline) if self.baseline else None,
            "candidate": statistics.median(self.candidate),
            "ratio": self.ratio,
            "rounds": len(self.candidate),
            "spread": high - low,
        }


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def select(cases: Sequence[Case], globs: Sequence[str], *, quick: bool) -> list[Case]:
    """The cases to run, in their order.

    Args:
        cases: all of the benchmark's.
        globs: case paths as the user wrote them; they reach every case, quick or not.
        quick: without globs, only the quick cases.
    """
    if globs:
        return [c for c in cases if any(fnmatch.fnmatchcase(c.path, glob) for glob in globs)]
    return [case for case in cases if case.quick or not quick]


def self_checks(cases: Sequence[Case]) -> list[Case]:
    """For each distinct baseline, a case that compares it with a second engine of its own kind.

    Its ratio is 1 by construction; what it shows instead is the noise floor.
    """
    checks: list[Case] = []
    for case in cases:
        if case.baseline is not None and case.baseline not in [c.baseline for c in checks]:
            path = f"{case.path}/self_check"
            checks.append(replace(case, path=path, candidate=case.baseline))
    return checks


# --- Metrics --------------------------------------------------------------------------------------


class Step(NamedTuple):
    """An engine step seen from outside."""

    seconds: float
    """When its output arrived, counted from the first request."""
    emitted: int
    """How many requests got a token."""


@dataclass
class Engine:
    """What a metric sees: a `vllm.LLM`, and two helpers that need no tokenizer."""

    llm: Any
    vocab_size: int
    kept: dict[str, Any] = field(default_factory=dict)
    """What a metric leaves for another."""
    _requests: Iterator[int] = field(default_factory=itertools.count)

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """The same `count` distinct prompts of `length` random token ids, at every call."""
        rng = random.Random(SEED)
        return [[rng.randrange(self.vocab_size) for _ in range(length)] for _ in range(count)]

    def run(self, prompts: Sequence[list[int]], max_tokens: int) -> list[Step]:
        """Generate exactly `max_tokens` greedy tokens for every prompt, all submitted at once."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
        )
        engine = self.llm.llm_engine
        steps = []
        start = time.perf_counter()
        for prompt in prompts:
            engine.add_request(str(next(self._requests)), {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            steps.append(Step(time.perf_counter() - start, len(outputs)))
        return steps


@dataclass(frozen=True)
class DecodeTime:
    """Median milliseconds per decode step of a full batch: the time each request waits per token.

    Prefill does not count: a step counts when every request got a token in it and in the one
    before, so that all of them were decoding.
    """

    batch: int
    tokens: int

    def __call__(self, engine: Engine) -> float:
        steps = engine.run(engine.prompts(self.batch, length=8), self.tokens)
        decode = [
            step.seconds - before.seconds
            for before, step in itertools.pairwise(steps)
            if before.emitted == step.emitted == self.batch
        ]
        return 1e3 * statistics.median(decode)


@dataclass(frozen=True)
class PrefillThroughput:
    """Prompt tokens per second over `count` prompts of `length` tokens, until the last is done."""

    count: int
    length: int

    def __call__(self, engine: Engine) -> float:
        steps = engine.run(engine.prompts(self.count, self.length), max_tokens=1)
        return self.count * self.length / steps[-1].seconds


# The number of tokens holds each measurement near half a second on a small CPU: long enough for a
# median over dozens of steps, short enough that both engines of a round see the same machine.
SPEED_METRICS = (
    Metric("decode_ms_b1", DecodeTime(batch=1, tokens=48), better="lower"),
    Metric("decode_ms_b8", DecodeTime(batch=8, tokens=32), better="lower"),
    Metric("decode_ms_b32", DecodeTime(batch=32, tokens=24), better="lower"),
    Metric("prefill_tok_s", PrefillThroughput(count=4, length=512), better="higher"),
)


# --- Engines in processes of their own ------------------------------------------------------------


class EngineError(RuntimeError):
    """An engine that did not start, or failed while it was measured."""


class Measurable(Protocol):
    """An engine that can be asked for a metric."""

    def measure(self, measure: Callable[[Engine], float]) -> float:
        """Run `measure` on the engine and return its number."""
        ...


class EngineProcess:
    """An engine in a process of its own, running only while it starts and while it is measured.

    Its own process, because the settings of vLLM's CPU backend are environment variables, and
    because two engines then start at the same time.
    """

    def __init__(self, spec: EngineSpec, log: Path) -> None:
        self.spec = spec
        self.log = log
        self._ready = False
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_host, args=(spec, theirs, log))
        self._process.start()
        assert self._process.pid is not None
        self._group = self._process.pid
        theirs.close()  # so that a dead child reads as end of file

    def wait_ready(self) -> None:
        """Wait until the engine serves.

        Raises:
            EngineError: when it did not start.
        """
        self._receive(START_LIMIT_S)
        self._ready = True

    def measure(self, measure: Callable[[Engine], float]) -> float:
        """Run `measure` on the engine.

        Raises:
            EngineError: when it failed there.
        """
        self._pipe.send(measure)
        return self._receive(MEASURE_LIMIT_S)

    def begin_close(self) -> None:
        """Tell the engine to shut down, without waiting for it."""
        self._pipe.close()

    def close(self) -> None:
        """Shut the engine down, and kill what remains of it after a grace period."""
        self.begin_close()
        # While it still starts it does not listen, so there is nothing to wait for.
        self._process.join(timeout=30 if self._ready else 0)
        with suppress(ProcessLookupError):  # the usual end: nothing is left of the group
            os.killpg(self._group, signal.SIGKILL)
        self._process.join()

    def _receive(self, limit_s: float) -> float:
        try:
            if not self._pipe.poll(limit_s):
                raise EngineError(f"no answer from the engine within {limit_s} s; see {self.log}")
            answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise EngineError(f"the engine's process died; see {self.log}") from None
        if isinstance(answer, str):
            raise EngineError(f"{answer.strip()}\nThe engine's log: {self.log}")
        return answer


def _host(spec: EngineSpec, pipe: Connection, log: Path) -> None:
    """Body of an engine's process, which ends every process under it however it ends itself."""
    os.setpgid(0, 0)  # one group with vLLM's processes, and out of reach of the terminal's Ctrl-C
    with log.open("w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    try:
        _serve(spec, pipe)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os.killpg(0, signal.SIGKILL)


def _serve(spec: EngineSpec, pipe: Connection) -> None:
    """Start an engine and answer each metric with its number, or with a traceback as a string.

    The pipe's end is the order to stop, and comes with the death of the parent, too.
    """
    try:
        engine = _start_engine(spec)
    except Exception:
        pipe.send(traceback.format_exc(limit=-3))
        return
    _signal_descendants(signal.SIGSTOP)
    pipe.send(0.0)
    with suppress(EOFError):
        while True:
            measure = pipe.recv()
            _signal_descendants(signal.SIGCONT)
            answer: float | str
            try:
                answer = float(measure(engine))
            except Exception:
                answer = traceback.format_exc(limit=-3)
            # vLLM's workers spin on shared memory for a second after their last step. Stopped, an
            # idle engine takes nothing from the cores on which the other is being measured.
            _signal_descendants(signal.SIGSTOP)
            pipe.send(answer)
    _signal_descendants(signal.SIGCONT)
    engine.llm.llm_engine.engine_core.shutdown()


CUDA_ENVIRONMENT = {
    # The look at CUDA before the engine starts: after it no forked process can use it.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
CPU_ENVIRONMENT = {
    # On CPU vLLM 0.32 writes ahead-of-time artifacts that it cannot load again; without them a
    # second run finds the compiled kernels and starts in half the time.
    "VLLM_USE_AOT_COMPILE": "0",
    # The engine core in this process. In one of its own it competes with the worker's spinning
    # threads for the cores of a small machine, gets one at the scheduler's next tick, and steps
    # take 16, 20 or 24 ms whatever they compute.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Weights in huge pages. In small ones their speed depends on where each process happened to
    # get its memory: the same engine against itself then gave ratios up to 1.13.
    "THP_MEM_ALLOC_ENABLE": "1",
}


def _start_engine(spec: EngineSpec) -> Engine:
    import torch

    cuda = torch.cuda.is_available()
    if cuda:
        environment = CUDA_ENVIRONMENT
    else:
        os.environ.update(cpu_environment(spec.tensor_parallel, os.sched_getaffinity(0)))
        environment = CPU_ENVIRONMENT
        if "kv_cache_memory_bytes" in spec.options:  # on CPUs the variable wins
            space = spec.options["kv_cache_memory_bytes"] // 2**30
            os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(space)
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    # Two engines share a GPU's memory. They start together, so neither may measure what is free.
    memory = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 2 * 2**30} if cuda else {}

    from vllm import LLM

    arguments = {
        "dtype": DTYPE,
        "seed": SEED,
        "max_model_len": 1024,
        "enable_prefix_caching": False,  # every round sends the same prompts
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        **memory,
        **spec.options,
    }
    llm = LLM(
        spec.model,
        tensor_parallel_size=spec.tensor_parallel,
        hf_overrides=dict(spec.hf_overrides),
        **arguments,
    )
    gc.collect()
    gc.freeze()  # a full collection of the imported modules takes as long as several decode steps
    return Engine(llm, vocab_size=llm.model_config.get_vocab_size())


def cpu_environment(tensor_parallel: int, cores: Iterable[int]) -> dict[str, str]:
    """Settings of vLLM's CPU backend: all cores, evenly over the ranks, and a small KV cache.

    vLLM's own choice would leave one core idle, which here is half of a small machine.

    Args:
        tensor_parallel: number of ranks.
        cores: indices of the usable cores.

    Raises:
        EngineError: with fewer cores than ranks.
    """
    ordered = sorted(cores)
    share = len(ordered) // tensor_parallel
    if share == 0:
        raise EngineError(f"{tensor_parallel} ranks need as many cores; {len(ordered)} are usable")
    ranks = [ordered[rank * share : (rank + 1) * share] for rank in range(tensor_parallel)]
    return {
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(",".join(map(str, rank)) for rank in ranks),
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    }


def _signal_descendants(number: signal.Signals) -> None:
    import psutil  # a dependency of vLLM, so present wherever an engine runs

    for process in psutil.Process().children(recursive=True):
        process.send_signal(number)


# --- Running --------------------------------------------------------------------------------------


def interleave(
    engines: Sequence[Measurable],
    metrics: Sequence[Metric],
    rounds: int,
    measured: Callable[[], None] = lambda: None,
) -> list[dict[str, list[float]]]:
    """Measure all metrics on all engines in turn, after one warm-up of each that is thrown away.

    Args:
        engines: one or two, the candidate last.
        metrics: in the order to measure.
        rounds: repetitions; the order of the engines alternates between them.
        measured: called after every measurement, warm-up included.

    Returns:
        For each engine, one value per round under each metric's name.
    """
    values: list[dict[str, list[float]]] = [{m.name: [] for m in metrics} for _ in engines]
    for round_ in range(-1, rounds):
        order = range(len(engines)) if round_ % 2 == 0 else reversed(range(len(engines)))
        for metric, index in itertools.product(metrics, list(order)):
            if (metric.once and round_ != 0) or (metric.alone and index != len(engines) - 1):
                continue
            value = engines[index].measure(metric.measure)
            if round_ >= 0:
                values[index][metric.name].append(value)
            measured()
    return values


class Engines:
    """The engines that are alive: one per role. A case keeps those it shares with the last."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._alive: dict[str, EngineProcess] = {}

    def provide(self, case: Case) -> list[EngineProcess]:
        """The case's engines, ready: baseline, if it has one, then candidate.

        Raises:
            EngineError: when one did not start.
        """
        wanted = {"baseline": case.baseline, "candidate": case.candidate}
        self.close(role for role, engine in self._alive.items() if engine.spec != wanted[role])
        started = []
        for role, spec in wanted.items():
            if spec is not None and role not in self._alive:
                log = self._logs / f"{case.path.replace('/', '-')}.{role}.log"
                log.parent.mkdir(parents=True, exist_ok=True)
                self._alive[role] = EngineProcess(spec, log)
                started.append(self._alive[role])
        for engine in started:  # together: start-up is mostly single-threaded compilation
            engine.wait_ready()
        return [self._alive[role] for role, spec in wanted.items() if spec is not None]

    def close(self, roles: Iterable[str] | None = None) -> None:
        """Shut down the engines in `roles`, or all of them, together: each takes seconds."""
        closing = [self._alive.pop(role) for role in list(self._alive if roles is None else roles)]
        for engine in closing:
            engine.begin_close()
        for engine in closing:
            engine.close()


def run(
    cases: Sequence[Case],
    rounds: int,
    logs: Path,
    console: Console,
    measured: Callable[[Sequence[Row]], None] = lambda rows: None,
) -> tuple[list[Row], list[str]]:
    """Run the cases one after another.

    A case whose engine fails is reported and left out; the others still run.

    Args:
        cases: to run.
        rounds: per case.
        logs: folder for the engines' output.
        console: for progress and errors.
        measured: called after every case with all rows so far.

    Returns:
        The rows, and the paths of the cases that failed.
    """
    rows: list[Row] = []
    failed: list[str] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    engines = Engines(logs)
    # Two refreshes a second: the bar shares its cores with the engine under measurement.
    with Progress(*columns, TimeElapsedColumn(), console=console, refresh_per_second=2) as progress:
        try:
            for case in cases:
                task = progress.add_task(f"{case.path}: starting", total=None)
                try:
                    alive = engines.provide(case)
                    progress.update(
                        task,
                        description=case.path,
                        total=sum(metric.turns(rounds, len(alive)) for metric in case.metrics),
                    )
                    values = interleave(
                        alive, case.metrics, rounds, partial(progress.advance, task)
                    )
                except EngineError as error:
                    failed.append(case.path)
                    engines.close()
                    progress.update(task, description=f"{case.path}: failed", total=1)
                    progress.console.print(
                        f"{case.path}: {error}", style="red", markup=False, soft_wrap=True
                    )
                    continue
                *baseline, candidate = values
                rows += [
                    Row(
                        case.path,
                        metric,
                        baseline[0][metric.name] if baseline and not metric.alone else None,
                        candidate[metric.name],
                    )
                    for metric in case.metrics
                ]
                measured(rows)
        finally:
            engines.close()
    return rows, failed


# --- Reporting ------------------------------------------------------------------------------------


def describe_run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The `meta` of a result: where, when, and from what it was measured."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "commit": _commit(),
        "machine": {
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(
                os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1
            ),
            "gpus": _gpus(),
            # Above about 1 before the first engine starts, something else wants the cores.
            "load_average_1min": round(os.getloadavg()[0], 2),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("vllm", "torch", "vllm_effplugin")},
        },
        # Settings of vLLM that the engines inherit; the harness adds `cpu_environment` on CPU.
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("VLLM_")},
        "dtype": DTYPE,
        "seed": SEED,
        "mode": "quick" if arguments.quick else "full",
    }


def _version(distribution: str) -> str | None:
    # The CPU build of vLLM is published under another name.
    for name in (distribution, f"{distribution}-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _commit() -> str | None:
    described = _output(
        "git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=40"
    )
    return described[0] if described else None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    return _output("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")


def _output(*command: str) -> list[str]:
    """Lines that a command prints; none where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.splitlines() if done.returncode == 0 else []


def as_table(rows: Sequence[Row]) -> Table:
    """Medians, ratios and their spread; green where better than stock by more than the spread."""
    rounds = max((len(row.candidate) for row in rows), default=0)
    table = Table(
        box=SIMPLE_HEAD,
        caption=f"{rounds} rounds; ratio = candidate / baseline, spread = its interquartile range",
    )
    for name in ("case", "metric"):
        table.add_column(name, no_wrap=True)
    for name in ("baseline", "candidate", "ratio", "spread"):
        table.add_column(name, justify="right", no_wrap=True)
    for before, row in itertools.pairwise([None, *rows]):
        assert row is not None
        numbers = row.as_json()
        table.add_row(
            "" if before is not None and before.case == row.case else row.case,
            row.metric.name,
            "-" if numbers["baseline"] is None else _figure(numbers["baseline"]),
            _figure(numbers["candidate"]),
            "-" if row.ratio is None else f"[{_colour(row)}]{row.ratio:.3f}[/]",
            f"{numbers['spread']:.3f}",
        )
    return table


def _figure(value: float) -> str:
    """Two places behind the point, four where there is nothing much before it."""
    return f"{value:.2f}" if abs(value) >= 2 else f"{value:.4f}"


def _colour(row: Row) -> str:
    low, high = row.quartiles
    if low <= 1.0 <= high:
        return "default"
    return "green" if (high < 1.0) == (row.metric.better == "lower") else "red"


def write_json(path: Path, meta: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Write `{"meta": ..., "rows": ...}`."""
    content = {"meta": meta, "rows": [row.as_json() for row in rows]}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


_MARKERS = {"lower": "o", "higher": "s"}


def plot(path: Path, meta: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Draw the ratio of every row that has one, its quartiles, and stock vLLM as a line at 1."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    compared = [row for row in rows if row.ratio is not None]
    figure, axes = pyplot.subplots(figsize=(10, 1.6 + 0.28 * len(compared)), layout="constrained")
    for position, row in enumerate(compared):
        low, high = row.quartiles
        axes.plot([low, high], [position, position], color="tab:blue", linewidth=2)
        axes.plot(row.ratio, position, _MARKERS[row.metric.better], color="tab:blue")
    axes.axvline(1.0, color="grey", linewidth=1)
    for better, marker in _MARKERS.items():
        axes.plot([], [], marker, color="tab:blue", label=f"{better} is better")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    axes.set_yticks(range(len(compared)), [f"{row.case}  {row.metric.name}" for row in compared])
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("candidate / stock vLLM, median and quartiles")
    machine = meta["machine"]
    where = ", ".join(machine["gpus"]) or f"{machine['cpu']}, {machine['cores']} cores"
    axes.set_title(f"{where}; vLLM {meta['versions']['vllm']}", fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


# --- Command line ---------------------------------------------------------------------------------


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the quick cases, fewer rounds")
    parser.add_argument(
        "--cases", action="append", default=[], metavar="GLOB", help="cases to run (repeatable)"
    )
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--rounds", type=_positive, help="default: 5 with --quick, else 25")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the ratios as PNG")
    parser.add_argument(
        "--self-check",
        action="store_true",
        help="stock vLLM against stock vLLM: how far from 1.00 the noise alone gets",
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


@contextmanager
def termination_unwinds() -> Iterator[None]:
    """Let SIGTERM end the run as Ctrl-C does, through the blocks that close the engines."""

    def terminate(*_: object) -> NoReturn:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(arguments: argparse.Namespace, cases: Sequence[Case]) -> int:
    """Run a benchmark from its parsed command line.

    Returns:
        Exit code: 0, 1 when an engine failed, 2 when the command line asks for the impossible.
    """
    console = Console(stderr=True)
    chosen = select(cases, arguments.cases, quick=arguments.quick)
    if arguments.self_check:
        chosen = self_checks(chosen)
    if not chosen:
        known = ", ".join(case.path for case in cases)
        console.print(f"no case matches {', '.join(arguments.cases)}; known are {known}")
        return 2
    if arguments.list:
        print(*(case.path for case in chosen), sep="\n")
        return 0
    for output in (arguments.json, arguments.plot):
        if output is not None and not output.absolute().parent.is_dir():
            console.print(f"{output} cannot be written: its folder does not exist")
            return 2
    meta = describe_run(arguments)
    rounds = arguments.rounds or (5 if arguments.quick else 25)

    def save(rows: Sequence[Row]) -> None:
        if arguments.json is not None:
            write_json(arguments.json, meta, rows)

    with termination_unwinds():
        # After every case, so that a run that is cut short has not been for nothing.
        rows, failed = run(chosen, rounds, CACHE / "benchmarks", console, save)
    meta["failed"] = failed
    table = as_table(rows)
    # As wide as it needs to be: a cut-off figure is worse than a wrapped line.
    Console(width=Console(width=1000).measure(table).maximum).print(table)
    save(rows)
    if arguments.plot is not None:
        plot(arguments.plot, meta, rows)
    return 1 if failed else 0
