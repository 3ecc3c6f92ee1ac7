"""What a request may ask of an edge."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from vllm_effplugin.errors import ConfigError
from vllm_effplugin.techniques.edge_cloud.request import check_sampling


@pytest.mark.refuses("edge", "structured output")
@pytest.mark.parametrize(
    "wanted",
    [
        {"presence_penalty": 0.5},
        {"frequency_penalty": -0.5},
        {"repetition_penalty": 1.1},
        {"min_tokens": 1},
        {"logprobs": 0},  # those of the tokens themselves
        {"logprobs": 2},
        {"logprob_token_ids": [3]},
        {"prompt_logprobs": 0},
        {"logit_bias": {3: 1.0}},
        {"allowed_token_ids": [3]},
        {"bad_words": ["no"]},
        {"structured_outputs": StructuredOutputsParams(regex="a+")},
        {"thinking_token_budget": 5},
        {"trace_decode_token_ids": [3]},
    ],
)
def test_what_the_cloud_cannot_heed_is_refused(wanted: dict[str, Any]) -> None:
    [name] = wanted
    params = SamplingParams(**wanted)
    for mode in ("collaborative", "cloud"):
        with pytest.raises(ConfigError, match=rf'^{name} is not.*"cloud_mode": "standalone"'):
            check_sampling(params, mode)  # type: ignore[arg-type]
    check_sampling(params, "standalone")


def test_what_says_nothing_is_none_of_it() -> None:
    nothing = SamplingParams(logit_bias={}, bad_words=[], temperature=0.7, seed=1, stop=["x"])
    check_sampling(nothing, "cloud")
