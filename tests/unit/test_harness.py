"""The benchmark harness, on engines whose timings are scripted."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import vllm.envs

# The benchmarks are scripts beside the package, not part of it.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import early_exit
import harness
import layer_parallel
from harness import Case, EngineSpec, Metric, Row

from vllm_effplugin.config import parse_efficiency

STOCK = EngineSpec("model")
GROUPED = EngineSpec("model", hf_overrides={"efficiency": {"version": 1}})
META = {
    "machine": {"cpu": "a processor", "cores": 2, "gpus": []},
    "versions": {"vllm": "0.32.0"},
}


def first_metric(engine: Any) -> float:
    """Stands for a measurement; the scripted engines only look at its name."""
    raise NotImplementedError


def second_metric(engine: Any) -> float:
    """A second one."""
    raise NotImplementedError


FIRST = Metric("first_ms", first_metric, better="lower")
SECOND = Metric("second_tok_s", second_metric, better="higher")


class ScriptedEngine:
    """Answers with the next of the given values, and notes each call in a shared log."""

    def __init__(self, name: str, values: list[float], log: list[tuple[str, str]]) -> None:
        self.name = name
        self.values = iter(values)
        self.log = log

    def measure(self, measure: Callable[[Any], float]) -> float:
        self.log.append((self.name, measure.__name__))
        return next(self.values)


def row(baseline: list[float] | None, candidate: list[float], metric: Metric = FIRST) -> Row:
    return Row("technique/case", metric, baseline, candidate)


# --- Interleaving ---------------------------------------------------------------------------------


def test_engines_take_turns_and_the_order_alternates_between_rounds() -> None:
    log: list[tuple[str, str]] = []
    engines = [ScriptedEngine(name, [1.0] * 10, log) for name in "AB"]
    harness.interleave(engines, [FIRST, SECOND], rounds=3)
    turns = ["".join(name for name, _ in log[i : i + 4]) for i in range(0, len(log), 4)]
    assert turns == ["BABA", "ABAB", "BABA", "ABAB"]  # the warm-up, then three rounds
    assert [name for _, name in log[4:8]] == ["first_metric"] * 2 + ["second_metric"] * 2


def test_warm_up_is_thrown_away_and_values_stay_in_round_order() -> None:
    engines = [
        ScriptedEngine("A", [99.0, 1.0, 2.0, 3.0], []),
        ScriptedEngine("B", [77.0, 4.0, 5.0, 6.0], []),
    ]
    values = harness.interleave(engines, [FIRST], rounds=3)
    assert values == [{"first_ms": [1.0, 2.0, 3.0]}, {"first_ms": [4.0, 5.0, 6.0]}]


def test_every_measurement_advances_the_progress() -> None:
    ticks = itertools.count()
    engine = ScriptedEngine("A", [1.0] * 8, [])
    harness.interleave([engine], [FIRST, SECOND], rounds=3, measured=lambda: next(ticks))
    assert next(ticks) == (1 + 3) * 2


# --- Arithmetic -----------------------------------------------------------------------------------


def test_ratio_is_the_median_of_ratios_not_the_ratio_of_medians() -> None:
    # A machine that slows down fivefold half-way: the ratios of medians would be 4 / 2.
    measured = row(baseline=[1.0, 2.0, 10.0], candidate=[0.9, 4.0, 8.0])
    assert measured.ratio == pytest.approx(0.9)
    assert measured.as_json()["baseline"] == 2.0
    assert measured.as_json()["candidate"] == 4.0


def test_spread_is_the_interquartile_range_of_the_ratios() -> None:
    measured = row(baseline=[2.0] * 5, candidate=[2.0, 2.2, 2.4, 2.6, 20.0])
    assert measured.quartiles == pytest.approx((1.1, 1.3))
    assert measured.as_json()["spread"] == pytest.approx(0.2)


def test_one_round_has_no_spread() -> None:
    assert row([2.0], [1.0]).as_json()["spread"] == 0.0


def test_row_without_baseline_has_nulls_and_a_relative_spread() -> None:
    written = row(None, [8.0, 9.0, 10.0, 11.0, 12.0]).as_json()
    assert written["baseline"] is None
    assert written["ratio"] is None
    assert written["candidate"] == 10.0
    assert written["spread"] == pytest.approx(0.2)


# --- Metrics --------------------------------------------------------------------------------------


class FakeLLMEngine:
    """Steps of scripted length; prefills up to `admitted` requests in one, beside decoding ones."""

    def __init__(self, clock: list[float], prefill_s: float, decode_s: float, admitted: int):
        self.clock, self.prefill_s, self.decode_s = clock, prefill_s, decode_s
        self.admitted = admitted
        self.left: dict[str, int] = {}
        self.waiting: list[str] = []

    def add_request(self, request_id: str, prompt: dict[str, list[int]], params: Any) -> None:
        assert request_id not in self.left
        assert params.ignore_eos
        self.left[request_id] = params.max_tokens
        self.waiting.append(request_id)

    def has_unfinished_requests(self) -> bool:
        return bool(self.left)

    def step(self) -> list[str]:
        prefilled, self.waiting = self.waiting[: self.admitted], self.waiting[self.admitted :]
        running = [request for request in self.left if request not in self.waiting]
        self.clock[0] += self.prefill_s if prefilled else self.decode_s * len(running)
        for request in running:
            self.left[request] -= 1
        self.left = {request: left for request, left in self.left.items() if left}
        return running


@pytest.fixture
def fake_engine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., harness.Engine]:
    # Fields of its parameters are all that is used of vLLM here.
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=SimpleNamespace))

    def make(**timings: Any) -> harness.Engine:
        clock = [0.0]
        monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
        llm = SimpleNamespace(llm_engine=FakeLLMEngine(clock, **timings))
        return harness.Engine(llm, vocab_size=1000)

    return make


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("admitted", [1, 3, 8])
@pytest.mark.parametrize("prefill_s", [0.001, 5.0])
def test_decode_time_is_that_of_the_full_batch_without_prefill(
    fake_engine: Callable[..., harness.Engine], batch: int, admitted: int, prefill_s: float
) -> None:
    engine = fake_engine(prefill_s=prefill_s, decode_s=0.020, admitted=admitted)
    for _ in range(2):  # request ids must not repeat
        assert harness.DecodeTime(batch, tokens=9)(engine) == pytest.approx(20.0 * batch)


def test_prefill_throughput_counts_prompt_tokens(
    fake_engine: Callable[..., harness.Engine],
) -> None:
    engine = fake_engine(prefill_s=0.5, decode_s=9.0, admitted=2)
    assert harness.PrefillThroughput(count=4, length=512)(engine) == pytest.approx(2048)


def test_prompts_are_distinct_inside_the_vocabulary_and_the_same_every_time() -> None:
    engine = harness.Engine(llm=None, vocab_size=50)
    prompts = engine.prompts(count=4, length=30)
    assert prompts == engine.prompts(count=4, length=30)
    assert len({tuple(prompt) for prompt in prompts}) == 4
    assert {len(prompt) for prompt in prompts} == {30}
    assert all(0 <= token < 50 for prompt in prompts for token in prompt)


def test_metrics_can_be_sent_to_the_engine() -> None:
    for metric in harness.SPEED_METRICS:
        assert pickle.loads(pickle.dumps(metric.measure)) == metric.measure


# --- Engine processes -----------------------------------------------------------------------------


def test_cores_are_shared_evenly_by_the_ranks() -> None:
    def bind(ranks: int, cores: set[int]) -> str:
        return harness.cpu_environment(ranks, cores)["VLLM_CPU_OMP_THREADS_BIND"]

    assert bind(1, {0, 1}) == "0,1"
    assert bind(2, {0, 1}) == "0|1"
    assert bind(2, {2, 5, 7, 9, 11}) == "2,5|7,9"
    with pytest.raises(harness.EngineError, match="2 ranks"):
        bind(2, {0})


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces engine processes by ones that exist only in the list of events returned."""
    events: list[str] = []

    class FakeProcess:
        def __init__(self, spec: EngineSpec, log: Path) -> None:
            self.spec = spec
            events.append(f"start {spec.model}")

        def wait_ready(self) -> None:
            events.append(f"ready {self.spec.model}")
            if self.spec.model == "broken":
                raise harness.EngineError("out of order")

        def measure(self, measure: Callable[[Any], float]) -> float:
            return 3.0 if self.spec.model == "stock" else 6.0

        def begin_close(self) -> None:
            pass

        def close(self) -> None:
            events.append(f"close {self.spec.model}")

    monkeypatch.setattr(harness, "EngineProcess", FakeProcess)
    return events


def case(path: str, baseline: str | None, candidate: str, *, quick: bool = False) -> Case:
    return Case(
        path,
        baseline and EngineSpec(baseline),
        EngineSpec(candidate),
        [FIRST],
        quick,
    )


def run_main(cases: list[Case], *options: str) -> int:
    return harness.main(harness.argument_parser("").parse_args(options), cases)


def test_cases_share_a_baseline_engine_and_two_start_together(processes: list[str]) -> None:
    cases = [case("t/one", "stock", "one"), case("t/two", "stock", "two"), case("t/x", None, "x")]
    assert run_main(cases, "--rounds", "1") == 0
    assert processes == [
        *("start stock", "start one", "ready stock", "ready one"),
        *("close one", "start two", "ready two"),
        *("close stock", "close two", "start x", "ready x"),
        "close x",
    ]


def test_a_broken_engine_fails_its_case_only(processes: list[str], tmp_path: Path) -> None:
    cases = [case("t/broken", "stock", "broken"), case("t/good", "stock", "good")]
    file = tmp_path / "out.json"
    assert run_main(cases, "--rounds", "1", "--json", str(file)) == 1
    written = json.loads(file.read_text())
    assert written["meta"]["failed"] == ["t/broken"]
    assert [line["case"] for line in written["rows"]] == ["t/good"]
    opened = [event for event in processes if event.startswith("start")]
    closed = [event for event in processes if event.startswith("close")]
    assert len(opened) == len(closed) == 4


HOSTED = """
import sys
sys.path.insert(0, {benchmarks!r})
from pathlib import Path
import harness

def pid(engine): import os; return os.getpid()
def fail(engine): raise ValueError("bad metric")
def slow(engine): import time; time.sleep(0.5); return 1
def fake_start(spec):
    import subprocess
    subprocess.Popen(["sleep", "600"])
    return harness.Engine(llm=None, vocab_size=1)
harness._start_engine = fake_start

if __name__ == "__main__":
    engine = harness.EngineProcess(harness.EngineSpec("model"), Path({log!r}))
    engine.wait_ready()
    host = int(engine.measure(pid))
    import psutil
    (child,) = psutil.Process(host).children()
    print("idle:", child.status())
    try:
        engine.measure(fail)
    except harness.EngineError as error:
        print("error:", "bad metric" in str(error))
    print("still answers:", int(engine.measure(pid)) == host)
    print("pids:", host, child.pid, flush=True)
    if {end!r} == "close":
        engine.close()
    else:
        import os, signal
        if {end!r} == "killed while measuring":
            engine._pipe.send(slow)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def hosted(tmp_path: Path, end: str) -> str:
    """Output of a script that drives a real engine process around a stand-in for vLLM."""
    script = tmp_path / "hosted.py"
    script.write_text(
        HOSTED.format(
            benchmarks=str(Path(harness.__file__).parent),
            log=str(tmp_path / "engine.log"),
            end=end,
        )
    )
    return subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False
    ).stdout


@pytest.fixture
def _needs_psutil() -> None:
    pytest.importorskip("psutil")


@pytest.mark.usefixtures("_needs_psutil")
@pytest.mark.parametrize("end", ["close", "killed", "killed while measuring"])
def test_an_idle_engine_is_stopped_and_none_of_it_outlives_the_benchmark(
    tmp_path: Path, end: str
) -> None:
    *printed, pids = hosted(tmp_path, end).splitlines()
    assert printed == ["idle: stopped", "error: True", "still answers: True"]
    deadline = time.monotonic() + 10
    for pid in map(int, pids.removeprefix("pids:").split()):
        while _runs(pid):
            assert time.monotonic() < deadline, f"process {pid} survived"
            time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


# --- Selection ------------------------------------------------------------------------------------

CASES = [
    case("t/tp1/one", "stock", "one", quick=True),
    case("t/tp1/two", "stock", "two"),
    case("t/tp2/one", "other", "one", quick=True),
    case("t/alone", None, "one"),
]


@pytest.mark.parametrize(
    ("globs", "quick", "expected"),
    [
        ([], False, ["t/tp1/one", "t/tp1/two", "t/tp2/one", "t/alone"]),
        ([], True, ["t/tp1/one", "t/tp2/one"]),
        (["*/two"], True, ["t/tp1/two"]),
        (["t/alone", "t/tp1/*"], False, ["t/tp1/one", "t/tp1/two", "t/alone"]),
        (["T/*"], False, []),
    ],
)
def test_selection(globs: list[str], quick: bool, expected: list[str]) -> None:
    assert [c.path for c in harness.select(CASES, globs, quick=quick)] == expected


def test_self_check_runs_each_baseline_against_itself_once() -> None:
    checks = harness.self_checks(CASES)
    assert [check.path for check in checks] == ["t/tp1/one/self_check", "t/tp2/one/self_check"]
    assert all(check.candidate == check.baseline for check in checks)


@pytest.mark.parametrize(
    "options", [["--cases", "nothing/*"], ["--json", "/nonexistent/folder/out.json"]]
)
def test_impossible_requests_exit_with_2_and_start_nothing(
    processes: list[str], options: list[str]
) -> None:
    assert run_main(CASES, *options) == 2
    assert processes == []


def test_zero_rounds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_main(CASES, "--rounds", "0")
    assert stopped.value.code == 2
    assert "at least 1" in capsys.readouterr().err


# --- Output ---------------------------------------------------------------------------------------


def test_json_has_the_agreed_fields(processes: list[str], tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    cases = [case("t/compared", "stock", "x"), case("t/alone", None, "x")]
    assert run_main(cases, "--rounds", "2", "--json", str(file)) == 0
    written = json.loads(file.read_text())
    assert set(written) == {"meta", "rows"}
    common = {"metric": "first_ms", "candidate": 6.0, "rounds": 2, "spread": 0.0}
    assert written["rows"] == [
        {"case": "t/compared", "baseline": 3.0, "ratio": 2.0, **common},
        {"case": "t/alone", "baseline": None, "ratio": None, **common},
    ]
    meta = written["meta"]
    assert set(meta) == {
        *("date", "command", "commit", "machine", "versions", "environment", "dtype", "seed"),
        *("mode", "failed"),
    }
    assert meta["machine"]["cores"] == len(os.sched_getaffinity(0))
    assert meta["machine"]["cpu"]
    assert meta["machine"]["memory_gib"] > 0
    assert set(meta["versions"]) == {"python", "vllm", "torch", "vllm_effplugin"}


@pytest.mark.parametrize("rows", [[row([2.0, 2.0], [1.0, 1.5]), row(None, [1.0], SECOND)], []])
def test_plot_is_a_png(tmp_path: Path, rows: list[Row]) -> None:
    file = tmp_path / "plot.png"
    harness.plot(file, META, rows)
    assert file.read_bytes().startswith(b"\x89PNG")


def test_table_names_each_case_once_and_marks_missing_baselines(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [row([4.0], [3.0]), row([4.0], [8.0], SECOND)]
    rows.append(dataclasses.replace(row(None, [5.0]), case="technique/alone"))
    harness.Console(width=100).print(harness.as_table(rows))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["technique/case", "first_ms", "4.00", "3.00", "0.750", "0.000"] in lines
    assert ["second_tok_s", "4.00", "8.00", "2.000", "0.000"] in lines
    assert ["technique/alone", "first_ms", "-", "5.00", "-", "0.000"] in lines


@pytest.mark.parametrize(
    ("candidate", "metric", "colour"),
    [
        ([0.8, 0.9], FIRST, "green"),
        ([1.2, 1.3], FIRST, "red"),
        ([1.2, 1.3], SECOND, "green"),
        ([0.8, 0.9], SECOND, "red"),
        ([0.8, 1.3], FIRST, "default"),
    ],
)
def test_colour_says_better_or_worse_only_beyond_the_spread(
    candidate: list[float], metric: Metric, colour: str
) -> None:
    assert harness._colour(row([1.0, 1.0], candidate, metric)) == colour


# --- The layer-parallel benchmark -----------------------------------------------------------------


def test_layer_parallel_cases_are_servable_configurations() -> None:
    cases = layer_parallel.cases(Path("smollm2"), Path("llama"))
    for case_ in cases:
        layers = 30 if "/tp1/" in case_.path else 24
        assert case_.baseline is not None
        assert not case_.baseline.hf_overrides
        assert case_.candidate.model == case_.baseline.model
        efficiency = parse_efficiency(case_.candidate.hf_overrides["efficiency"])
        efficiency.validate_for(layers)
    assert len({case_.path for case_ in cases}) == len(cases)


def test_quick_layer_parallel_cases_are_those_of_the_acceptance() -> None:
    cases = layer_parallel.cases(Path("smollm2"), Path("llama"))
    quick = harness.select(cases, [], quick=True)
    assert [c.path for c in quick] == ["layer_parallel/tp1/bypass0", "layer_parallel/tp2/bypass0"]
    assert [m.name for m in quick[0].metrics] == [
        *("decode_ms_b1", "decode_ms_b8", "decode_ms_b32", "prefill_tok_s")
    ]


# --- The early-exit benchmark ---------------------------------------------------------------------


def test_early_exit_cases_are_servable_configurations_with_metrics_that_travel() -> None:
    for case in early_exit.cases(Path("model")):
        pickle.dumps(case.metrics)
        block = parse_efficiency(case.candidate.hf_overrides.get("efficiency"))
        block.validate_for(30)
        assert (block.early_exit is None) == ("/trained/" in case.path)


def test_quick_early_exit_cases_are_those_of_the_acceptance() -> None:
    assert [case.path for case in early_exit.cases(Path("model")) if case.quick] == [
        "early_exit/off",
        "early_exit/idle",
        "early_exit/forced/l10/100/recompute",
        "early_exit/forced/l10/100/propagate",
        "early_exit/forced/l10/50/recompute",
        "early_exit/forced/l10/50/propagate",
        "early_exit/trained/0.95",
        "early_exit/trained/0.99",
    ]


@pytest.mark.parametrize("efficiency", [None, {"early_exit": {"exits": []}}])
def test_agreement_without_exits_is_whole(efficiency: dict[str, Any] | None) -> None:
    hf_config = SimpleNamespace(efficiency=efficiency)
    model_config = SimpleNamespace(hf_config=hf_config)
    llm = SimpleNamespace(llm_engine=SimpleNamespace(model_config=model_config))  # no exits' RPC
    engine: Any = SimpleNamespace(llm=llm)
    assert early_exit.Agreement(4)(engine) == 1


def test_vllm_knows_the_settings_that_engines_start_with():
    """One of an unknown name does nothing."""
    known = set(vllm.envs.environment_variables)
    names = {
        *harness.CUDA_ENVIRONMENT,
        *harness.CPU_ENVIRONMENT,
        *harness.cpu_environment(1, [0]),
    }
    assert {name for name in names if name.startswith("VLLM_")} <= known
