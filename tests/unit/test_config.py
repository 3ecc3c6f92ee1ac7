"""The `efficiency` block: what is impossible is refused by the name of its field."""

from __future__ import annotations

import pytest

from vllm_effplugin.config import efficient_architecture, parse_efficiency
from vllm_effplugin.errors import ConfigError

RANGE = {"start": 2, "end": 6, "group_size": 2}


@pytest.mark.parametrize(
    ("block", "named"),
    [
        ("layer_parallel", "JSON object"),
        ({"layer_paralel": RANGE}, "layer_paralel"),
        ({"version": 2}, "version"),
        ({"layer_parallel": {**RANGE, "stride": 1}}, "stride"),
        ({"layer_parallel": {"start": 2, "end": 6}}, "group_size"),
        ({"layer_parallel": {}}, "groups"),
        ({"layer_parallel": {**RANGE, "groups": [[2, 3]]}}, "excludes"),
        ({"layer_parallel": {**RANGE, "group_size": 5}}, "group_size"),
        ({"layer_parallel": {"start": 2, "end": 4, "group_size": 3}}, "larger than the range"),
        ({"layer_parallel": {"start": 6, "end": 6, "group_size": 2}}, "empty"),
        ({"layer_parallel": {"start": -2, "end": 6, "group_size": 2}}, "start"),
        ({"layer_parallel": {"groups": [[2, 3], [3, 4]]}}, "overlaps"),
        ({"layer_parallel": {"groups": [[4, 5], [2, 3]]}}, "unsorted"),
        ({"layer_parallel": {"groups": [[2, 4]]}}, "consecutive"),
        ({"layer_parallel": {"groups": [[2]]}}, "must have one of"),
        ({"layer_parallel": {"groups": [[2, 3, 4, 5, 6]]}}, "must have one of"),
        ({"layer_parallel": {"groups": [[-1, 0]]}}, "negative"),
        ({"layer_parallel": {**RANGE, "bypass": 2}}, "bypass"),
        ({"layer_parallel": {**RANGE, "bypass": -1}}, "bypass"),
        ({"layer_parallel": {**RANGE, "bypass": 1, "schedule": "fused"}}, "fused"),
        ({"layer_parallel": {**RANGE, "schedule": "serial"}}, "schedule"),
        ({"layer_parallel": {**RANGE, "double_count_bypass": True}}, "double_count_bypass"),
    ],
)
def test_impossible_values_are_named(block, named):
    with pytest.raises(ConfigError, match=named):
        parse_efficiency(block)


def test_a_group_outside_the_model_is_named():
    with pytest.raises(ConfigError, match=r"\[4, 5\] is outside the model, which has 5 layers"):
        parse_efficiency({"layer_parallel": RANGE}).validate_for(5)


def test_architectures():
    assert efficient_architecture("Qwen3ForCausalLM") == "EfficientQwen3ForCausalLM"
    assert efficient_architecture("EfficientLlamaForCausalLM") == "EfficientLlamaForCausalLM"
    with pytest.raises(ConfigError, match=r"'OPTForCausalLM'.*LlamaForCausalLM"):
        efficient_architecture("OPTForCausalLM")


def test_the_block_survives_a_round_trip():
    block = {"version": 1, "layer_parallel": {**RANGE, "bypass": 1}}
    config = parse_efficiency(block)
    assert parse_efficiency(config.model_dump(mode="json", exclude_defaults=True)) == config
