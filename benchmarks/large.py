"""Every technique on a Llama of 3 billion parameters against stock vLLM: what a GPU makes of it.

    python benchmarks/large.py --json result.json

The weights are random: nothing is downloaded, and nothing leaves early for a reason. Exits are
forced at half depth, so that the figures show what the machinery saves and costs on CUDA graphs and
real kernels, not what a trained model can spare. The first run writes 6.4 GB.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from early_exit import DecodeThroughput, early_exit, forced, short_prompts
from harness import (
    CACHE,
    SEED,
    Case,
    Engine,
    EngineSpec,
    Metric,
    PrefillThroughput,
    argument_parser,
    main,
)
from layer_parallel import layer_parallel

from vllm_effplugin.config import EfficiencyConfig
from vllm_effplugin.config.checkpoint import write_checkpoint
from vllm_effplugin.techniques.joint_exit.config import JointExitConfig

LAYERS = 28
HALF = LAYERS // 2
SHAPE: dict[str, Any] = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "num_labels": 2,
    "pad_token_id": 0,
}
"""Of a Llama with 3.2 billion parameters."""

NEVER = {"depth": HALF, "gate": "rate", "threshold": 0.9999999}

METRICS = (
    Metric("decode_tok_s_b1", DecodeThroughput(1, 64, short_prompts), better="higher"),
    Metric("decode_tok_s_b8", DecodeThroughput(8, 64, short_prompts), better="higher"),
    Metric("decode_tok_s_b32", DecodeThroughput(32, 64, short_prompts), better="higher"),
    Metric("prefill_tok_s", PrefillThroughput(count=16, length=512), better="higher"),
)


@dataclass(frozen=True)
class Classified:
    """Texts classified per second, all of them submitted at once."""

    count: int
    length: int

    def __call__(self, engine: Engine) -> float:
        texts = [{"prompt_token_ids": ids} for ids in engine.prompts(self.count, self.length)]
        start = time.perf_counter()
        engine.llm.encode(texts, pooling_task="classify", use_tqdm=False)
        return self.count / (time.perf_counter() - start)


def cases(model: Path, classifier: Path, half: Path) -> list[Case]:
    """Exits idle and forced, fused layers, and a classifier that stops half-way."""
    stock = EngineSpec(str(model))
    pairs = {"start": 1, "end": LAYERS - 1, "group_size": 2}
    found = [
        ("early_exit/100/propagate", early_exit(stock, "propagate", forced(HALF, 100))),
        ("layer_parallel/fused", layer_parallel(stock, **pairs, schedule="fused")),
        ("early_exit/50/recompute", early_exit(stock, "recompute", forced(HALF, 50))),
        ("early_exit/idle", early_exit(stock, "recompute", NEVER)),
    ]
    texts = (Metric("requests_s", Classified(128, 128), better="higher"),)
    return [
        Case(
            "large/classification/half",
            EngineSpec(str(classifier)),
            EngineSpec(str(half)),
            texts,
            quick=True,
        ),
        *(Case(f"large/{name}", stock, ours, METRICS, quick=True) for name, ours in found),
    ]


def build_model(folder: Path) -> None:
    """Write a Llama with seeded random weights, unless it is there."""
    if folder.exists():
        return
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    partial = folder.with_name(f"{folder.name}.partial")
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM._from_config(LlamaConfig(**SHAPE), dtype=torch.bfloat16)
    model.save_pretrained(partial)
    partial.rename(folder)


def build_classifiers(model: Path, stock: Path, half: Path) -> None:
    """Put a random head on it, and an exit at half depth which every text takes."""
    if half.exists():
        return
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(SEED)
    stock.mkdir(exist_ok=True)
    (stock / "model.safetensors").unlink(missing_ok=True)
    os.link(model / "model.safetensors", stock / "model.safetensors")
    width, classes = SHAPE["hidden_size"], SHAPE["num_labels"]
    head = {"score.weight": 0.02 * torch.randn(classes, width, dtype=torch.bfloat16)}
    save_file(head, stock / "score.safetensors", {"format": "pt"})
    described = json.loads((model / "config.json").read_text(encoding="utf-8"))
    described["architectures"] = ["LlamaForSequenceClassification"]
    (stock / "config.json").write_text(json.dumps(described), encoding="utf-8")
    exits = JointExitConfig.model_validate(
        {"rule": "confidence", "exits": [{"depth": HALF, "threshold": 0.0}]}
    )
    tensors = {
        name: 0.02 * torch.randn(shape) for name, shape in exits.tensors(width, classes).items()
    }
    write_checkpoint(
        stock, half, EfficiencyConfig(joint_exit=exits), tensors=tensors, provenance={}
    )


if __name__ == "__main__":
    arguments = argument_parser(__doc__).parse_args()
    llama, stock, half = (
        CACHE / "benchmarks" / name for name in ("llama-3b", "llama-3b-stock", "llama-3b-half")
    )
    if not arguments.list:
        build_model(llama)
        build_classifiers(llama, stock, half)
    sys.exit(main(arguments, cases(llama, stock, half)))
