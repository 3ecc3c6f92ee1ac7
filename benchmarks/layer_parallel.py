"""Layer parallelism (CQIL) against stock vLLM: decode and prefill speed on one rank and on two.

    python benchmarks/layer_parallel.py --quick --json result.json --plot result.png

One rank serves SmolLM2-135M. Two ranks serve a random-weight Llama, because SmolLM2's 9 heads do
not divide by 2; the speed does not depend on the weights.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from checkpoints import build_smollm2
from harness import CACHE, SEED, SPEED_METRICS, Case, EngineSpec, argument_parser, efficient, main

RANDOM_LLAMA = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 8192,
    "max_position_embeddings": 2048,
}

BYPASS_0 = {"bypass": 0}
BYPASS_1 = {"bypass": 1}
FUSED = {"schedule": "fused"}


def layer_parallel(stock: EngineSpec, **block: Any) -> EngineSpec:
    """`stock`, with the layers grouped as `block` says."""
    return efficient(stock, layer_parallel=block)


def cases(smollm2: Path, random_llama: Path) -> list[Case]:
    """Pairs over all but the first and last layers, and groups of four on one rank."""
    one = EngineSpec(str(smollm2))
    two = EngineSpec(str(random_llama), tensor_parallel=2)
    pairs_of_one = {"start": 1, "end": 29, "group_size": 2}
    fours_of_one = {"start": 1, "end": 29, "group_size": 4}
    pairs_of_two = {"start": 1, "end": 23, "group_size": 2}
    return [
        Case(
            f"layer_parallel/{name}",
            baseline=stock,
            candidate=layer_parallel(stock, **groups, **schedule),
            metrics=SPEED_METRICS,
            quick=name in ("tp1/bypass0", "tp2/bypass0"),
        )
        for name, stock, groups, schedule in (
            ("tp1/bypass0", one, pairs_of_one, BYPASS_0),
            ("tp1/bypass1", one, pairs_of_one, BYPASS_1),
            ("tp1/fused", one, pairs_of_one, FUSED),
            ("tp1/p4/bypass0", one, fours_of_one, BYPASS_0),
            ("tp1/p4/fused", one, fours_of_one, FUSED),
            ("tp2/bypass0", two, pairs_of_two, BYPASS_0),
            ("tp2/bypass1", two, pairs_of_two, BYPASS_1),
            ("tp2/fused", two, pairs_of_two, FUSED),
        )
    ]


def build_random_llama(folder: Path) -> None:
    """Save a small Llama with seeded random weights, unless it is there."""
    if folder.exists():
        return
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    partial = folder.with_name(f"{folder.name}.partial")
    model = LlamaForCausalLM(LlamaConfig(**RANDOM_LLAMA, tie_word_embeddings=False))
    model.to(torch.bfloat16).save_pretrained(partial)
    partial.rename(folder)


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--model", type=Path, default=CACHE / "smollm2", help="SmolLM2 checkpoint for one rank"
    )
    arguments = parser.parse_args()
    llama = CACHE / "benchmarks" / "random-llama"
    if not arguments.list:
        build_smollm2(arguments.model)
        build_random_llama(llama)
    sys.exit(main(arguments, cases(arguments.model, llama)))
