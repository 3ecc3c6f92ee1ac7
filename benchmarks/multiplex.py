"""Classifiers that merge sequences (RevMUX) against stock vLLM's `/classify`.

    EFFPLUGIN_DATA=DIR python benchmarks/multiplex.py --quick --json result.json

Case names: `multiplex/n<N>/l<l>/<input>`, adapters that are not trained, for their speed: inputs of
64 or 256 tokens, or `mixed` ones of 32 to 256, all submitted at once; `ideal` is the gain if
merging itself cost nothing, `L / (l + (L - l) / N)`. `multiplex/poisson/<load>`: requests arrive at
that multiple of what stock vLLM can answer; milliseconds from arrival to answer.
`multiplex/<task>/<point>`: trained ones, on rows that neither training nor choosing saw. `alone_s`
is `requests_s` of the same engine if nobody may merge; `accuracy` is the mean over ten groupings,
`spread` their standard deviation, `difference` the accuracy less that of the same rows alone with
its standard error, `flips` how often a text's class changes with its partners. `exits_n2` and
`exits_n4` put merging behind exits of a tuned classifier: N = 2 behind those after 6, 10 and 16
layers, N = 4 behind those after 6 and 10.

The first run prepares the checkpoints: a quarter of an hour per trained case.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import HIDDEN, build_smollm2, build_untrained
from classification import TASKS, Recipe, Rows, build_minilm, parse_arguments
from harness import (
    CACHE,
    Case,
    Engine,
    EngineError,
    EngineProcess,
    EngineSpec,
    Metric,
    argument_parser,
    main,
    select,
)
from tqdm.auto import tqdm

from vllm_effplugin.config import EfficiencyConfig
from vllm_effplugin.config.checkpoint import write_checkpoint
from vllm_effplugin.techniques.multiplex.accuracy import GROUPINGS, company
from vllm_effplugin.techniques.multiplex.config import MULTIPLEXERS, MultiplexConfig
from vllm_effplugin.techniques.multiplex.layers import Multiplexer
from vllm_effplugin.techniques.multiplex.request import multiplex_pooling_params

FOLDER = CACHE / "benchmarks" / "multiplex"
QUEUE = 256
"""Sequences that are submitted at once, of 64 tokens; fewer of longer ones."""

SIZES, DEPTHS = (2, 4), (0, 6, 15)
LOADS = (0.3, 0.7, 1.2)
POISSON_SECONDS = 20.0

# --- Metrics --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lengths:
    """Random inputs."""

    shortest: int
    longest: int

    def prompts(self, engine: Engine) -> list[list[int]]:
        """About as many tokens in all, whatever the lengths; the same at every call."""
        rng = random.Random(0)
        count = QUEUE * 64 * 2 // (self.shortest + self.longest)
        lengths = [rng.randint(self.shortest, self.longest) for _ in range(count)]
        return [[rng.randrange(engine.vocab_size) for _ in range(n)] for n in lengths]


@dataclass(frozen=True)
class Throughput:
    """Sequences per second, all submitted at once."""

    lengths: Lengths
    engines: int = 1
    """That share the sequences among them."""

    def __call__(self, engine: Engine) -> float:
        prompts = [{"prompt_token_ids": ids} for ids in self.lengths.prompts(engine)]
        prompts = prompts[:: self.engines]
        start = time.perf_counter()
        engine.llm.classify(prompts, use_tqdm=False)
        return len(prompts) / (time.perf_counter() - start)


def ideal(engine: Engine) -> float:
    """The gain in `requests_s` if merging inputs of one length cost nothing."""
    config = engine.llm.llm_engine.model_config.hf_config
    multiplex, layers = config.efficiency["multiplex"], config.num_hidden_layers
    depth, [size] = multiplex["depth"], multiplex["sizes"]
    return layers / (depth + (layers - depth) / size)


@dataclass(frozen=True)
class Latency:
    """A percentile of the milliseconds from a request's arrival to its answer.

    Arrivals are a Poisson process, the same for both engines. A request that arrives while a step
    runs waits for it, as in a server.
    """

    lengths: Lengths
    rate: float
    percentile: int

    def __call__(self, engine: Engine) -> float:
        # Both percentiles are of one run: the first one asked for makes it.
        kept = engine.kept.setdefault(f"poisson {self.rate}", [])
        if not kept:
            kept.append(self._run(engine))
            return float(np.percentile(kept[0], self.percentile))
        return float(np.percentile(kept.pop(), self.percentile))

    def _run(self, engine: Engine) -> list[float]:
        from vllm import PoolingParams

        rng = random.Random(1)
        prompts = self.lengths.prompts(engine)
        arrivals, at = [], 0.0
        while at < POISSON_SECONDS:
            at += rng.expovariate(self.rate)
            arrivals.append(at)
        core = engine.llm.llm_engine
        due = dict(enumerate(arrivals))
        waiting = list(reversed(arrivals))
        finished: dict[int, float] = {}
        names: dict[str, int] = {}
        start = time.perf_counter()
        while len(finished) < len(arrivals):
            now = time.perf_counter() - start
            while waiting and waiting[-1] <= now:
                number = len(names)
                name = f"poisson-{id(finished)}-{number}"
                names[name] = number
                ids = prompts[number % len(prompts)]
                params = PoolingParams(task="classify")
                core.add_request(name, {"prompt_token_ids": ids}, params)
                waiting.pop()
            if not core.has_unfinished_requests():
                time.sleep(max(0.0, waiting[-1] - (time.perf_counter() - start)))
                continue
            for output in core.step():
                number = names[output.request_id]
                finished[number] = time.perf_counter() - start - due[number]
        return [1e3 * seconds for seconds in finished.values()]


@dataclass(frozen=True)
class Answers:
    """One figure of the answers to labelled texts in several orders; asked for once per engine."""

    rows: Rows
    figure: str

    def __call__(self, engine: Engine) -> float:
        if self.rows.file not in engine.kept:
            engine.kept[self.rows.file] = self._figures(engine)
        return float(engine.kept[self.rows.file][self.figure])

    def _figures(self, engine: Engine) -> dict[str, float]:
        texts, labels = self.rows.read()
        if not hasattr(engine.llm.llm_engine.model_config.hf_config, "efficiency"):
            right = _classes(engine, texts, None) == labels
            same = dict.fromkeys(("spread", "flips", "difference", "difference_se"), 0.0)
            return {"accuracy": float(right.mean()), **same}
        alone = _classes(engine, texts, multiplex_pooling_params(mux=False))
        rng = np.random.default_rng(0)
        answers = []
        for _ in range(GROUPINGS):
            order = rng.permutation(len(texts))
            found = np.empty(len(texts), dtype=int)
            found[order] = _classes(engine, [texts[i] for i in order], None)
            answers.append(found)
        return vars(company(np.stack(answers), alone, labels))


def _classes(engine: Engine, texts: Sequence[str], params: Any) -> np.ndarray:
    outputs = engine.llm.classify(list(texts), pooling_params=params, use_tqdm=False)
    return np.array([np.argmax(output.outputs.probs) for output in outputs])


@dataclass(frozen=True)
class TextThroughput:
    """Texts classified per second, all of them submitted at once."""

    rows: Rows
    merged: bool = True
    """False: each of them alone, on an engine that could merge them."""
    count: int = 512

    def __call__(self, engine: Engine) -> float:
        texts = self.rows.read()[0][: self.count]
        params = None if self.merged else multiplex_pooling_params(mux=False)
        start = time.perf_counter()
        engine.llm.classify(texts, pooling_params=params, use_tqdm=False)
        return len(texts) / (time.perf_counter() - start)


# --- Checkpoints ----------------------------------------------------------------------------------


def untrained(size: int, depth: int) -> Path:
    """Where the classifier with multiplexers of random weights is."""
    return FOLDER / f"untrained-n{size}-l{depth}"


def build_multiplexer(base: Path, size: int, depth: int) -> None:
    """Make it, unless it is there."""
    if untrained(size, depth).exists():
        return
    torch.manual_seed(0)
    layer = Multiplexer(HIDDEN, size)
    layer.initialise()
    tensors = {f"{MULTIPLEXERS}.{size}.{n}": t for n, t in layer.state_dict().items()}
    multiplex = MultiplexConfig(depth=depth, sizes=(size,))
    write_checkpoint(
        base,
        untrained(size, depth),
        EfficiencyConfig(multiplex=multiplex),
        tensors=tensors,
        provenance={},
    )


@dataclass(frozen=True)
class Trained:
    """What `effplugin prepare multiplex` is asked for."""

    recipe: Recipe
    sizes: str
    depth: int
    method: str = "final"
    """Which of the recipe's checkpoints it starts from."""
    exits: str = ""
    """Depths of further exits, before the merge, as `prepare classify` takes them."""

    @property
    def start(self) -> Path:
        """The classifier that merging is added to."""
        if not self.exits:
            return self.recipe.checkpoint(self.method)
        return FOLDER / f"{self.recipe.stem}-exits-{self.exits.replace(',', '-')}"

    @property
    def checkpoint(self) -> Path:
        """Where it is kept."""
        return FOLDER / f"{self.start.name}-n{self.sizes}-l{self.depth}"

    def prepare(self, data: Path) -> None:
        """Make it, unless it is there. Everything is to be shown: whatever it loses or gains."""
        train = data / self.recipe.task.name / "train.jsonl"
        self.recipe.prepare(sorted({"final", self.method}), data)
        if self.exits:
            base = self.recipe.checkpoint(self.method)
            _prepare("classify", base, self.start, train, "--exits", self.exits)
        options = ["--n", self.sizes, "--mux-layer", str(self.depth)]
        options += ["--max-loss", "0.5", "--min-gain", "0.1"]
        _prepare("multiplex", self.start, self.checkpoint, train, *options)


def _prepare(technique: str, model: Path, out: Path, train: Path, *options: str) -> None:
    if not (out / "provenance.json").exists():
        command = [sys.executable, "-m", "vllm_effplugin.cli.main", "prepare", technique]
        command += [str(model), str(out), "--train", str(train), "--overwrite", *options]
        subprocess.run(command, check=True)


# --- Cases ----------------------------------------------------------------------------------------


def spec(checkpoint: Path, *, texts: bool = False) -> EngineSpec:
    """An engine."""
    options: dict[str, Any] = {"max_model_len": 512}
    if texts:
        options["skip_tokenizer_init"] = False
    return EngineSpec(str(checkpoint), options=options)


def speed_cases(smollm2: Path) -> list[Case]:
    """A full queue, with adapters that are not trained."""
    stock = spec(FOLDER / "classifier")
    found = []
    for size in SIZES:
        for depth in DEPTHS:
            inputs = {"len64": Lengths(64, 64), "len256": Lengths(256, 256)}
            if depth == 6:
                inputs["mixed"] = Lengths(32, 256)
            for name, lengths in inputs.items():
                found.append(
                    Case(
                        f"multiplex/n{size}/l{depth}/{name}",
                        stock,
                        spec(untrained(size, depth)),
                        (
                            Metric("requests_s", Throughput(lengths), better="higher"),
                            Metric("ideal", ideal, better="higher", once=True, alone=True),
                        ),
                        quick=True,
                    )
                )
    return found


def poisson_cases(capacity: float) -> list[Case]:
    """Requests that arrive one by one.

    Args:
        capacity: of stock vLLM, in requests per second.
    """
    lengths = Lengths(32, 256)
    return [
        Case(
            f"multiplex/poisson/{load}",
            spec(FOLDER / "classifier"),
            spec(untrained(2, 6)),
            tuple(
                Metric(f"p{p}_ms", Latency(lengths, load * capacity, p), better="lower")
                for p in (50, 99)
            ),
            quick=True,
        )
        for load in LOADS
    ]


def trained_cases(smollm2: Path, minilm: Path, data: Path) -> list[tuple[Case, Trained]]:
    """Accuracy and speed of trained adapters."""
    found = []

    def add(name: str, trained: Trained, *, quick: bool = False) -> None:
        rows = Rows(str(data / trained.recipe.task.name / f"{trained.recipe.task.test}.jsonl"))
        figures = ("spread", "flips", "difference", "difference_se")
        metrics = (
            Metric("requests_s", TextThroughput(rows), better="higher"),
            Metric("alone_s", TextThroughput(rows, merged=False), better="higher", alone=True),
            Metric("accuracy", Answers(rows, "accuracy"), better="higher", once=True),
            *(
                Metric(figure, Answers(rows, figure), better="lower", once=True, alone=True)
                for figure in figures
            ),
        )
        base = spec(trained.recipe.checkpoint("final"), texts=True)
        case = Case(
            f"multiplex/{name}", base, spec(trained.checkpoint, texts=True), metrics, quick=quick
        )
        found.append((case, trained))

    for task in TASKS.values():
        recipe = Recipe(task, "smollm2", smollm2)
        add(f"{task.name}/n2/l15", Trained(recipe, "2", 15), quick=task.name == "sst2")
        add(f"{task.name}/n4/l15", Trained(recipe, "4", 15))
    sst2 = TASKS["sst2"]
    add("sst2-minilm/n2/l3", Trained(Recipe(sst2, "minilm", minilm), "2", 3))
    tuned = Recipe(sst2, "smollm2", smollm2, lora=True)
    add("sst2/exits_n2", Trained(tuned, "2", 16, method="jei"), quick=True)
    add("sst2/exits_n4", Trained(tuned, "4", 10, exits="6,10"))
    return found


def stock_capacity() -> float:
    """Requests per second that stock vLLM answers from a full queue of the Poisson cases' kind."""
    with tempfile.TemporaryDirectory() as logs:
        engine = EngineProcess(spec(FOLDER / "classifier"), Path(logs) / "capacity.log")
        try:
            engine.wait_ready()
            measure = Throughput(Lengths(32, 256))
            return float(np.median([engine.measure(measure) for _ in range(4)][1:]))
        finally:
            engine.close()


def two_engines(rounds: int) -> None:
    """Print what two stock engines on half of the cores each give against one on all of them."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise EngineError("two engines need two cores")
    half = len(cores) // 2
    measure = Throughput(Lengths(64, 64))
    shared = Throughput(measure.lengths, engines=2)
    with tempfile.TemporaryDirectory() as logs, ThreadPoolExecutor(2) as threads:
        engines = []
        try:
            for index, own in enumerate((cores, cores[:half], cores[half:])):
                os.sched_setaffinity(0, own)  # which the process inherits
                engines.append(EngineProcess(spec(FOLDER / "classifier"), Path(logs) / f"{index}"))
            os.sched_setaffinity(0, cores)
            for engine in engines:
                engine.wait_ready()
            one, *two = engines
            ratios = []
            for _ in tqdm(range(rounds + 1), desc="one and two engines"):
                alone = one.measure(measure)
                together = sum(threads.map(lambda engine: engine.measure(shared), two))
                ratios.append(together / alone)
        finally:
            os.sched_setaffinity(0, cores)
            for engine in engines:
                engine.close()
    low, middle, high = np.percentile(ratios[1:], (25, 50, 75))
    print(f"two engines: {middle:.2f} ± {high - low:.2f} of one's requests per second")


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--two-engines", action="store_true", help="two stock engines against one, nothing else"
    )
    arguments = parse_arguments(parser)
    encoder = CACHE / "minilm"
    trained = trained_cases(arguments.model, encoder, arguments.data)
    speed, poisson = speed_cases(arguments.model), poisson_cases(1.0)
    everything = [*speed, *poisson, *(case for case, _ in trained)]
    chosen = select(everything, arguments.cases, quick=arguments.quick)
    if not arguments.list:
        build_smollm2(arguments.model)
        base = build_untrained(arguments.model)
        if arguments.two_engines:
            two_engines(arguments.rounds or 5)
            sys.exit()
        for size in SIZES:
            for depth in DEPTHS:
                build_multiplexer(base, size, depth)
        if any("minilm" in case.path for case in chosen):
            build_minilm(encoder)
        for case, one in trained:
            if case in chosen:
                one.prepare(arguments.data)
        if any(case in chosen for case in poisson):
            poisson = poisson_cases(stock_capacity())
    sys.exit(main(arguments, [*speed, *poisson, *(case for case, _ in trained)]))
