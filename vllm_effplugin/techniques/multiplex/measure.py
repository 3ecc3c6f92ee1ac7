"""What merging gives in vLLM: sequences per second, in turn with every sequence running alone.

Runs in the engine's process (`offline.run_with_engine`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict
from tqdm.auto import tqdm

from vllm_effplugin.techniques.joint_exit.measure import open_classifier
from vllm_effplugin.techniques.multiplex.request import multiplex_pooling_params

ROUNDS = 3


class Speed(BaseModel):
    """What groups of one size gave.

    Attributes:
        requests_s: sequences per second, the median of the rounds.
        ratio: of that to running alone, the median of the rounds' ratios.
        lowest: of those ratios.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    requests_s: float
    ratio: float
    lowest: float


def measure(
    model: str,
    sequences: Sequence[list[int]],
    sizes: Sequence[int],
    max_length: int,
    **options: Any,
) -> list[dict[str, Any]]:
    """Classify the sequences alone, and in groups of each size.

    Args:
        model: a checkpoint that merges groups of these sizes.
        sequences: token ids.
        max_length: of a sequence.
        options: further ones of `vllm.LLM`.

    Returns:
        a `Speed` as JSON for running alone (its ratio is 1) and for each size.
    """
    llm = open_classifier(model, max_length, **options)
    prompts = [{"prompt_token_ids": sequence} for sequence in sequences]
    seconds: list[list[float]] = [[] for _ in range(len(sizes) + 1)]
    with tqdm(total=(ROUNDS + 1) * len(seconds), desc="measuring", leave=False) as bar:
        for round in range(-1, ROUNDS):
            for place in range(len(seconds)):
                if place:
                    llm.collective_rpc("set_group_sizes", args=([sizes[place - 1]],))
                params = multiplex_pooling_params(mux=place > 0)
                start = time.perf_counter()
                llm.classify(prompts, pooling_params=params, use_tqdm=False)
                if round >= 0:
                    seconds[place].append(time.perf_counter() - start)
                bar.update()
    found = []
    for own in seconds:
        ratios = [alone / one for alone, one in zip(seconds[0], own, strict=True)]
        found.append(
            {
                "requests_s": len(prompts) / statistics.median(own),
                "ratio": statistics.median(ratios),
                "lowest": min(ratios),
            }
        )
    return found
