"""Unsupported combinations are refused while the configuration is built, by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from vllm.config.compilation import CUDAGraphMode
from vllm.platforms import current_platform

from tests.engine.test_joint_exit import checkpoint
from tests.engine.test_multiplex import trained as random_multiplexers
from tests.matrix import TECHNIQUES
from tests.tiny import make_checkpoint, make_classifier, overrides
from vllm_effplugin.config import EfficiencyConfig, parse_efficiency
from vllm_effplugin.config.checkpoint import (
    base_tensors,
    replaced_tensor_names,
    write_checkpoint,
)
from vllm_effplugin.engine.admission import EfficiencyAdmission
from vllm_effplugin.engine.settings import SCHEDULER, UNTESTED, VERIFY, WORKERS
from vllm_effplugin.errors import ConfigError, UnsupportedError
from vllm_effplugin.techniques.early_exit.config import EarlyExitConfig
from vllm_effplugin.techniques.early_exit.exits import Exit

PAIRS = {"layer_parallel": {"groups": [[2, 3], [4, 5]]}}
EXITS = {"early_exit": {"exits": [{"depth": 4}]}}
HEADS = {"joint_exit": {"exits": [{"depth": 4}]}}
CONNECTOR = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
IDENTITY = "torch.nn.modules.linear.Identity"
NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
TRIPLES = {"layer_parallel": {"groups": [[2, 3, 4]]}}


def build(model: Path, family: str = "Llama", efficiency: dict | None = None, **options):
    """The configuration that `vllm serve` would build; starts nothing."""
    from vllm.engine.arg_utils import EngineArgs

    settings = {
        "skip_tokenizer_init": True,
        "max_model_len": 512,
        "hf_overrides": overrides(family, efficiency),
        **options,
    }
    return EngineArgs(model=str(model), **settings).create_engine_config()


@pytest.mark.refuses
@pytest.mark.parametrize(
    ("efficiency", "options", "named"),
    [
        (PAIRS, {"pipeline_parallel_size": 2}, "--pipeline-parallel-size 2"),
        (PAIRS, {"enable_lora": True}, "--enable-lora"),
        (PAIRS, {"quantization": "fp8"}, "quantization 'fp8'"),
        (
            PAIRS,
            {"kv_transfer_config": CONNECTOR},
            "--kv-transfer-config",
        ),
        (
            PAIRS,
            {"tensor_parallel_size": 2, "decode_context_parallel_size": 2},
            "--decode-context-parallel-size 2",
        ),
        (PAIRS, {"prefill_context_parallel_size": 2}, "--prefill-context-parallel-size 2"),
        (TRIPLES, {"tensor_parallel_size": 2}, r"--tensor-parallel-size 2.*\[2, 3, 4\].*fused"),
        (PAIRS, {"tensor_parallel_size": 4}, r"--tensor-parallel-size 4.*\[2, 3\]"),
        ({"layer_parallel": {"groups": [[11, 12]]}}, {}, r"\[11, 12\] is outside the model"),
        ({"layer_paralel": {}}, {}, "layer_paralel"),
        ({"layer_parallel": {"groups": [[2, 3]], "bypass": 2}}, {}, "bypass"),
        ({"layer_parallel": {"groups": [[2, 3]], "trained": True}}, {}, "is missing"),
        (EXITS, {"pipeline_parallel_size": 2}, "--pipeline-parallel-size 2"),
        (
            EXITS,
            {"tensor_parallel_size": 2, "decode_context_parallel_size": 2},
            "--decode-context-parallel-size 2",
        ),
        (EXITS, {"enable_lora": True}, "--enable-lora.*early exit"),
        (EXITS, {"quantization": "fp8"}, "quantization 'fp8'.*early exit"),
        (EXITS, {"kv_transfer_config": CONNECTOR}, "--kv-transfer-config.*early exit"),
        (EXITS, {"speculative_config": NGRAM}, "--speculative-config.*early exit"),
        (EXITS, {"worker_cls": "some.Worker"}, "--worker-cls some.Worker"),
        (
            EXITS,
            {"tensor_parallel_size": 2, "speculative_config": VERIFY},
            "verified early exits.*--tensor-parallel-size",
        ),
        (PAIRS, {"speculative_config": VERIFY}, "--speculative-config.*no exits"),
        (EXITS, {"kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill.*early exit"),
        (EXITS, {"kv_offloading_size": 1.0}, "--kv-offloading-size.*early exit"),
        (EXITS, {"scheduler_cls": "some.Scheduler"}, "--scheduler-cls.*early exit"),
        (EXITS, {"enable_prompt_embeds": True}, "--enable-prompt-embeds.*early exit"),
        ({**EXITS, "split_after": [6]}, {}, "split_after"),
        ({**EXITS, **PAIRS}, {"speculative_config": VERIFY}, "verified.*`layer_parallel`"),
        (
            {"early_exit": {"exits": [{"depth": 6}], "cache": "copy"}, **PAIRS},
            {},
            "'copy' is not supported with efficiency.layer_parallel.*`recompute`",
        ),
        (
            {"early_exit": {"exits": [{"depth": 6, "gate": "mamba"}]}, **PAIRS},
            {},
            "gates `mamba`.*efficiency.layer_parallel",
        ),
        ({"early_exit": {"exits": [{"depth": 3}]}, **PAIRS}, {}, r"inside the group \[2, 3\]"),
        ({"early_exit": {"exits": [{"depth": 12}]}}, {}, "depth 12.*12 layers"),
        ({"early_exit": {"exits": [{"depth": 4, "gate": "mlp"}]}}, {}, "tensors.*is missing"),
    ],
)
def test_refused(tiny, efficiency, options, named):
    with pytest.raises(ValueError, match=f"(?s){named}"):
        build(tiny(), efficiency=efficiency, **options)


GATES = {"exits": [{"depth": 4, "gate": "mamba"}]}


@pytest.mark.refuses
@pytest.mark.parametrize(
    ("family", "efficiency", "options", "named"),
    [
        pytest.param(
            *("Mamba2", PAIRS, {}, "layer_parallel is not supported on EfficientMamba2.*attention"),
            marks=pytest.mark.refuses("layer_parallel", "Mamba-2"),
        ),
        pytest.param(
            *("Mamba2", HEADS, {}, "`joint_exit` is not supported on EfficientMamba2"),
            marks=pytest.mark.refuses("joint_exit", "Mamba-2"),
        ),
        pytest.param(
            *("Mamba2", {"multiplex": {"depth": 4, "sizes": [2]}}, {}, "`multiplex` is not supp"),
            marks=pytest.mark.refuses("multiplex", "Mamba-2"),
        ),
        (
            "Mamba2",
            {"early_exit": {**EXITS["early_exit"], "cache": "propagate"}},
            {},
            "'propagate'.*state-space layers: use one of recompute, freeze, state-only",
        ),
        (
            "Llama",
            {"early_exit": {**EXITS["early_exit"], "cache": "freeze"}},
            {},
            "'freeze'.*attention layers: use one of recompute, propagate, copy",
        ),
        (
            "Mamba2",
            {"early_exit": {"exits": [{"depth": 4, "adapter": "block"}]}},
            {},
            "adapter `block`.*use `linear` or `none`",
        ),
        ("Mamba2", EXITS, {"enable_prefix_caching": True}, "--enable-prefix-caching"),
        ("Mamba2", EXITS, {"speculative_config": VERIFY}, "cannot take a draft back"),
        ("Mamba2", EXITS, {"enable_lora": True}, "(--enable-lora.*early exit|LoRA)"),
        ("Llama", {"early_exit": GATES}, {}, "tensors.*is missing"),
        ("Llama", {"early_exit": {**GATES, "gate_width": 24}}, {}, "multiple of 16, got 24"),
    ],
)
def test_refused_with_recurrent_states(tiny, family, efficiency, options, named):
    with pytest.raises(ValueError, match=f"(?s){named}"):
        build(tiny(family), family, efficiency=efficiency, **options)


CLOUD = {"edge_cloud": {"role": "cloud", "model": "m", "partition": 3}}
EDGE = {
    "early_exit": {"exits": [{"depth": 4}, {"depth": 12}]},
    "edge_cloud": {"role": "edge", "model": "m", "layers": 24, "mode": "standalone"},
}


def edge(**changes):
    """The same with changes of its `edge_cloud`, or of its `early_exit`."""
    return {name: {**section, **changes.get(name, {})} for name, section in EDGE.items()}


@pytest.mark.refuses
@pytest.mark.parametrize(
    ("efficiency", "options", "named"),
    [
        (CLOUD, {"enable_lora": True}, "--enable-lora.*`edge_cloud`"),
        (CLOUD, {"quantization": "fp8"}, "quantization 'fp8'.*`edge_cloud`"),
        (CLOUD, {"speculative_config": NGRAM}, "--speculative-config.*`edge_cloud`"),
        (CLOUD, {"kv_transfer_config": CONNECTOR}, "--kv-transfer-config.*`edge_cloud`"),
        (CLOUD, {"scheduler_cls": "some.Scheduler"}, "--scheduler-cls.*`edge_cloud`"),
        (CLOUD, {"worker_cls": "some.Worker"}, "--worker-cls.*`edge_cloud`"),
        ({**CLOUD, **EXITS}, {}, "role `cloud` and efficiency.early_exit"),
        (CLOUD, {"speculative_config": VERIFY}, "--speculative-config"),
        (EDGE, {"speculative_config": NGRAM}, "--speculative-config method 'ngram'"),
        (EDGE, {"enable_prompt_embeds": True}, "--enable-prompt-embeds.*early exit"),
        (EDGE, {"tensor_parallel_size": 2}, "--tensor-parallel-size > 1.*an edge"),
        (EDGE, {"async_scheduling": True}, "--async-scheduling.*an edge"),
        (EDGE, {"speculative_config": VERIFY}, "verified early exits.*an edge"),
        (edge(edge_cloud={"mode": "collaborative"}), {}, "has to know its cloud.*EFFPLUGIN_CLOUD"),
        (edge(edge_cloud={"layers": 12}), {}, "12 layers in all leave none"),
        (edge(early_exit={"exits": [{"depth": 4}, {"depth": 8}]}), {}, "behind all 12 layers"),
        (edge(early_exit={"exits": [{"depth": 12}]}), {}, "two exits or more"),
        (edge(early_exit={"cache": "propagate"}), {}, "'propagate'.*on an edge.*`recompute`"),
        (
            edge(early_exit={"exits": [{"depth": 4, "gate": "mamba"}, {"depth": 12}]}),
            {},
            "gates `mamba`.*on an edge",
        ),
    ],
)
def test_parts_of_split_models_are_refused(tiny, monkeypatch, efficiency, options, named):
    monkeypatch.delenv("EFFPLUGIN_CLOUD_URL", raising=False)
    with pytest.raises(ValueError, match=f"(?s){named}"):
        build(tiny(), efficiency=efficiency, **options)


@pytest.mark.parametrize("mode", ["collaborative", "standalone"])
@pytest.mark.parametrize(
    ("url", "key", "named"),
    [
        ("http://host:80o1", "", "80o1"),
        ("https://", "", "no host"),
        ("host:8001", "", "http"),
        ("http://host", "k\xe9y", "API key"),
    ],
)
def test_an_address_that_is_none_is_refused(tiny, monkeypatch, mode, url, key, named):
    monkeypatch.setenv("EFFPLUGIN_CLOUD_URL", url)
    monkeypatch.setenv("EFFPLUGIN_CLOUD_API_KEY", key)
    with pytest.raises(ValueError, match=f"(?s){named}.*set EFFPLUGIN_CLOUD_URL"):
        build(tiny(), efficiency=edge(edge_cloud={"mode": mode}))


@pytest.fixture(scope="module")
def gated(tmp_path_factory):
    """A Llama with untrained gates that keep states."""
    folder = tmp_path_factory.mktemp("gated")
    base = make_checkpoint(folder / "base")
    config = EarlyExitConfig.model_validate(GATES)
    exit = Exit(config.exits[0], config, 128)
    tensors = {f"model.exits.0.{name}": value for name, value in exit.state_dict().items()}
    efficiency = EfficiencyConfig(early_exit=config)
    write_checkpoint(base, folder / "gated", efficiency, tensors=tensors, provenance={})
    return folder / "gated"


def test_verified_exits_with_states_are_refused(gated):
    with pytest.raises(ValueError, match=r"`mamba` gates.*cannot take a draft back"):
        build(gated, hf_overrides={"vocab_size": 256}, speculative_config=VERIFY)


def test_gates_with_states_are_refused_on_gpus(gated, monkeypatch):
    vllm_config = build(gated, hf_overrides={"vocab_size": 256})
    monkeypatch.setattr(current_platform, "device_type", "cuda")
    monkeypatch.setenv(UNTESTED, "1")
    with pytest.raises(UnsupportedError, match=r"`mamba` gates.*cuda yet.*`linear`"):
        EfficiencyAdmission.verify_and_update_config(vllm_config)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """Makes, once, a classifier with exits; Llama's or BERT's."""
    made: dict[str, Path] = {}

    def make(family: str = "Llama") -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            base = make_classifier(folder / "base", family)
            made[family] = checkpoint(base, folder / "exits", {"exits": [{"depth": 4}]})
        return made[family]

    return make


@pytest.mark.refuses("joint_exit")
@pytest.mark.parametrize(
    ("family", "options", "named"),
    [
        ("Llama", {"pipeline_parallel_size": 2}, "--pipeline-parallel-size 2"),
        (
            "Llama",
            {"tensor_parallel_size": 2, "decode_context_parallel_size": 2},
            "--decode-context-parallel-size 2",
        ),
        ("Llama", {"enable_lora": True}, "--enable-lora.*`joint_exit`"),
        ("Llama", {"quantization": "fp8"}, "quantization 'fp8'.*`joint_exit`"),
        ("Llama", {"kv_transfer_config": CONNECTOR}, "--kv-transfer-config.*`joint_exit`"),
        ("Llama", {"worker_cls": "some.Worker"}, "--worker-cls some.Worker"),
        ("Llama", {"scheduler_cls": "some.Scheduler"}, "--scheduler-cls.*`joint_exit`"),
        ("Llama", {"enable_prompt_embeds": True}, "--enable-prompt-embeds"),
        ("Llama", {"runner": "generate"}, "generate"),
        (
            "Llama",
            {"pooler_config": {"seq_pooling_type": "CLS"}},
            "pooling type CLS.*trained on LAST",
        ),
        (
            "Bert",
            {"pooler_config": {"seq_pooling_type": "MEAN"}, "max_model_len": 256},
            "pooling type MEAN.*trained on CLS",
        ),
        (
            "Llama",
            {"pooler_config": {"task": "token_classify"}},
            "pooling task 'token_classify'.*whole sequences",
        ),
        ("Llama", {"pooler_config": {"logit_sigma": 2.0}}, "logit_sigma.*trained without"),
        ("Llama", {"pooler_config": {"logit_mean": 0.5}}, "logit_mean.*trained without"),
        ("Llama", {"speculative_config": NGRAM}, "--speculative-config.*classifier"),
        ("Llama", {"speculative_config": VERIFY}, "--speculative-config.*no exits"),
        (
            "Llama",
            {"hf_overrides": {"problem_type": "multi_label_classification"}},
            "softmax.*problem_type",
        ),
        ("Bert", {"hf_overrides": {"problem_type": "regression"}}, "softmax.*problem_type"),
        (
            "Bert",
            {"hf_overrides": {"sbert_ce_default_activation_function": IDENTITY}},
            "softmax.*activation function",
        ),
        ("Llama", {"hf_overrides": {"is_causal": False}}, "is_causal.*false"),
    ],
)
def test_refused_with_a_classifiers_exits(classifier, family, options, named):
    overrides = {"vocab_size": 256, **options.pop("hf_overrides", {})}
    with pytest.raises(ValueError, match=f"(?s){named}"):
        build(classifier(family), hf_overrides=overrides, **{"max_model_len": 256, **options})


def test_a_section_of_another_kind_of_model_is_refused(tiny):
    named = "`joint_exit` is not supported on EfficientLlamaForCausalLM"
    with pytest.raises(ValueError, match=named):
        build(tiny(), efficiency=HEADS)


@pytest.mark.refuses("edge", "Mamba-2")
@pytest.mark.refuses("edge", "BERT")
@pytest.mark.refuses("cloud", "Mamba-2")
@pytest.mark.refuses("cloud", "BERT")
@pytest.mark.parametrize("part", [EDGE, CLOUD], ids=["edge", "cloud"])
def test_other_models_are_not_split(part):
    efficiency = parse_efficiency({"edge_cloud": part["edge_cloud"]})
    for architecture in ("Mamba2ForCausalLM", "BertForSequenceClassification"):
        with pytest.raises(ConfigError, match=f"edge_cloud is not supported on {architecture}"):
            efficiency.check_kind(architecture)


@pytest.mark.refuses("layer_parallel", "BERT")
@pytest.mark.refuses("early_exit", "BERT")
def test_sections_of_language_models_are_refused_on_classifiers(classifier):
    for family in ("Llama", "Bert"):
        for section in (PAIRS, EXITS):
            [name] = section
            named = f"`{name}` is not supported on Efficient{family}ForSeq"
            with pytest.raises(ValueError, match=named):
                build(classifier(family), hf_overrides={"efficiency": section}, max_model_len=256)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Makes, once, a checkpoint of each technique; and what it is served with."""
    folder = tmp_path_factory.mktemp("served")
    made: dict[str, tuple[Path, dict]] = {}

    def make(technique: str) -> tuple[Path, dict]:
        if technique in made:
            return made[technique]
        if technique in ("joint_exit", "multiplex"):
            base, out = make_classifier(folder / f"{technique}-base"), folder / technique
            if technique == "joint_exit":
                checkpoint(base, out, HEADS["joint_exit"])
            else:
                efficiency = parse_efficiency({"multiplex": {"depth": 4, "sizes": [2]}})
                tensors = random_multiplexers((2,))
                write_checkpoint(base, out, efficiency, tensors=tensors, provenance={})
            made[technique] = out, {"hf_overrides": {"vocab_size": 256}}
        else:
            section = {"layer_parallel": PAIRS, "early_exit": EXITS, "edge": EDGE, "cloud": CLOUD}
            base = make_checkpoint(folder / technique)
            made[technique] = base, {"efficiency": section[technique]}
        return made[technique]

    return make


NOBODY = {
    "pipeline parallelism": ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
    "context parallelism": (
        {"tensor_parallel_size": 2, "decode_context_parallel_size": 2},
        "--decode-context-parallel-size",
    ),
    "executor `ray`": (
        {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"},
        "--distributed-executor-backend ray",
    ),
    "quantised weights": ({"quantization": "fp8"}, "quantization 'fp8'"),
    "LoRA at run time": ({"enable_lora": True}, "--enable-lora"),
    "KV connectors": ({"kv_transfer_config": CONNECTOR}, "--kv-transfer-config"),
}
"""What no technique supports, on a CPU."""


@pytest.mark.refuses
@pytest.mark.parametrize("feature", NOBODY)
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_what_no_technique_supports(served, monkeypatch, technique, feature):
    monkeypatch.setenv("EFFPLUGIN_CLOUD_URL", "http://127.0.0.1:9")
    options, named = NOBODY[feature]
    model, settings = served(technique)
    with pytest.raises(ValueError, match=named):
        build(model, **{"max_model_len": 256, **settings, **options})


@pytest.mark.refuses("multiplex", "V1 on CUDA")
@pytest.mark.refuses("multiplex", "V2 on CUDA")
@pytest.mark.refuses("edge", "V1 on CUDA")
def test_what_has_not_run_on_gpus_is_refused_there(served, monkeypatch):
    monkeypatch.setenv("EFFPLUGIN_CLOUD_URL", "http://127.0.0.1:9")
    for technique, named in (
        ("multiplex", f"merging has not run there.*{UNTESTED}=1"),
        ("edge", "an edge is supported on CPUs only"),
    ):
        model, settings = served(technique)
        with monkeypatch.context() as patch:
            vllm_config = build(model, max_model_len=256, **settings)
            patch.setattr(current_platform, "device_type", "cuda")
            patch.setenv(UNTESTED, "1" if technique == "edge" else "0")
            vllm_config.parallel_config.worker_cls = "auto"
            for v2 in (False, True) if technique == "multiplex" else (False,):
                patch.setattr(type(vllm_config), "use_v2_model_runner", v2)
                with pytest.raises(UnsupportedError, match=named):
                    EfficiencyAdmission.verify_and_update_config(vllm_config)


@pytest.mark.refuses("edge", "V2 on CPU (Triton's interpreter)")
@pytest.mark.refuses("edge", "V2 on CUDA")
@pytest.mark.refuses("cloud", "V2 on CPU (Triton's interpreter)")
@pytest.mark.refuses("cloud", "V2 on CUDA")
@pytest.mark.parametrize("technique", ["edge", "cloud"])
def test_split_models_are_refused_on_runner_v2(served, monkeypatch, technique):
    monkeypatch.setenv("EFFPLUGIN_CLOUD_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    model, settings = served(technique)
    with pytest.raises(ValueError, match=r"V2 is not supported with `edge_cloud`.*RUNNER=0"):
        build(model, max_model_len=256, **settings)


def alone_or_together() -> list:
    """Pairs of techniques of one checkpoint that are refused."""
    multiplex = {"multiplex": {"depth": 6, "sizes": [2]}}
    sections = {"layer_parallel": PAIRS, "early_exit": EXITS, "multiplex": multiplex}
    pairs = [("joint_exit", name) for name in ("layer_parallel", "early_exit")]
    pairs += [("multiplex", name) for name in ("layer_parallel", "early_exit")]
    sections |= {"joint_exit": HEADS, "edge": EDGE, "cloud": CLOUD}
    pairs += [(part, name) for part in ("edge", "cloud") for name in ("joint_exit", "multiplex")]
    return [
        pytest.param(
            {**sections[one], **sections[other]},
            marks=pytest.mark.refuses(one, other),
            id=f"{one}-{other}",
        )
        for one, other in [*pairs, ("cloud", "early_exit")]
    ]


@pytest.mark.parametrize("together", alone_or_together())
def test_techniques_that_exclude_each_other(together):
    with pytest.raises(ConfigError, match="not supported together"):
        parse_efficiency(together).validate_for(12)


def test_a_classifier_of_one_label_is_refused(tmp_path):
    base = make_classifier(tmp_path / "base", num_labels=1)
    exits = checkpoint(base, tmp_path / "exits", {"exits": [{"depth": 4}]}, classes=1)
    with pytest.raises(ValueError, match="one label is not supported with `joint_exit`"):
        build(exits, hf_overrides={"vocab_size": 256})


@pytest.mark.parametrize("family", ["Llama", "Bert"])
def test_a_classifier_with_exits_is_accepted(classifier, family):
    vllm_config = build(classifier(family), hf_overrides={"vocab_size": 256}, max_model_len=256)
    assert vllm_config.model_config.runner_type == "pooling"
    assert vllm_config.model_config.io_processor_plugin == "effplugin"


@pytest.fixture(scope="module")
def merging(tmp_path_factory):
    """A classifier that merges sequences."""
    folder = tmp_path_factory.mktemp("merging")
    efficiency = EfficiencyConfig.model_validate({"multiplex": {"depth": 4, "sizes": [2]}})
    write_checkpoint(
        make_classifier(folder / "base"),
        folder / "merging",
        efficiency,
        tensors=random_multiplexers((2,)),
        provenance={},
    )
    return folder / "merging"


@pytest.mark.refuses("multiplex")
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"enable_lora": True}, "--enable-lora.*`multiplex`"),
        ({"quantization": "fp8"}, "quantization 'fp8'.*`multiplex`"),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size 2"),
        ({"scheduler_cls": "some.Scheduler"}, "--scheduler-cls.*`multiplex`"),
        ({"pooler_config": {"task": "token_classify"}}, "'token_classify'.*`multiplex`"),
        ({"speculative_config": NGRAM}, "--speculative-config.*classifier"),
        ({"speculative_config": VERIFY}, "--speculative-config.*no exits"),
        ({"enable_prompt_embeds": True}, "--enable-prompt-embeds.*`multiplex`"),
        (
            {"hf_overrides": {"efficiency": {"multiplex": {"depth": 12, "sizes": [2]}}}},
            "multiplex: depth 12 leaves none of the model's 12 layers",
        ),
        (
            {"hf_overrides": {"efficiency": {"multiplex": {"depth": 4, "sizes": [2, 4]}}}},
            r"lacks tensors: multiplexers\.4\.",
        ),
    ],
)
def test_refused_with_merging(merging, options, named):
    overrides = {"vocab_size": 256, **options.pop("hf_overrides", {})}
    with pytest.raises(ValueError, match=f"(?s){named}"):
        build(merging, hf_overrides=overrides, max_model_len=256, **options)


def test_merging_brings_its_scheduler(merging):
    vllm_config = build(merging, hf_overrides={"vocab_size": 256}, max_model_len=256)
    assert vllm_config.scheduler_config.scheduler_cls == SCHEDULER
    assert vllm_config.model_config.io_processor_plugin == "effplugin"


def test_verified_exits_on_runner_v2_are_refused(tiny, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(ValueError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        build(tiny(), efficiency=EXITS, speculative_config=VERIFY)


@pytest.mark.refuses("early_exit", "V1 on CUDA")
@pytest.mark.refuses("early_exit", "V2 on CUDA")
def test_exits_on_gpus_are_refused_unless_asked_for(tiny, monkeypatch):
    vllm_config = build(tiny(), efficiency=EXITS)
    monkeypatch.setattr(current_platform, "device_type", "cuda")
    vllm_config.parallel_config.worker_cls = "auto"
    with pytest.raises(UnsupportedError, match=f"cuda yet: .*slower.*{UNTESTED}=1"):
        EfficiencyAdmission.verify_and_update_config(vllm_config)
    monkeypatch.setenv(UNTESTED, "1")
    vllm_config.compilation_config.cudagraph_mode = None
    EfficiencyAdmission.verify_and_update_config(vllm_config)
    assert vllm_config.compilation_config.cudagraph_mode == CUDAGraphMode.PIECEWISE
    assert vllm_config.parallel_config.worker_cls == WORKERS["cuda"]
    vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    with pytest.raises(UnsupportedError, match=r"cudagraph_mode=FULL_AND_PIECEWISE.*PIECEWISE"):
        EfficiencyAdmission.verify_and_update_config(vllm_config)
    monkeypatch.setattr(current_platform, "device_type", "tpu")
    with pytest.raises(UnsupportedError, match="not supported on tpu yet: remove"):
        EfficiencyAdmission.verify_and_update_config(vllm_config)


@pytest.mark.refuses("joint_exit", "V1 on CUDA")
def test_classifiers_with_exits_run_on_gpus_with_runner_v2(classifier, monkeypatch):
    vllm_config = build(classifier(), hf_overrides={"vocab_size": 256}, max_model_len=256)
    monkeypatch.setattr(current_platform, "device_type", "cuda")
    vllm_config.parallel_config.worker_cls = "auto"
    with pytest.raises(UnsupportedError, match=f"V1 has not run it there.*{UNTESTED}=1"):
        EfficiencyAdmission.verify_and_update_config(vllm_config)
    # A platform without Triton cannot build the configuration itself.
    monkeypatch.setattr(type(vllm_config), "use_v2_model_runner", True)
    vllm_config.compilation_config.cudagraph_mode = None
    EfficiencyAdmission.verify_and_update_config(vllm_config)
    assert vllm_config.parallel_config.worker_cls == WORKERS["cuda"]


def test_a_draft_model_is_refused(tiny):
    speculative = {"method": "draft_model", "model": str(tiny()), "num_speculative_tokens": 2}
    with pytest.raises(ValueError, match="--speculative-config method 'draft_model'"):
        build(tiny(), efficiency=PAIRS, speculative_config=speculative)


def test_mixed_attention_in_a_group_is_refused(tiny):
    kinds = ["sliding_attention", "full_attention"] * 6
    changed = {**overrides("Llama", PAIRS), "layer_types": kinds, "sliding_window": 64}
    with pytest.raises(ValueError, match=r"\[2, 3\] mixes kinds of attention"):
        build(tiny(), hf_overrides=changed)


def test_mixed_attention_with_exits_is_refused(tiny):
    kinds = ["sliding_attention", "full_attention"] * 6
    changed = {**overrides("Llama", EXITS), "layer_types": kinds, "sliding_window": 64}
    with pytest.raises(ValueError, match=r"mixes kinds of attention layers.*early exit"):
        build(tiny(), hf_overrides=changed)


@pytest.mark.parametrize(
    ("efficiency", "options"),
    [
        (PAIRS, {}),
        (EXITS, {}),
        (EXITS, {"tensor_parallel_size": 2}),
        (EXITS, {"speculative_config": VERIFY}),
        (EXITS, {"speculative_config": {**VERIFY, "num_speculative_tokens": 2}}),
        (PAIRS, {"tensor_parallel_size": 2}),
        (None, {"enable_lora": True}),
        (
            {"layer_parallel": {"groups": [[2, 3, 4]], "schedule": "fused"}},
            {"tensor_parallel_size": 2},
        ),
        (PAIRS, {"speculative_config": NGRAM}),
    ],
)
def test_accepted(tiny, efficiency, options):
    build(tiny(), efficiency=efficiency, **options)


def test_extra_tensors_are_checked_at_start(tiny, tmp_path):
    from safetensors.torch import load_file

    efficiency = parse_efficiency({"layer_parallel": {"groups": [[2, 3]], "trained": True}})
    stored = load_file(tiny() / "model.safetensors")
    names = replaced_tensor_names(efficiency, 12, base_tensors(tiny()))
    folder = tmp_path / "trained"
    tensors = {name: stored[name] for name in names}
    write_checkpoint(tiny(), folder, efficiency, tensors=tensors, provenance={})
    build(folder, hf_overrides={"max_position_embeddings": 512})
    config = json.loads((folder / "config.json").read_text())
    config["efficiency"]["layer_parallel"]["groups"] = [[2, 3], [4, 5]]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"lacks tensors: model\.layers\.4"):
        build(folder, hf_overrides={"max_position_embeddings": 512})


def test_ray_on_cpu_is_refused_in_a_clear_sentence(tiny):
    if not current_platform.is_cpu():
        pytest.skip("vLLM refuses Ray on its CPU platform only")
    with pytest.raises(ValueError, match=r"--distributed-executor-backend ray.*`mp`"):
        build(
            tiny(),
            efficiency=PAIRS,
            tensor_parallel_size=2,
            distributed_executor_backend="ray",
        )


def test_the_older_ray_executor_is_refused(tiny, monkeypatch):
    vllm_config = build(tiny(), efficiency=PAIRS)
    monkeypatch.setattr(current_platform, "ray_device_key", "GPU")
    vllm_config.parallel_config.distributed_executor_backend = "ray"
    EfficiencyAdmission.verify_and_update_config(vllm_config)
    monkeypatch.setenv("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", "0")
    with pytest.raises(UnsupportedError, match=r"V2_EXECUTOR_BACKEND=0.*leave it at 1"):
        EfficiencyAdmission.verify_and_update_config(vllm_config)
