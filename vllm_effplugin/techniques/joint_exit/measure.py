"""What operating points give in vLLM: sequences per second, in turn with the full model.

Runs in the engine's process (`offline.run_with_engine`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict
from tqdm.auto import tqdm

from vllm_effplugin.techniques.joint_exit.request import exit_pooling_params

ROUNDS = 3


class Speed(BaseModel):
    """What an operating point gave.

    Attributes:
        requests_s: sequences per second, the median of the rounds.
        ratio: of that to the full model's, the median of the rounds' ratios.
        lowest: of those ratios.
        classes: the most likely class of each sequence.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    requests_s: float
    ratio: float
    lowest: float
    classes: list[int]


def measure(
    model: str,
    sequences: Sequence[list[int]],
    points: Sequence[tuple[str, str]],
    max_length: int,
    **options: Any,
) -> list[dict[str, Any]]:
    """Classify the sequences under each operating point, and with the full model first.

    Args:
        model: a checkpoint with exits at the points' depths.
        sequences: token ids.
        points: the exits as JSON and the file of their tensors, to set in turn.
        max_length: of a sequence.
        options: further ones of `vllm.LLM`.

    Returns:
        a `Speed` as JSON for the full model and for each point.
    """
    llm = open_classifier(model, max_length, **options)
    prompts = [{"prompt_token_ids": sequence} for sequence in sequences]
    seconds: list[list[float]] = [[] for _ in range(len(points) + 1)]
    classes: list[list[int]] = [[] for _ in seconds]
    with tqdm(total=(ROUNDS + 1) * len(seconds), desc="measuring", leave=False) as bar:
        for round in range(-1, ROUNDS):
            for place in range(len(seconds)):
                if place:
                    llm.collective_rpc("set_classifier_exits", args=points[place - 1])
                taken, classes[place] = _classify(llm, prompts, exit=place > 0)
                if round >= 0:
                    seconds[place].append(taken)
                bar.update()
    ratios = [[full / one for full, one in zip(seconds[0], own, strict=True)] for own in seconds]
    return [
        {
            "requests_s": len(prompts) / statistics.median(own),
            "ratio": statistics.median(each),
            "lowest": min(each),
            "classes": found,
        }
        for own, each, found in zip(seconds, ratios, classes, strict=True)
    ]


def open_classifier(model: str, max_length: int, **options: Any) -> Any:
    """A `vllm.LLM` that classifies token ids, again and again.

    Args:
        max_length: of a sequence.
        options: further ones of `vllm.LLM`.
    """
    from vllm import LLM

    return LLM(
        model,
        max_model_len=max_length,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        disable_log_stats=True,
        **options,
    )


def _classify(llm: Any, prompts: Sequence[Any], *, exit: bool) -> tuple[float, list[int]]:
    params = exit_pooling_params(exit=exit)
    start = time.perf_counter()
    outputs = llm.classify(prompts, pooling_params=params, use_tqdm=False)
    taken = time.perf_counter() - start
    return taken, [
        max(range(len(p)), key=p.__getitem__) for p in (o.outputs.probs for o in outputs)
    ]
