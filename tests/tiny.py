"""Tiny random checkpoints of each family, and real vLLM engines on them."""

from __future__ import annotations

import atexit
import contextlib
import gc
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers

LAYERS = 12
CLASSES = 3
VOCAB = 256

PRELOADED = [
    "vllm.entrypoints.llm",
    "vllm.v1.engine.core_client",
    "vllm.v1.worker.cpu_worker",
    "vllm_effplugin.models.families",
]

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    "Mistral": ("MistralForCausalLM", {"sliding_window": None, "head_dim": 32}),
    "Qwen2": ("Qwen2ForCausalLM", {}),
    "Qwen3": ("Qwen3ForCausalLM", {"head_dim": 64}),
}


BERT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


MAMBA2: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "num_hidden_layers": LAYERS,
    "expand": 2,
    "num_heads": 8,
    "head_dim": 32,
    "state_size": 16,
    "n_groups": 2,
    "conv_kernel": 4,
    "chunk_size": 32,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def architecture(family: str) -> str:
    """The family's stock architecture name."""
    return f"{family}ForCausalLM"


def make_classifier(folder: Path, family: str = "Llama", **changes: Any) -> Path:
    """The same for a classifier; BERT too."""
    special = BERT if family == "Bert" else {**_COMMON, **FAMILIES[family][1]}
    name = f"{family}ForSequenceClassification"
    return _make(folder, family, name, {**special, "num_labels": CLASSES, **changes})


def make_checkpoint(folder: Path, family: str = "Llama", **changes: Any) -> Path:
    """Write a random fp32 checkpoint whose norms, biases and deltas all matter to the logits."""
    settings = MAMBA2 if family == "Mamba2" else {**_COMMON, **FAMILIES[family][1]}
    return _make(folder, family, architecture(family), {**settings, **changes})


def _make(folder: Path, family: str, name: str, settings: dict[str, Any]) -> Path:
    config = getattr(transformers, f"{family}Config")(**settings)
    torch.manual_seed(0)
    model = getattr(transformers, name)(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name.lower() and parameter_name.endswith("weight"):
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            elif parameter_name.endswith("dt_bias"):
                parameter.copy_(-2 + 0.5 * torch.randn_like(parameter))  # a state lasts 8 tokens
            elif parameter_name.endswith("D"):
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            elif parameter_name.endswith("bias"):
                parameter.copy_(0.1 * torch.randn_like(parameter))
            else:
                parameter.copy_(0.08 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def add_tokenizer(folder: Path) -> None:
    """One token per character."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {chr(code): code for code in range(3, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def overrides(family: str, efficiency: dict[str, Any] | None) -> dict[str, Any]:
    """`hf_overrides` that serve a stock checkpoint through our architecture."""
    changed: dict[str, Any] = {
        "architectures": [architecture(family).replace(family, f"Efficient{family}")]
    }
    if efficiency is not None:
        changed["efficiency"] = efficiency
    return changed


def counters(llm: Any) -> dict[str, float]:
    """An engine's metrics that are one number, by name."""
    return {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}


def isolated(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a module-level function in a fresh process and return its result.

    Compiled engines need it, because Dynamo's caches outlive them, and so does what leaves a mark
    on the process (numba, whose modules vLLM 0.32 stumbles over when a second engine starts).

    Forked from a process that has imported vLLM and done nothing else: the import takes longer than
    many a test.
    """
    method = "spawn" if torch.cuda.is_available() else "forkserver"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(PRELOADED)
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(_in_environment, dict(os.environ), function, args, kwargs).result()


def _in_environment(
    environment: dict[str, str], function: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    """The server's environment is that of its start, which may be long ago."""
    os.environ.clear()
    os.environ.update(environment)
    return function(*args, **kwargs)


atexit.register(gc.unfreeze)


@contextlib.contextmanager
def _own_garbage_only() -> Iterator[None]:
    """Keep what exists by now out of garbage collections, for good.

    vLLM collects eight times while an engine starts and ends, each time over all that was ever
    imported: most of the time that a tiny engine takes.
    """
    gc.collect()
    gc.freeze()
    with mock.patch.object(gc, "freeze"), mock.patch.object(gc, "unfreeze"):
        yield


@contextlib.contextmanager
def engine(model: Path, *, tp: int = 1, **options: Any) -> Iterator[Any]:
    """A real vLLM engine: in this process, or over the `mp` executor for `tp` > 1.

    In this process its batches depend on the requests alone, not on when they arrive. Engines of
    several tests may share a GPU, so that none measures what is free of it.
    """
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    llm = None
    small: dict[str, Any] = {}
    if torch.cuda.is_available():
        small = {"gpu_memory_utilization": 0.02, "kv_cache_memory_bytes": 2**28}
    settled = contextlib.ExitStack()
    settled.enter_context(_own_garbage_only())
    try:
        llm = LLM(
            model=str(model),
            **{
                **small,
                "dtype": "float32",
                "enforce_eager": True,
                "skip_tokenizer_init": True,
                "max_model_len": 512,
                "tensor_parallel_size": tp,
                "distributed_executor_backend": "mp" if tp > 1 else None,
                "seed": 0,
                "disable_log_stats": True,
                **options,
            },
        )
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
        settled.close()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
