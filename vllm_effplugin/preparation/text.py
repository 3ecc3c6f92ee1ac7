"""Text to measure and train on: a file's, or what the model itself writes.

Generated text needs no data set and stays close to what the model knows. Half the sequences open
like documents do; the other half start from one random token of the vocabulary, which spreads
them over topics (LLM-QAT, arXiv 2305.17888, section 2.1).

Shapes: `N` sequences, `S` positions.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_effplugin.errors import ConfigError
from vllm_effplugin.offline import run_with_engine

OPENINGS = (
    "",
    "The",
    "In",
    "A",
    "It was",
    "This article",
    "According to",
    "One of the",
    "When",
    "History of",
    "How to",
    "She said",
    "He was born in",
    "During the",
    "There are",
    "What is",
)

DOCUMENT_END = "\n\n"


@dataclass(frozen=True)
class Calibration:
    """Token ids `[N, S]` to search and train on, and others `[M, S]` to report quality on.

    Attributes:
        train_starts, held_out_starts: where a document starts, of the same shapes: sequences are
            packed, so that a document may start or end anywhere in one.
    """

    train: Tensor
    held_out: Tensor
    train_starts: Tensor
    held_out_starts: Tensor


@dataclass(frozen=True)
class TextShape:
    """How much text is wanted."""

    sequence_length: int
    train: int
    held_out: int
    at_least: int
    """Training sequences below which a file is too short; training repeats a shorter text."""


def from_file(path: Path, tokenizer: Any, shape: TextShape, seed: int) -> Calibration:
    """Sequences of a text file, drawn at random without overlap.

    Args:
        path: plain text, or `.jsonl` with a `text` field per line.

    Raises:
        ConfigError: for a file that is missing, malformed or too short.
    """
    ids: list[int] = []
    starts: list[bool] = []
    for document in read_documents(path):
        own = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        ids += own
        starts += [index == 0 for index in range(len(own))]
    windows = len(ids) // shape.sequence_length
    needed = shape.at_least + shape.held_out
    if windows < needed:
        raise ConfigError(
            f"--text {path} is too short: {len(ids)} tokens, at least "
            f"{needed * shape.sequence_length} are needed"
        )
    whole = windows * shape.sequence_length
    tokens = torch.tensor(ids[:whole]).view(windows, -1)
    begins = torch.tensor(starts[:whole]).view(windows, -1)
    order = torch.randperm(windows, generator=torch.Generator().manual_seed(seed))
    held_out, train = order[: shape.held_out], order[shape.held_out :][: shape.train]
    return Calibration(tokens[train], tokens[held_out], begins[train], begins[held_out])


def generated(model: Path, tokenizer: Any, shape: TextShape, seed: int) -> Calibration:
    """Sequences that the model samples at temperature 1, through vLLM in a process of its own.

    Raises:
        UnsupportedError: when vLLM is missing or cannot run the model.
    """
    prompts = _prompts(tokenizer, shape.held_out + shape.train, seed)
    rows = run_with_engine(_generate, str(model), prompts, shape.sequence_length, seed)
    tokens = torch.tensor(rows)
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[:, 0] = True
    count = shape.held_out
    return Calibration(tokens[count:], tokens[:count], starts[count:], starts[:count])


def read_text(path: Path) -> str:
    """The text of a `.txt` or `.jsonl` file.

    Raises:
        ConfigError: for a file that is missing or malformed.
    """
    text = "".join(read_documents(path))
    return text.removesuffix(DOCUMENT_END) if path.suffix == ".jsonl" else text


def read_documents(path: Path) -> list[str]:
    """The documents of a `.jsonl` file, each but a `.txt` file's only one with a blank line behind.

    Raises:
        ConfigError: for a file that is missing or malformed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text {path} cannot be read: {error}") from None
    if path.suffix != ".jsonl":
        return [text]
    documents = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            documents.append(str(json.loads(line)["text"]) + DOCUMENT_END)
        except (ValueError, KeyError, TypeError):
            raise ConfigError(
                f"--text {path}, line {number}: not a JSON object with a `text` field"
            ) from None
    return documents


def _prompts(tokenizer: Any, count: int, seed: int) -> list[list[int]]:
    """Openings and random tokens in turn, so that any part of the sequences has both."""
    chance = random.Random(seed)
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    openings = [
        start + tokenizer(opening, add_special_tokens=False)["input_ids"] for opening in OPENINGS
    ]
    ordinary = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    return [
        (i % 2 == 0 and openings[i // 2 % len(openings)]) or [chance.choice(ordinary)]
        for i in range(count)
    ]


def _generate(model: str, prompts: list[list[int]], length: int, seed: int) -> list[list[int]]:
    """Continue every prompt to `length` tokens; runs in the engine's process."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        max_model_len=length,
        max_num_seqs=128,
        seed=seed,
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    # No seed per request: that samples row by row, several times slower. The engine's seed and
    # the fixed order of the prompts make the text repeatable.
    sampling = [
        SamplingParams(
            temperature=1.0, max_tokens=length - len(prompt), ignore_eos=True, detokenize=False
        )
        for prompt in prompts
    ]
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling)
    return [
        [*prompt, *output.outputs[0].token_ids]
        for prompt, output in zip(prompts, outputs, strict=True)
    ]
