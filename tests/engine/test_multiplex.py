"""Classifiers that merge sequences in vLLM, against the same in plain PyTorch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.test_joint_exit import JOINT, tensors
from tests.engine.test_joint_exit import reference as exits_reference
from tests.tiny import CLASSES, LAYERS, VOCAB, engine
from vllm_effplugin.config import EfficiencyConfig
from vllm_effplugin.config.checkpoint import write_checkpoint
from vllm_effplugin.preparation.backbone import load_backbone
from vllm_effplugin.preparation.classifier import own_head
from vllm_effplugin.techniques.multiplex.config import MULTIPLEXERS
from vllm_effplugin.techniques.multiplex.grouping import form_groups
from vllm_effplugin.techniques.multiplex.layers import multiplexers
from vllm_effplugin.techniques.multiplex.reference import ReferenceMultiplexer
from vllm_effplugin.techniques.multiplex.request import multiplex_pooling_params

HIDDEN = 128
TOLERANCE = 1e-4
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Bert")


def prompts(count: int = 24, longest: int = 60, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [
        [rng.randrange(3, VOCAB) for _ in range(rng.randrange(1, longest))] for _ in range(count)
    ]


def trained(sizes: Sequence[int]) -> dict[str, torch.Tensor]:
    """Random multiplexers, as in a checkpoint."""
    torch.manual_seed(2)
    state = multiplexers(HIDDEN, sizes).state_dict()
    return {
        f"{MULTIPLEXERS}.{name}": torch.randn_like(t)
        * (0.2 if t.ndim == 1 else 1.5 / t.shape[1] ** 0.5)
        for name, t in state.items()
    }


@contextmanager
def serving(base: Path, folder: Path, block: dict[str, Any], **options: Any) -> Iterator[Any]:
    """The classifier with merging, and with exits where `block` has them."""
    efficiency = EfficiencyConfig.model_validate(block)
    assert efficiency.multiplex is not None
    extra = trained(efficiency.multiplex.sizes)
    if efficiency.joint_exit is not None:
        extra |= tensors(efficiency.joint_exit)
    write_checkpoint(base, folder, efficiency, tensors=extra, provenance={})
    with engine(folder, **{"max_num_batched_tokens": 8192, **options}) as llm:
        yield llm


def reference(base: Path, depth: int, sizes: Sequence[int]) -> ReferenceMultiplexer:
    family = "Bert" if "Bert" in (base / "config.json").read_text() else "Llama"
    head = own_head(base, {"architectures": [f"{family}ForSequenceClassification"]})
    assert head is not None
    backbone = load_backbone(base, family, torch.float32)
    return ReferenceMultiplexer(backbone, head, depth, trained(sizes))


def classify(
    llm: Any, sequences: list[list[int]], params: Any = None
) -> list[tuple[list[float], int]]:
    """Probabilities of each sequence, and how many ran as one with it."""
    outputs = llm.encode(
        [{"prompt_token_ids": ids} for ids in sequences],
        pooling_task="classify",
        pooling_params=multiplex_pooling_params(mux_report=True) if params is None else params,
        use_tqdm=False,
    )
    rows = [output.outputs.data.tolist() for output in outputs]
    return [(row[:CLASSES], round(row[-1])) for row in rows]


def expected(
    plain: ReferenceMultiplexer,
    ids: list[list[int]],
    sizes: Sequence[int],
    tenants: list[str | None] | None = None,
) -> list[tuple[list[float], int]]:
    """What one step with all of them gives."""
    tenants = ["x"] * len(ids) if tenants is None else tenants
    found: dict[int, tuple[list[float], int]] = {}
    for group in form_groups([len(each) for each in ids], tenants, sizes):
        for row, probs in zip(group, plain([ids[row] for row in group]), strict=True):
            found[row] = probs, len(group)
    for row, each in enumerate(ids):
        if row not in found:
            found[row] = plain([each])[0], 1
    return [found[row] for row in range(len(ids))]


def compare(found: list[tuple[list[float], int]], wanted: list[tuple[list[float], int]]) -> None:
    assert [size for _, size in found] == [size for _, size in wanted]
    for (ours, _), (theirs, _) in zip(found, wanted, strict=True):
        assert ours == pytest.approx(theirs, abs=TOLERANCE)


def block(depth: int = 4, sizes: Sequence[int] = (2,), **changes: Any) -> dict[str, Any]:
    return {"multiplex": {"depth": depth, "sizes": list(sizes), **changes}}


@pytest.mark.works("multiplex", "V1 on CPU")
@pytest.mark.parametrize("family", FAMILIES)
def test_as_in_pytorch(classifier, tmp_path, family):
    """Mixed lengths in one step, merged and alone."""
    base, ids = classifier(family), prompts(23)
    plain = reference(base, 4, (2,))
    wanted = expected(plain, ids, (2,))
    assert [size for _, size in wanted].count(1) == 1
    with serving(base, tmp_path / "mux", block()) as llm:
        compare(classify(llm, ids), wanted)
        # Merging matters: alone, the answers are others.
        stock = [plain([each])[0] for each in ids]
        assert (
            max(
                abs(a - b)
                for (p, _), q in zip(wanted, stock, strict=True)
                for a, b in zip(p, q, strict=True)
            )
            > 0.05
        )


@pytest.mark.parametrize(
    ("family", "depth", "sizes"),
    [
        ("Llama", 0, (2,)),
        ("Bert", 0, (3,)),
        ("Llama", 11, (4,)),
        ("Qwen2", 4, (2, 3, 4)),
        ("Llama", 6, (8,)),
    ],
)
def test_depths_and_sizes(classifier, tmp_path, family, depth, sizes):
    """Three does not divide the hidden size."""
    base, ids = classifier(family), prompts(21, 300)
    with serving(base, tmp_path / "mux", block(depth, sizes)) as llm:
        compare(classify(llm, ids), expected(reference(base, depth, sizes), ids, sizes))


@pytest.mark.works("multiplex", "compiled")
@pytest.mark.parametrize("family", ["Llama", "Bert"])
def test_compiled(classifier, tmp_path, family):
    """As users run it; the other tests are eager."""
    base, ids = classifier(family), prompts()
    with serving(base, tmp_path / "mux", block(), enforce_eager=False) as llm:
        compare(classify(llm, ids), expected(reference(base, 4, (2,)), ids, (2,)))


@pytest.mark.parametrize("family", FAMILIES)
def test_without_company_it_is_the_stock_classifier(classifier, tmp_path, family):
    """Bit for bit, where nobody may merge."""
    base, ids = classifier(family), prompts()
    with engine(base) as llm:
        outputs = llm.classify([{"prompt_token_ids": each} for each in ids], use_tqdm=False)
        stock = [output.outputs.probs for output in outputs]
    alone = multiplex_pooling_params(mux=False, mux_report=True)
    with serving(base, tmp_path / "mux", block()) as llm:
        assert classify(llm, ids, alone) == [(probs, 1) for probs in stock]
        [(probs, size)] = classify(llm, ids[:1])
        assert (probs, size) == (pytest.approx(stock[0], abs=TOLERANCE), 1)


def test_who_merges_with_whom(classifier, tmp_path):
    """Tenants stay among themselves; who refuses runs alone, beside others that merge."""
    base, ids = classifier("Llama"), prompts()
    rng = random.Random(5)
    tenants = [rng.choice(["a", "b", None]) for _ in ids]
    params = [
        multiplex_pooling_params(mux=tenant is not None, mux_group=tenant, mux_report=True)
        for tenant in tenants
    ]
    plain = reference(base, 4, (2,))
    with serving(base, tmp_path / "mux", block()) as llm:
        compare(classify(llm, ids, params), expected(plain, ids, (2,), tenants))
    with serving(base, tmp_path / "keyed", block(without_group="alone")) as llm:
        assert {size for _, size in classify(llm, ids)} == {1}
        own = multiplex_pooling_params(mux_group="a", mux_report=True)
        compare(classify(llm, ids, own), expected(plain, ids, (2,)))


@pytest.mark.works("multiplex", "joint_exit")
@pytest.mark.parametrize(("family", "depth"), [("Llama", 9), ("Llama", 10), ("Bert", 9)])
def test_exits_before_merging(classifier, tmp_path, family, depth):
    """The confident leave, the others merge; the last exit may be where they do."""
    base, ids = classifier(family), prompts(40)
    early = exits_reference(base, JOINT)
    answers = [early(each) for each in ids]
    stay = [row for row, (_, layers) in enumerate(answers) if layers == LAYERS]
    assert 4 < len(stay) < 36
    merged = expected(reference(base, depth, (2,)), [ids[row] for row in stay], (2,))
    wanted = [(probs, 1) for probs, _ in answers]
    for row, each in zip(stay, merged, strict=True):
        wanted[row] = each
    with serving(base, tmp_path / "both", block(depth) | {"joint_exit": JOINT}) as llm:
        compare(classify(llm, ids), wanted)
        [totals] = llm.collective_rpc("loop_counters")
        assert totals["sequences"][-1] == len(stay)
        assert totals["merged"][0] == sum(size == 2 for _, size in merged)


@pytest.mark.works("multiplex", "tensor parallelism")
def test_two_ranks(classifier, tmp_path):
    base, ids = classifier("Llama"), prompts()
    with serving(base, tmp_path / "mux", block(), tp=2) as llm:
        compare(classify(llm, ids), expected(reference(base, 4, (2,)), ids, (2,)))


@pytest.mark.works("multiplex", "chunked prefill", "async scheduling", "prefix caching")
@pytest.mark.parametrize(
    "options",
    [
        {"max_num_batched_tokens": 128, "max_num_seqs": 8, "enable_chunked_prefill": True},
        {"async_scheduling": True},
        {"enable_prefix_caching": True, "block_size": 32},
    ],
    ids=["chunked", "async", "prefix-caching"],
)
def test_with_what_vllm_does(classifier, tmp_path, options):
    """Whatever the steps are: an answer is that of some company, or of none."""
    base, ids = classifier("Llama"), prompts(14, 150)
    plain = reference(base, 4, (2,))
    alone = [plain([each])[0] for each in ids]
    with serving(base, tmp_path / "mux", block(), **options) as llm:
        for _ in range(2):
            found = classify(llm, ids)
            for row, (probs, size) in enumerate(found):
                if size == 1:
                    assert probs == pytest.approx(alone[row], abs=TOLERANCE)
                else:
                    assert any(
                        probs == pytest.approx(p, abs=TOLERANCE)
                        for other, each in enumerate(ids)
                        if other != row
                        for p in (plain([ids[row], each])[0], plain([each, ids[row]])[1])
                    )
        if "max_num_batched_tokens" in options:
            long = [size for each, (_, size) in zip(ids, found, strict=True) if len(each) > 128]
            assert set(long) == {1}, "a prompt in several steps cannot merge"
        assert 2 in [size for _, size in found]


def test_totals(classifier, tmp_path):
    base, ids = classifier("Llama"), prompts(9)
    with serving(base, tmp_path / "mux", block(4, (2, 4))) as llm:
        found = classify(llm, ids)
        [totals] = llm.collective_rpc("loop_counters")
        sizes = [size for _, size in found]
        assert totals["merged"] == [sizes.count(2), sizes.count(4)]
        assert totals["alone"] == sizes.count(1)
        assert sum(totals["sequences"]) == len(ids)
        groups = form_groups([len(each) for each in ids], ["x"] * 9, (2, 4))
        lengths = [[len(ids[row]) for row in group] for group in groups]
        assert totals["member_tokens"] == sum(map(sum, lengths))
        assert totals["slot_tokens"] == sum(len(each) * max(each) for each in lengths)
        alone = sum(len(each) for each, size in zip(ids, sizes, strict=True) if size == 1)
        upper = alone + sum(map(max, lengths))
        assert totals["layer_tokens"] == 4 * sum(map(len, ids)) + 8 * upper


def test_a_full_queue_leaves_nobody_over(classifier, tmp_path):
    """Steps of five places take four, as long as more wait."""
    base = classifier("Llama")
    ids = [[7] * 20 for _ in range(22)]
    with serving(base, tmp_path / "mux", block(4, (4,)), max_num_seqs=5) as llm:
        sizes = [size for _, size in classify(llm, ids)]
        assert sizes == [4] * 20 + [1, 1]
        counters = llm.llm_engine.engine_core.engine_core.scheduler.counters
        assert (counters["passed_over"], counters["held"]) == (5, 0)
        assert counters["held_us"] > 0


def test_a_lonely_request_is_held_back_and_counted(classifier, tmp_path):
    """Where others came lately, one that is alone waits for the next, but no longer than told."""
    base = classifier("Llama")
    with serving(base, tmp_path / "mux", block(4, (2,), max_wait_ms=200)) as llm:
        classify(llm, [[7] * 100] * 8)
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        scheduler._layer_token = 1.0  # a machine so slow that any wait pays
        before = dict(scheduler.counters.as_dict())
        assert [size for _, size in classify(llm, [[7] * 100] * 3)] == [2, 2, 1]
        [(_, size)] = classify(llm, [[7] * 100])
        after = scheduler.counters.as_dict()
    assert size == 1
    assert after["held"] > before["held"]
    assert 0 < after["held_us"] - before["held_us"] < 2 * 200_000


def test_random_schedules(classifier, tmp_path):
    """Arrivals, wishes, lengths and aborts: nobody is lost, doubled or starved."""
    base = classifier("Llama")
    rng = random.Random(0)
    options = {"max_num_batched_tokens": 128, "max_num_seqs": 6, "max_model_len": 128}
    with serving(base, tmp_path / "mux", block(4, (2, 3), max_wait_ms=1), **options) as llm:
        numbers = iter(range(10**9))
        for _ in range(1000):
            run_schedule(llm.llm_engine, rng, numbers)


def run_schedule(vllm_engine: Any, rng: random.Random, numbers: Iterator[int]) -> None:
    arrivals = sorted(
        (rng.randrange(6), str(next(numbers)), rng.randrange(1, 60), rng.choice(["a", "b", None]))
        for _ in range(rng.randrange(1, 14))
    )
    victims = {name: at + rng.randrange(3) for at, name, _, _ in arrivals if rng.random() < 0.1}
    names = {name for _, name, _, _ in arrivals}
    finished: list[str] = []
    step = 0
    while arrivals or vllm_engine.has_unfinished_requests():
        while arrivals and arrivals[0][0] <= step:
            _, name, length, tenant = arrivals.pop(0)
            asked = multiplex_pooling_params(
                mux=rng.random() < 0.8, mux_group=tenant, mux_report=True
            )
            asked.task = "classify"
            vllm_engine.add_request(name, {"prompt_token_ids": [5] * length}, asked)
        for name in [name for name, at in victims.items() if at == step]:
            vllm_engine.abort_request([name])
        for output in vllm_engine.step():
            assert output.finished
            row = output.outputs.data.tolist()
            assert sum(row[:CLASSES]) == pytest.approx(1, abs=1e-4)
            assert round(row[-1]) in (1, 2, 3)
            finished.append(output.request_id)
        step += 1
        assert step < 2000, "starved"
    assert len(finished) == len(set(finished))
    assert names - victims.keys() <= set(finished) <= names
