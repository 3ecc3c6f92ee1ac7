"""Classifiers with exits in vLLM, against the same in plain PyTorch."""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.v1.worker.gpu.cudagraph_utils import has_compiled_submodule

from tests.tiny import CLASSES, VOCAB, counters, engine
from vllm_effplugin.config import EfficiencyConfig
from vllm_effplugin.config.checkpoint import write_checkpoint
from vllm_effplugin.preparation.backbone import load_backbone
from vllm_effplugin.preparation.classifier import own_head
from vllm_effplugin.techniques.joint_exit.config import HEADS, JointExitConfig
from vllm_effplugin.techniques.joint_exit.reference import ReferenceClassifier
from vllm_effplugin.techniques.joint_exit.request import exit_pooling_params

DEPTHS = (3, 6, 9)
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Bert")
TOLERANCE = 1e-4

JOINT = {
    "exits": [
        {"depth": depth, "temperature": temperature}
        for depth, temperature in zip(DEPTHS, (1.5, 0.8, 1.0), strict=True)
    ]
}
CONFIDENCE = {
    "exits": [{"depth": depth, "threshold": 0.55} for depth in DEPTHS],
    "rule": "confidence",
}


def prompts(count: int = 24, longest: int = 60) -> list[list[int]]:
    rng = random.Random(0)
    return [
        [rng.randrange(3, VOCAB) for _ in range(rng.randrange(1, longest))] for _ in range(count)
    ]


def tensors(config: JointExitConfig, classes: int = CLASSES) -> dict[str, torch.Tensor]:
    """Random heads, and gates that let some sequences go at each exit."""
    torch.manual_seed(1)
    found = {
        name: torch.randn(shape) * (0.06 if name.endswith(".weight") else 0.1)
        for name, shape in config.tensors(128, classes).items()
    }
    if config.rule == "joint":
        count = len(config.exits)
        found[f"{HEADS}.gate_weight"] = torch.tensor([[4.0, -1.0, 3.0, 0.5]]).repeat(count, 1)
        found[f"{HEADS}.gate_bias"] = torch.tensor([-3.6, -3.5, -2.6])[:count]
    return found


def checkpoint(base: Path, out: Path, block: dict[str, Any], classes: int = CLASSES) -> Path:
    """The classifier with exits."""
    config = JointExitConfig.model_validate(block)
    efficiency = EfficiencyConfig(joint_exit=config)
    write_checkpoint(base, out, efficiency, tensors=tensors(config, classes), provenance={})
    return out


def reference(base: Path, block: dict[str, Any]) -> ReferenceClassifier:
    config = JointExitConfig.model_validate(block)
    architecture = "Bert" if (base / "config.json").read_text().count("Bert") else "Llama"
    head = own_head(base, {"architectures": [f"{architecture}ForSequenceClassification"]})
    assert head is not None
    return ReferenceClassifier(
        load_backbone(base, architecture, torch.float32), head, config, tensors(config)
    )


def classify(
    llm: Any, sequences: list[list[int]], params: Any = None
) -> list[tuple[list[float], int]]:
    """Probabilities and layers of each sequence."""
    outputs = llm.encode(
        [{"prompt_token_ids": ids} for ids in sequences],
        pooling_task="classify",
        pooling_params=exit_pooling_params(exit_report=True) if params is None else params,
        use_tqdm=False,
    )
    rows = [output.outputs.data.tolist() for output in outputs]
    return [(row[:CLASSES], round(row[CLASSES])) for row in rows]


def compare(found: list[tuple[list[float], int]], expected: list[tuple[list[float], int]]) -> None:
    assert [layers for _, layers in found] == [layers for _, layers in expected]
    for (ours, _), (theirs, _) in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=TOLERANCE)


@contextmanager
def serving(base: Path, folder: Path, block: dict[str, Any], **options: Any) -> Iterator[Any]:
    with engine(checkpoint(base, folder, block), **options) as llm:
        yield llm


@pytest.mark.works("joint_exit", "V1 on CPU")
@pytest.mark.parametrize("family", FAMILIES)
def test_as_in_pytorch(classifier, tmp_path, family):
    """Mixed lengths in one batch; each answer, and where it came from."""
    base, ids = classifier(family), prompts()
    plain = reference(base, JOINT)
    expected = [plain(each) for each in ids]
    depths = [layers for _, layers in expected]
    assert 12 in depths, "all left"
    assert len(set(depths)) > 1, "none left"
    with serving(base, tmp_path / "exits", JOINT) as llm:
        compare(classify(llm, ids), expected)
        earlier = [plain(each, bias=1.5) for each in ids]
        assert [layers for _, layers in earlier] != depths
        asked = exit_pooling_params(exit_bias=1.5, exit_report=True)
        compare(classify(llm, ids, asked), earlier)


@pytest.mark.parametrize("family", ["Llama", "Bert"])
def test_threshold_rule(classifier, tmp_path, family):
    base, ids = classifier(family), prompts()
    plain = reference(base, CONFIDENCE)
    expected = [plain(each) for each in ids]
    assert len({layers for _, layers in expected}) > 2
    with serving(base, tmp_path / "exits", CONFIDENCE) as llm:
        compare(classify(llm, ids), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_leaving_it_is_the_stock_classifier(classifier, tmp_path, family):
    base, ids = classifier(family), prompts()
    with engine(base) as llm:
        outputs = llm.classify([{"prompt_token_ids": each} for each in ids], use_tqdm=False)
        stock = [output.outputs.probs for output in outputs]
    with serving(base, tmp_path / "exits", JOINT) as llm:
        asked = exit_pooling_params(exit=False, exit_report=True)
        assert classify(llm, ids, asked) == [(probs, 12) for probs in stock]
        # As a client of the stock classifier asks, and beside others that leave.
        mixed = [exit_pooling_params(exit=i % 2 == 0, exit_report=True) for i in range(len(ids))]
        for (probs, layers), own, may in zip(classify(llm, ids, mixed), stock, mixed, strict=True):
            if not may.extra_kwargs["exit"]:
                assert layers == 12
                assert probs == pytest.approx(own, abs=TOLERANCE)


def test_answers_do_not_depend_on_companions(classifier, tmp_path):
    base, ids = classifier("Llama"), prompts()
    with serving(base, tmp_path / "exits", JOINT) as llm:
        together = classify(llm, ids)
        compare([classify(llm, [each])[0] for each in ids], together)
        shuffled = random.Random(1).sample(range(len(ids)), len(ids))
        again = classify(llm, [ids[i] for i in shuffled])
        compare(again, [together[i] for i in shuffled])


def test_a_text_that_overflows_harms_no_other(classifier, tmp_path):
    """Its answer is NaN, as the stock classifier's is."""
    from safetensors.torch import load_file, save_file

    base, ids = classifier("Llama"), prompts()
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight"][2] = torch.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    plain = reference(base, JOINT)
    with serving(broken, tmp_path / "exits", JOINT) as llm:
        found = classify(llm, [[5, 2, 9], *ids, [2]])
        compare(found[1:-1], [plain(each) for each in ids])
        assert all(math.isnan(p) for row, _ in (found[0], found[-1]) for p in row)
        [counted] = llm.collective_rpc("loop_counters")
        assert sum(counted["sequences"]) == len(found)


@pytest.mark.works("joint_exit", "compiled")
@pytest.mark.parametrize("family", ["Llama", "Bert"])
def test_compiled(classifier, tmp_path, family):
    """As users run it; the other tests are eager."""
    base, ids = classifier(family), prompts()
    plain = reference(base, JOINT)
    with serving(base, tmp_path / "exits", JOINT, enforce_eager=False) as llm:
        compare(classify(llm, ids), [plain(each) for each in ids])
        asked = exit_pooling_params(exit=False, exit_report=True)
        compare(classify(llm, ids, asked), [plain(each, exit=False) for each in ids])
        assert has_compiled_submodule(model_of(llm)), "vLLM would capture no CUDA graphs"


def model_of(llm: Any) -> Any:
    """The model inside an engine of this process."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    return worker.model_runner.get_model()


@pytest.mark.works("joint_exit", "V2 on CUDA")
@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["Llama", "Bert"])
def test_cuda_graphs(classifier, tmp_path, family):
    base, ids = classifier(family), prompts()
    plain = reference(base, JOINT)
    with serving(base, tmp_path / "exits", JOINT, enforce_eager=False) as llm:
        compare(classify(llm, ids), [plain(each) for each in ids])
        inputs = model_of(llm).loop.stack.graphs
        assert inputs.captured == set(inputs.sizes)
        assert inputs.captured


@pytest.mark.works("joint_exit", "chunked prefill")
def test_chunked_prefill(classifier, tmp_path):
    """A sequence leaves in the step that holds its last token, whatever ran of it before."""
    base, ids = classifier("Llama"), prompts(16, 200)
    plain = reference(base, JOINT)
    options = {"max_num_batched_tokens": 48, "max_num_seqs": 8, "enable_chunked_prefill": True}
    with serving(base, tmp_path / "exits", JOINT, **options) as llm:
        compare(classify(llm, ids), [plain(each) for each in ids])


@pytest.mark.works("joint_exit", "preemption")
def test_preempted_prompts(classifier, tmp_path):
    """Chunks whose cache was taken away run again."""
    base, ids = classifier("Llama"), prompts(24, 240)
    plain = reference(base, JOINT)
    options = {
        "max_num_batched_tokens": 64,
        "max_num_seqs": 16,
        "long_prefill_token_threshold": 16,  # several prompts at a time, a part of each
        "num_gpu_blocks_override": 9,
        "block_size": 32,
        "max_model_len": 256,
        "disable_log_stats": False,
    }
    with serving(base, tmp_path / "exits", JOINT, **options) as llm:
        compare(classify(llm, ids), [plain(each) for each in ids])
        assert counters(llm)["vllm:num_preemptions"] > 0, "the KV cache was not small enough"


@pytest.mark.works("joint_exit", "prefix caching")
def test_prefix_cache_has_no_entries_of_those_that_left(classifier, tmp_path):
    """What left has no entries behind its exit; a later request must not find them."""
    base = classifier("Llama")
    plain = reference(base, JOINT)
    rng = random.Random(3)
    shared = [rng.randrange(3, VOCAB) for _ in range(64)]
    ids = [shared + each for each in prompts(12, 20)]
    options = {"enable_prefix_caching": True, "block_size": 32, "disable_log_stats": False}
    with serving(base, tmp_path / "exits", JOINT, **options) as llm:
        for each in ids:  # one after another, so that each could find what the last one left
            compare(classify(llm, [each]), [plain(each)])
        assert counters(llm)["vllm:prefix_cache_hits"] == 0
        full = exit_pooling_params(exit=False, exit_report=True)
        for each in ids:
            compare(classify(llm, [each], full), [plain(each, exit=False)])
        assert counters(llm)["vllm:prefix_cache_hits"] >= 64 * (len(ids) - 1)


@pytest.mark.works("joint_exit", "tensor parallelism")
def test_two_ranks(classifier, tmp_path):
    base, ids = classifier("Llama"), prompts()
    plain = reference(base, JOINT)
    with serving(base, tmp_path / "exits", JOINT, tp=2) as llm:
        compare(classify(llm, ids), [plain(each) for each in ids])


def test_totals(classifier, tmp_path):
    base, ids = classifier("Llama"), prompts()
    with serving(base, tmp_path / "exits", JOINT) as llm:
        depths = [layers for _, layers in classify(llm, ids)]
        [totals] = llm.collective_rpc("loop_counters")
        assert totals["sequences"] == [depths.count(depth) for depth in (*DEPTHS, 12)]
        lengths = [len(each) for each in ids]
        assert totals["full_layer_tokens"] == 12 * sum(lengths)
        spent = sum(length * depth for length, depth in zip(lengths, depths, strict=True))
        assert totals["layer_tokens"] == spent
        assert all(
            c > n * 1e6 / CLASSES
            for c, n in zip(totals["confidence"], totals["sequences"], strict=True)
            if n
        )


def test_other_heads_at_run_time(classifier, tmp_path):
    """What `prepare` measures with: one engine, several operating points."""
    from safetensors.torch import save_file

    base, ids = classifier("Llama"), prompts()
    plain = reference(base, CONFIDENCE)
    config = JointExitConfig.model_validate(CONFIDENCE)
    save_file(tensors(config), tmp_path / "other.safetensors")
    with serving(base, tmp_path / "exits", JOINT) as llm:
        llm.collective_rpc(
            "set_classifier_exits",
            args=(config.model_dump_json(), str(tmp_path / "other.safetensors")),
        )
        compare(classify(llm, ids), [plain(each) for each in ids])


def test_a_request_that_cannot_be_understood():
    with pytest.raises(ValueError, match="exit_bias"):
        exit_pooling_params(exit_bias=float("nan"))
    with pytest.raises(ValueError, match="exit_bias"):
        exit_pooling_params(exit_bias="much")  # type: ignore[arg-type]
