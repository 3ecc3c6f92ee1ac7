"""The partition search: its damage measure, its result, and Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from tests.tiny import FAMILIES, LAYERS, VOCAB
from vllm_effplugin.errors import ConfigError
from vllm_effplugin.preparation.base import load_model
from vllm_effplugin.techniques.layer_parallel import ray_search, search
from vllm_effplugin.techniques.layer_parallel.config import LayerParallelConfig
from vllm_effplugin.techniques.layer_parallel.ray_search import open_evaluator
from vllm_effplugin.techniques.layer_parallel.reference import ReferenceDecoder
from vllm_effplugin.techniques.layer_parallel.search import (
    DamageMeter,
    Groups,
    LocalEvaluator,
    SearchSettings,
    partition_units,
    search_partition,
)

Tiny = Callable[..., Path]
TOKENS = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(2))


class Table:
    """An evaluator whose damages are a function of the groups."""

    def __init__(self, num_layers: int, damage: Callable[[Groups], float]) -> None:
        self.num_layers = num_layers
        self.damage = damage
        self.asked: list[Groups] = []

    def measure(self, candidates: Sequence[Groups]) -> Iterator[float]:
        for groups in candidates:
            self.asked.append(groups)
            yield self.damage(groups)

    def cosine(self) -> tuple[float, ...]:
        return (1.0,) * (self.num_layers - 1)


def contiguous(num_layers: int, count: int, size: int) -> list[Groups]:
    return [
        tuple(tuple(range(s + i * size, s + (i + 1) * size)) for i in range(count))
        for s in range(num_layers - count * size + 1)
    ]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_damage_is_the_mean_kl(tiny: Tiny, family: str) -> None:
    model = load_model(tiny(family))
    groups = ((2, 3, 4), (7, 8, 9))
    config = LayerParallelConfig(groups=groups, bypass=1)
    meter = DamageMeter(model, TOKENS, config)
    teacher = torch.log_softmax(model(TOKENS).logits, -1)
    student = ReferenceDecoder(model)(TOKENS, partition_units(groups, LAYERS), config)
    student = torch.log_softmax(student, -1)
    expected = float((teacher.exp() * (teacher - student)).sum(-1).mean())
    assert expected > 1e-3
    assert meter.kl(groups) == pytest.approx(expected, rel=1e-4)
    assert meter.kl(()) == pytest.approx(0, abs=1e-6)


def test_kept_states_do_not_change_the_damage(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(tiny())
    execution = LayerParallelConfig(groups=((0, 1),))
    asked: list[Groups] = [((2, 3),), ((2, 3), (8, 9)), ((2, 3), (6, 7), (8, 9)), ((2, 3),)]
    warm = DamageMeter(model, TOKENS, execution)
    kept = [warm.kl(groups) for groups in asked]
    monkeypatch.setattr(search, "CACHE_BYTES", 0)
    cold = DamageMeter(model, TOKENS, execution)
    assert [cold.kl(groups) for groups in asked] == kept
    assert len(set(kept)) == 3


def test_cosine_of_adjacent_inputs(tiny: Tiny) -> None:
    model = load_model(tiny())
    states = model(TOKENS, output_hidden_states=True).hidden_states
    expected = [
        float(torch.cosine_similarity(states[i], states[i + 1], dim=-1).mean())
        for i in range(LAYERS - 1)
    ]
    meter = DamageMeter(model, TOKENS, LayerParallelConfig(groups=((0, 1),)))
    assert meter.cosine() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("size", "depth", "sizes"), [(2, 8, [2] * 4), (3, 7, [2, 3, 3])])
def test_beats_every_contiguous_range(tiny: Tiny, size: int, depth: int, sizes: list[int]) -> None:
    settings = SearchSettings(target_depth=depth, group_size=size, candidates=2, refinements=1)
    meter = DamageMeter(load_model(tiny()), TOKENS, settings.execution())
    result = search_partition(LocalEvaluator(meter), settings)
    assert result.best.depth == depth == len(partition_units(result.best.groups, LAYERS))
    assert sorted(map(len, result.best.groups)) == sizes
    assert result.best.kl == meter.kl(result.best.groups)
    if size == 2:
        rivals = [meter.kl(groups) for groups in contiguous(LAYERS, 4, 2)]
        assert result.best_contiguous is not None
        assert result.best_contiguous.kl == min(rivals)
        assert result.best.kl <= min(rivals)


def test_a_range_that_greed_misses_still_wins() -> None:
    """Each group of the good range looks worst alone, so growth never tries it."""
    good: Groups = ((3, 4), (5, 6), (7, 8))

    def damage(groups: Groups) -> float:
        if groups == good:
            return 0.001
        return sum(1.0 + (group[0] in (3, 5, 7)) for group in groups)

    settings = SearchSettings(target_depth=9, candidates=1, refinements=0)
    assert search_partition(Table(LAYERS, damage), settings).best.groups == good


def test_refinement_moves_a_group() -> None:
    """Growth starts with the best single group, which the best pair does not contain."""

    def damage(groups: Groups) -> float:
        starts = [group[0] for group in groups]
        alone = {4: 0.1, 0: 0.2, 9: 0.3}
        return 0.05 if starts == [0, 9] else sum(alone.get(start, 1.0) for start in starts)

    rough = SearchSettings(target_depth=10, refinements=0)
    assert search_partition(Table(LAYERS, damage), rough).best.groups == ((0, 1), (4, 5))
    fine = SearchSettings(target_depth=10, refinements=1)
    assert search_partition(Table(LAYERS, damage), fine).best.groups == ((0, 1), (9, 10))


def test_ties_go_to_lower_layers_and_nothing_is_measured_twice() -> None:
    def damage(groups: Groups) -> float:
        noise = 1e-7 * groups[0][0]  # favours no group at five significant digits
        return len(groups) * (1 - noise)

    table = Table(LAYERS, damage)
    result = search_partition(table, SearchSettings(target_depth=10))
    assert result.best.groups == ((0, 1), (2, 3))
    assert len(table.asked) == len(set(table.asked)) == result.evaluations


def test_full_coverage_is_found_though_greed_gets_stuck() -> None:
    """Layers 1-2 look best alone, but then six pairs no longer fit into twelve layers."""

    def damage(groups: Groups) -> float:
        return sum(0.1 if group[0] == 1 else 1.0 for group in groups)

    result = search_partition(Table(LAYERS, damage), SearchSettings(target_depth=6))
    assert result.best.groups == tuple((i, i + 1) for i in range(0, LAYERS, 2))


def test_max_kl_takes_as_many_groups_as_it_allows() -> None:
    table = Table(LAYERS, lambda groups: 0.1 * len(groups) ** 2)
    result = search_partition(table, SearchSettings(max_kl=0.95))
    assert len(result.best.groups) == 3
    assert [len(item.groups) for item in result.frontier] == [1, 2, 3]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (SearchSettings(max_kl=0.01), "below the damage of every group"),
        (SearchSettings(target_depth=12), "saves nothing"),
        (SearchSettings(target_depth=5), "a depth of 6 at least"),
        (SearchSettings(target_depth=2, group_size=4), "a depth of 3 at least"),
    ],
)
def test_impossible_goals_are_refused(settings: SearchSettings, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        search_partition(Table(LAYERS, lambda groups: float(len(groups))), settings)


@pytest.mark.parametrize(
    "fields", [{}, {"target_depth": 8, "max_kl": 0.1}, {"target_depth": 8, "group_size": 5}]
)
def test_settings_are_checked(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"either|group_size"):
        SearchSettings(**fields)


def test_without_ray_the_search_runs_here(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray_search.importlib.util, "find_spec", lambda name: None)
    execution = LayerParallelConfig(groups=((0, 1),))
    with open_evaluator(tiny(), load_model, TOKENS, execution, use_ray=True) as evaluator:
        assert isinstance(evaluator, LocalEvaluator)
    assert caplog.text.count("Ray is not installed") == 1


def test_ray_returns_the_same_partition(tiny: Tiny) -> None:
    ray = pytest.importorskip("ray")
    settings = SearchSettings(target_depth=9, candidates=3, refinements=1)
    results = []
    for use_ray in (False, True):
        with open_evaluator(
            tiny(), load_model, TOKENS, settings.execution(), use_ray=use_ray
        ) as evaluator:
            assert isinstance(evaluator, LocalEvaluator) != use_ray
            results.append(search_partition(evaluator, settings))
    here, there = results
    assert here.best.groups == there.best.groups
    assert here.best.kl == pytest.approx(there.best.kl, rel=1e-5)
    assert [item.groups for item in here.frontier] == [item.groups for item in there.frontier]
    assert here.cosine == pytest.approx(there.cosine, abs=1e-6)
    assert not ray.is_initialized()
