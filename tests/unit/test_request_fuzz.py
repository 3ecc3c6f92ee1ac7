"""Any value for any option of a request: understood, or refused by its name."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from vllm_effplugin.config import parse_efficiency
from vllm_effplugin.engine.io_processor import ClassifyData, ClassifyProcessor
from vllm_effplugin.engine.params import CollaborativeEdgeParamsV1, VerifyingExitParamsV1
from vllm_effplugin.errors import ConfigError
from vllm_effplugin.techniques.early_exit.request import (
    cache_policy,
    parse_exit_request,
    thresholds,
)
from vllm_effplugin.techniques.edge_cloud.config import EdgeConfig
from vllm_effplugin.techniques.edge_cloud.request import requested_mode
from vllm_effplugin.techniques.joint_exit import request as joint
from vllm_effplugin.techniques.multiplex import request as multiplex

JOINT = {"rule": "confidence", "exits": [{"depth": 3, "threshold": 0.5}]}
EFFICIENCY = {"joint_exit": JOINT, "multiplex": {"depth": 4, "sizes": [2]}}
EXITS = parse_efficiency({"early_exit": {"exits": [{"depth": 4}], "cache": "copy"}}).early_exit
EDGE = EdgeConfig(role="edge", model="any", layers=4)

numbers = st.integers() | st.floats() | st.sampled_from((10**400, -(10**400), 2**63, 1e308))
likely = st.sampled_from(
    ("true", "false", "verify", "0.5", "nan", "inf", "1e999", "\u0661", "cloud", "")
)
scalars = st.none() | st.booleans() | numbers | likely | st.text(max_size=300)
values = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=6
)


def wishes(*names: str) -> st.SearchStrategy[dict[str, Any]]:
    """Any values of these options, and of others that look like one of them."""
    alike = st.sampled_from(names).flatmap(
        lambda name: st.text(max_size=8).map(lambda rest: f"{name.split('_')[0]}_{rest}")
    )
    return st.builds(
        lambda known, unknown: {**known, **unknown},
        st.fixed_dictionaries({}, optional=dict.fromkeys(names, values)),
        st.dictionaries(alike | st.text(max_size=8), values, max_size=1),
    )


def understood_or_named(parse: Callable[[Mapping[str, Any]], Any], asked: dict[str, Any]) -> Any:
    """What is parsed; None where it is refused by a name that was given."""
    try:
        return parse(asked)
    except (ConfigError, VLLMValidationError) as error:
        said = str(error)
    assert any(name in said for name in asked), (said, asked)
    return None


any_exit = wishes("exit", "exit_threshold", "exit_min_layer")
any_sequence = wishes("exit", "exit_bias", "exit_report")
any_mux = wishes("mux", "mux_group", "mux_report")


@settings(max_examples=400, deadline=None, derandomize=True)
@given(any_exit)
def test_early_exit(asked: dict[str, Any]) -> None:
    found = understood_or_named(parse_exit_request, asked)
    if found is not None:
        assert EXITS is not None
        assert all(0 <= threshold <= 1 for threshold in thresholds(EXITS, found))
        cache_policy(EXITS, asked)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(any_sequence)
def test_a_classifiers_exits(asked: dict[str, Any]) -> None:
    found = understood_or_named(joint.parse_sequence_request, asked)
    bias = joint.engine_request(asked).bias(0.0)  # never an error
    if found is None:
        assert bias == -float("inf")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(any_mux)
def test_multiplexing(asked: dict[str, Any]) -> None:
    found = understood_or_named(multiplex.parse_multiplex_request, asked)
    config = parse_efficiency(EFFICIENCY).multiplex
    assert config is not None
    tenant = multiplex.engine_request(asked).tenant(config)  # never an error
    if found is None:
        assert tenant is None


@settings(max_examples=300, deadline=None, derandomize=True)
@given(wishes("cloud_mode"))
def test_edges(asked: dict[str, Any]) -> None:
    mode = understood_or_named(lambda given: requested_mode(EDGE, given), asked)
    assert mode in (None, "standalone", "collaborative", "cloud")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(any_exit | wishes("cloud_mode", "exit"))
@pytest.mark.parametrize("checks", [VerifyingExitParamsV1, CollaborativeEdgeParamsV1])
def test_where_requests_arrive(checks: Any, asked: dict[str, Any]) -> None:
    """Nothing but what vLLM makes HTTP 400 of."""
    params = SamplingParams()
    params.extra_args = asked  # vLLM's own check of it comes before ours
    with pytest.MonkeyPatch.context() as here:
        here.setenv("EFFPLUGIN_CLOUD_URL", "http://localhost:1")
        understood_or_named(lambda _: checks.validate_params(params), asked)


@pytest.fixture(scope="module")
def processor() -> ClassifyProcessor:
    """That of a classifier with both techniques."""
    hf_config = SimpleNamespace(
        efficiency=EFFICIENCY, num_hidden_layers=6, id2label={0: "no", 1: "yes"}
    )
    config = SimpleNamespace(model_config=SimpleNamespace(hf_config=hf_config))
    return ClassifyProcessor(config, None)  # type: ignore[arg-type]


texts = st.text() | st.lists(st.text(), max_size=3) | values
any_data = st.builds(
    lambda exits, mux, text: {**exits, **mux, **text},
    any_sequence,
    any_mux,
    st.fixed_dictionaries({}, optional={"input": texts}),
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(data=any_data | values)
def test_data_of_pooling(processor: ClassifyProcessor, data: Any) -> None:
    """Nothing but HTTP 400, and what passes has texts and parameters."""
    try:
        asked = processor.parse_data(data)
    except VLLMValidationError as error:
        said = str(error)
    else:
        asyncio.run(_texts_and_parameters(processor, asked))
        return
    assert "data" in said


async def _texts_and_parameters(processor: ClassifyProcessor, asked: ClassifyData) -> None:
    assert all(isinstance(text, str) for text in processor.pre_process(asked))
    assert processor.merge_pooling_params().task == "classify"
