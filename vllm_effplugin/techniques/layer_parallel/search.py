"""Which layers to run concurrently: a search by measured damage.

The damage of a partition is the mean KL divergence per token, in nats, of the grouped model from
the original one on calibration text. CQIL (arXiv 2404.06709, section 3.2) picks layers by the
similarity of their inputs and publishes no search; here cosine similarity is reported only.

The search runs in three phases: every group alone; greedy growth, the joint damage measured anew
at each step; local refinement. Every contiguous range of the same composition competes as well,
so the result is never worse than the best of them on the calibration text.

Shapes: `B` sequences, `S` positions, `d` hidden size, `V` vocabulary, `L` layers.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from tqdm.auto import tqdm

from vllm_effplugin.config import EfficiencyConfig
from vllm_effplugin.errors import ConfigError
from vllm_effplugin.plan import Unit, build_plan
from vllm_effplugin.preparation.head import LOGITS_CHUNK
from vllm_effplugin.techniques.layer_parallel.config import GROUP_SIZES, LayerParallelConfig
from vllm_effplugin.techniques.layer_parallel.reference import ReferenceDecoder

logger = logging.getLogger(__name__)

Group = tuple[int, ...]
Groups = tuple[Group, ...]

EVALUATION_THREADS = 2
"""Threads of one evaluation, in this process and in a Ray actor alike: sums over a different
number of threads differ in the last bits, and both modes must return the same partition."""

CACHE_BYTES = 1 << 29
"""Hidden states that one meter keeps to restart from."""


class SearchSettings(BaseModel):
    """What to search for: a depth to reach, or a damage not to exceed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    target_depth: int | None = Field(None, ge=1, description="Number of units to end with.")
    max_kl: float | None = Field(None, gt=0, description="Largest damage, nats per token.")
    group_size: int = Field(2, description="Layers per group: 2, 3 or 4.")
    schedule: Literal["bypass", "fused"] = "bypass"
    bypass: int = Field(0, ge=0)
    candidates: int = Field(8, ge=1, description="Groups measured jointly per growth step.")
    refinements: int = Field(3, ge=0, description="Most rounds of local refinement.")

    @model_validator(mode="after")
    def _one_goal(self) -> SearchSettings:
        if (self.target_depth is None) == (self.max_kl is None):
            raise ValueError("give either `target_depth` or `max_kl`")
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"`group_size` must be one of {GROUP_SIZES}, got {self.group_size}")
        return self

    def execution(self) -> LayerParallelConfig:
        """The schedule that candidates are measured under."""
        return LayerParallelConfig(
            groups=(tuple(range(self.group_size)),), schedule=self.schedule, bypass=self.bypass
        )


class Measurement(BaseModel):
    """One partition and its damage."""

    model_config = ConfigDict(frozen=True)

    groups: Groups
    depth: int = Field(description="Sequential steps: layers minus those the groups save.")
    kl: float = Field(description="Mean KL to the original model, nats per token.")


class SearchResult(BaseModel):
    """The chosen partition and everything that was measured on the way."""

    best: Measurement
    singles: tuple[Measurement, ...] = Field(description="Every group alone.")
    frontier: tuple[Measurement, ...] = Field(description="One partition per number of groups.")
    contiguous: tuple[Measurement, ...] = Field(
        description="Ranges of as many groups as the result has, and the shorter ranges with the "
        "same end as the best of them."
    )
    cosine: tuple[float, ...] = Field(
        description="Mean cosine similarity of the inputs of layers l and l + 1, for each l."
    )
    evaluations: int
    seconds: float

    @property
    def best_contiguous(self) -> Measurement | None:
        """The least harmful contiguous range at the result's depth, if any fits."""
        same = [item for item in self.contiguous if item.depth == self.best.depth]
        return min(same, key=_rank, default=None)


class DamageMeter:
    """Measures partitions of one model on fixed tokens, in fp32.

    Hidden states after every unit are kept, least recently used first out, so a candidate costs
    only the units behind the point where it departs from one seen before.

    Args:
        model: the original model, in fp32.
        tokens: `[B, S]` calibration token ids.
        execution: schedule and bypass of the groups.
    """

    def __init__(self, model: Any, tokens: Tensor, execution: LayerParallelConfig) -> None:
        self._decoder = ReferenceDecoder(model)
        self._execution = execution
        self._states: OrderedDict[Groups, Tensor] = OrderedDict()
        self.num_layers = len(self._decoder.layers)
        with torch.inference_mode(), _evaluation_threads():
            self._embedded, self._context = self._decoder.embed(tokens)
            self._inputs = [self._embedded]
            for layer in range(self.num_layers):
                unit = Unit((layer,))
                self._inputs.append(self._run(unit, self._inputs[-1]))
            self._teacher = [
                torch.log_softmax(self._decoder.logits(chunk), -1)
                for chunk in self._chunks(self._inputs[-1])
            ]

    def kl(self, groups: Groups) -> float:
        """Mean KL(original || grouped) per token, in nats."""
        with torch.inference_mode(), _evaluation_threads():
            hidden = self._final_hidden(partition_units(groups, self.num_layers))
            total = torch.zeros((), dtype=torch.float64)
            for teacher, chunk in zip(self._teacher, self._chunks(hidden), strict=True):
                student = torch.log_softmax(self._decoder.logits(chunk), -1)
                total += (teacher.exp() * (teacher - student)).sum(-1).double().sum()
            return float(total) / hidden[..., 0].numel()

    def cosine(self) -> tuple[float, ...]:
        """Mean cosine similarity of the inputs of layers `l` and `l + 1`, for each `l < L - 1`."""
        inputs = self._inputs[: self.num_layers]
        return tuple(
            float(torch.cosine_similarity(a, b, dim=-1).mean()) for a, b in pairwise(inputs)
        )

    def _run(self, unit: Unit, hidden: Tensor) -> Tensor:
        return self._decoder.run((unit,), hidden, self._context, self._execution)

    def _final_hidden(self, units: Sequence[Unit]) -> Tensor:
        path = tuple(unit.layers for unit in units)
        hidden, done = self._resume(path)
        for i in range(done, len(units)):
            hidden = self._run(units[i], hidden)
            self._keep(path[: i + 1], hidden)
        return hidden

    def _resume(self, path: Groups) -> tuple[Tensor, int]:
        """The furthest known state on `path`, and the number of units behind it."""
        sequential = next((i for i, unit in enumerate(path) if len(unit) > 1), len(path))
        for done in range(len(path), sequential, -1):
            if path[:done] in self._states:
                self._states.move_to_end(path[:done])
                return self._states[path[:done]], done
        return self._inputs[sequential], sequential

    def _keep(self, path: Groups, hidden: Tensor) -> None:
        self._states[path] = hidden
        while len(self._states) * hidden.nbytes > CACHE_BYTES:
            self._states.popitem(last=False)

    @staticmethod
    def _chunks(hidden: Tensor) -> tuple[Tensor, ...]:
        return hidden.flatten(0, 1).split(LOGITS_CHUNK)


class Evaluator(Protocol):
    """Measures many partitions; the order of the answers is that of the questions."""

    num_layers: int

    def measure(self, candidates: Sequence[Groups]) -> Iterator[float]:
        """Yield the damage of each candidate, nats per token."""
        ...

    def cosine(self) -> tuple[float, ...]:
        """See `DamageMeter.cosine`."""
        ...


class LocalEvaluator:
    """Measures in this process."""

    def __init__(self, meter: DamageMeter) -> None:
        self._meter = meter
        self.num_layers = meter.num_layers

    def measure(self, candidates: Sequence[Groups]) -> Iterator[float]:
        """Yield the damage of each candidate, nats per token."""
        return map(self._meter.kl, candidates)

    def cosine(self) -> tuple[float, ...]:
        """See `DamageMeter.cosine`."""
        return self._meter.cosine()


def search_partition(evaluator: Evaluator, settings: SearchSettings) -> SearchResult:
    """Find the groups that hurt least.

    Deterministic: damages are compared at five significant digits, ties go to lower layers.

    Raises:
        ConfigError: for a depth that cannot be reached, or a damage below that of every group.
    """
    return _Search(evaluator, settings).run()


def partition_units(groups: Groups, num_layers: int) -> tuple[Unit, ...]:
    """All units of a model with these groups, in order."""
    if not groups:
        return tuple(Unit((layer,)) for layer in range(num_layers))
    config = EfficiencyConfig(layer_parallel=LayerParallelConfig(groups=groups))
    return build_plan(config, num_layers).units


def group_sizes(settings: SearchSettings, num_layers: int) -> list[int]:
    """Sizes of the groups to form, in the order in which they are added.

    A depth that groups of one size do not hit exactly takes one smaller group, the last.

    Raises:
        ConfigError: for a depth that groups of this size cannot reach.
    """
    size, depth = settings.group_size, settings.target_depth
    if size > num_layers:
        raise ConfigError(f"--group-size {size} exceeds the model's {num_layers} layers")
    if depth is None:
        return [size] * (num_layers // size)
    if depth >= num_layers:
        raise ConfigError(
            f"--target-depth {depth} saves nothing: the model has {num_layers} layers"
        )
    full, rest = divmod(num_layers - depth, size - 1)
    sizes = [size] * full + ([rest + 1] if rest else [])
    if sum(sizes) > num_layers:
        groups, rest = divmod(num_layers, size)
        least = groups + min(rest, 1)
        raise ConfigError(
            f"--target-depth {depth} is out of reach with groups of {size}: "
            f"{num_layers} layers allow a depth of {least} at least"
        )
    return sizes


class _Search:
    """The state of one search: what has been measured so far."""

    def __init__(self, evaluator: Evaluator, settings: SearchSettings) -> None:
        self.evaluator = evaluator
        self.settings = settings
        self.num_layers = evaluator.num_layers
        self.sizes = group_sizes(settings, self.num_layers)
        self.known: dict[Groups, Measurement] = {}
        self.single_rank: dict[Group, tuple[float, Groups]] = {}

    def run(self) -> SearchResult:
        started = time.monotonic()
        singles = self._measure_singles()
        frontier = self._grow()
        best = self._refine(frontier[-1])
        contiguous = self._contiguous(len(best.groups))
        if contiguous and _rank(contiguous[0]) < _rank(best):
            best = self._refine(contiguous[0])
        frontier[-1] = best
        return SearchResult(
            best=best,
            singles=tuple(singles),
            frontier=tuple(frontier),
            contiguous=(*contiguous, *self._shorter_ranges(contiguous)),
            cosine=self.evaluator.cosine(),
            evaluations=len(self.known),
            seconds=time.monotonic() - started,
        )

    def _measure(self, candidates: Iterable[Groups], what: str) -> list[Measurement]:
        """Measure candidates, each at most once per search; best first."""
        wanted = sorted(set(candidates))
        missing = [groups for groups in wanted if groups not in self.known]
        damages = tqdm(
            self.evaluator.measure(missing),
            desc=f"search: {what}",
            total=len(missing),
            unit="partition",
            leave=False,
            disable=not missing,
        )
        for groups, kl in zip(missing, damages, strict=True):
            depth = self.num_layers - sum(len(group) - 1 for group in groups)
            self.known[groups] = Measurement(groups=groups, depth=depth, kl=kl)
        return sorted((self.known[groups] for groups in wanted), key=_rank)

    def _measure_singles(self) -> list[Measurement]:
        alone = [(group,) for size in set(self.sizes) for group in self._all_groups(size)]
        singles = self._measure(alone, "each group alone")
        self.single_rank = {item.groups[0]: _rank(item) for item in singles}
        return sorted(singles, key=lambda item: item.groups)

    def _all_groups(self, size: int) -> list[Group]:
        return [tuple(range(first, first + size)) for first in range(self.num_layers - size + 1)]

    def _promising(self, groups: Groups, size: int, count: int) -> list[Group]:
        """The `count` least harmful groups of `size` layers that `groups` leave room for."""
        taken = {layer for group in groups for layer in group}
        free = [group for group in self._all_groups(size) if not taken & set(group)]
        return sorted(free, key=self.single_rank.__getitem__)[:count]

    def _grow(self) -> list[Measurement]:
        """Add one group at a time; the best partition for each number of groups.

        Raises:
            ConfigError: when no group stays below `max_kl`.
        """
        frontier: list[Measurement] = []
        limit = self.settings.max_kl
        for count, size in enumerate(self.sizes, start=1):
            groups = frontier[-1].groups if frontier else ()
            room = self._promising(groups, size, self.settings.candidates)
            measured = self._measure(
                (_with(groups, group) for group in room), f"growing to {count} groups"
            )
            # Greedy growth can cut the free layers into pieces too short for another group.
            best = measured[0] if measured else None
            if best is None or (limit is not None and best.kl > limit):
                best = self._best_range(count, best)
            if limit is not None and (best is None or best.kl > limit):
                break
            if best is None:
                raise ConfigError(f"no room for {count} groups of {size} layers")
            frontier.append(best)
        if not frontier:
            least = min(self.single_rank.values())
            raise ConfigError(
                f"--max-kl {limit} is below the damage of every group; "
                f"the least harmful, {list(least[1][0])}, costs {least[0]:.5g}"
            )
        return frontier

    def _best_range(self, count: int, best: Measurement | None) -> Measurement | None:
        """The better of `best` and all contiguous ranges, refined."""
        rivals = self._contiguous(count)[:1] + ([best] if best else [])
        return self._refine(min(rivals, key=_rank)) if rivals else None

    def _contiguous(self, count: int) -> list[Measurement]:
        """Every run of `count` adjacent groups, least harmful first."""
        sizes = self.sizes[:count]
        starts = range(self.num_layers - sum(sizes) + 1)
        return self._measure((_range(first, sizes) for first in starts), "contiguous ranges")

    def _shorter_ranges(self, contiguous: Sequence[Measurement]) -> list[Measurement]:
        """For the plot: ranges of fewer groups that end where the best range ends."""
        if not contiguous:
            return []
        groups = contiguous[0].groups
        shorter = [groups[i:] for i in range(1, len(groups))]
        return self._measure(shorter, "shorter ranges")

    def _refine(self, start: Measurement) -> Measurement:
        """Move one group, or one run of touching groups, at a time while the damage falls."""
        best = start
        for turn in range(1, self.settings.refinements + 1):
            measured = self._measure(self._moves(best.groups), f"refining, round {turn}")
            if not measured or _rank(measured[0])[0] >= _rank(best)[0]:
                break
            best = measured[0]
        return best

    def _moves(self, groups: Groups) -> set[Groups]:
        moves: set[Groups] = set()
        for i, group in enumerate(groups):
            others = groups[:i] + groups[i + 1 :]
            elsewhere = self._promising(others, len(group), 4)
            nearby = (_shift(group, step) for step in (-1, 1))
            moves.update(_with(others, new) for new in (*elsewhere, *nearby))
        for first, last in _touching_runs(groups):
            for step in (-1, 1):
                shifted = tuple(_shift(group, step) for group in groups[first:last])
                moves.add(groups[:first] + shifted + groups[last:])
        return {move for move in moves if move != groups and self._is_legal(move)}

    def _is_legal(self, groups: Groups) -> bool:
        layers = [layer for group in groups for layer in group]
        return layers == sorted(set(layers)) and layers[0] >= 0 and layers[-1] < self.num_layers


def _rank(item: Measurement) -> tuple[float, Groups]:
    """Sort key: damage at five significant digits, then lower layers first."""
    return float(f"{item.kl:.4e}"), item.groups


def _with(groups: Groups, group: Group) -> Groups:
    return tuple(sorted((*groups, group)))


def _shift(group: Group, step: int) -> Group:
    return tuple(layer + step for layer in group)


def _range(first: int, sizes: Sequence[int]) -> Groups:
    groups = []
    for size in sizes:
        groups.append(tuple(range(first, first + size)))
        first += size
    return tuple(groups)


def _touching_runs(groups: Groups) -> Iterator[tuple[int, int]]:
    """Index ranges of groups without a layer between them."""
    first = 0
    for i in range(1, len(groups) + 1):
        if i == len(groups) or groups[i][0] != groups[i - 1][-1] + 1:
            yield first, i
            first = i


@contextmanager
def _evaluation_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(EVALUATION_THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(before)
