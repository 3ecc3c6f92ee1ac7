"""A small Mamba-2 that speaks SmolLM2's vocabulary, distilled from it: there is none to download.

    python benchmarks/train_mamba.py --text DIR/tinyshakespeare.txt --text DIR/pride.txt \
        --held-out DIR/wikitext2_valid.txt

SmolLM2 writes most of the text itself; files are added to it. The student sees, per token, the
teacher's most likely successors and their probabilities (KL divergence; the rest of the vocabulary
counts as one token). Everything is kept in a work directory, so that the same command goes on where
an interrupted one stopped.

Shapes: `N` tokens, `d` hidden size, `V` vocabulary, `K` successors.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from checkpoints import build_smollm2
from harness import CACHE
from pydantic import Field
from torch import Tensor
from tqdm.auto import tqdm
from transformers import Mamba2Config, Mamba2ForCausalLM

from vllm_effplugin.preparation.base import load_model, load_tokenizer, text_windows
from vllm_effplugin.preparation.decoder import Decoder
from vllm_effplugin.preparation.precision import autocast, default_precision
from vllm_effplugin.preparation.state_space import StateSpaceDecoder
from vllm_effplugin.preparation.text import TextShape, generated
from vllm_effplugin.preparation.trainer import WindowTrainer, WindowTrainerSettings
from vllm_effplugin.preparation.workdir import WorkDirectory

LENGTH = 256
SUCCESSORS = 32
HEAD_CHUNK = 512
"""Tokens whose `[chunk, V]` logits exist at a time."""

SIZES: dict[str, dict[str, int]] = {
    "16m": {"hidden_size": 256, "num_hidden_layers": 8, "num_heads": 8, "state_size": 64},
    "170m": {"hidden_size": 768, "num_hidden_layers": 24, "num_heads": 24, "state_size": 128},
}
"""`16m` is for two CPU cores and an hour, `170m` for a GPU."""


class Settings(WindowTrainerSettings):
    """How to train."""

    learning_rate: float = Field(1.5e-3, gt=0)
    batch: int = Field(8, ge=1)
    save_seconds: float = Field(300.0, ge=0)


class SuccessorDivergence(torch.autograd.Function):
    """Head and mean KL(teacher || student) in one, a chunk of tokens at a time.

    The teacher's distribution is over its `K` most likely tokens, and all others as one.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, ids: Tensor, shares: Tensor) -> Tensor:
        """Loss of normed `[N, d]` states under `[V, d]` head weights.

        Args:
            ids, shares: `[N, K]` tokens and their probabilities.
        """
        working = torch.bfloat16 if default_precision() == "bf16" else torch.float32
        weight = head.to(working)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        to_hidden, to_head = torch.empty_like(hidden), torch.zeros_like(head)
        for start in range(0, len(hidden), HEAD_CHUNK):
            part = slice(start, start + HEAD_CHUNK)
            states = hidden[part].to(working)
            q = (states @ weight.T).float().softmax(-1)
            chosen, p = q.gather(1, ids[part]), shares[part]
            rest = (1 - p.sum(-1)).clamp(min=1e-6)
            others = (1 - chosen.sum(-1)).clamp(min=1e-6)
            kl = (p * (p.clamp(min=1e-9) / chosen.clamp(min=1e-9)).log()).sum(-1)
            total += (kl + rest * (rest / others).log()).double().sum()
            q *= (1 - rest / others)[:, None]
            gradient = q.scatter_(1, ids[part], chosen - p).to(working)
            to_hidden[part] = gradient @ weight
            to_head += gradient.T @ states
        count = len(hidden)
        ctx.save_for_backward(to_hidden.div_(count), to_head.div_(count))
        return (total / count).to(torch.float32)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """The gradients of states and head."""
        to_hidden, to_head = ctx.saved_tensors
        return upstream * to_hidden, upstream * to_head, None, None


class Distiller(WindowTrainer):
    """Trains a student, in place.

    Args:
        targets: `ids` and `shares`, `[windows, S, K]` each.
    """

    def __init__(
        self, student: Any, settings: Settings, tokens: Tensor, targets: dict[str, Tensor]
    ) -> None:
        super().__init__(settings, tokens, "distilling")
        self._precision = settings.precision
        self._decoder, self._targets = StateSpaceDecoder(student), targets
        self._head = student.lm_head.weight
        self.optimise(dict(student.named_parameters()))

    def objective(self, rows: Tensor) -> tuple[Tensor, float]:
        """KL in nats per token."""
        device = self._head.device
        decoder = self._decoder
        with autocast(device, self._precision):
            hidden, context = decoder.embed(self.tokens[rows].to(device))
            hidden = decoder.run_layers(range(len(decoder.layers)), hidden.float(), context)
        normed = decoder.norm(hidden.float()).flatten(0, 1)
        ids, shares = (self._targets[name][rows].flatten(0, 1) for name in ("ids", "shares"))
        loss = SuccessorDivergence.apply(
            normed, self._head, ids.long().to(device), shares.float().to(device)
        )
        return loss, float(loss.detach())


@torch.inference_mode()
def successors(teacher: Any, tokens: Tensor, batch: int = 8) -> dict[str, Tensor]:
    """What the teacher says behind each of `[windows, S]` tokens."""
    shape = (*tokens.shape, SUCCESSORS)
    ids = torch.empty(shape, dtype=torch.int32)
    shares = torch.empty(shape, dtype=torch.float16)
    with tqdm(total=tokens.numel(), desc="teacher", unit="tok", unit_scale=True) as bar:
        for start in range(0, len(tokens), batch):
            part = tokens[start : start + batch].to(teacher.device)
            decoder = Decoder(teacher)
            hidden, context = decoder.embed(part)
            hidden = decoder.run_layers(range(len(decoder.layers)), hidden, context)
            for row, states in enumerate(hidden, start):
                top = decoder.logits(states).float().softmax(-1).topk(SUCCESSORS)
                ids[row], shares[row] = top.indices.int().cpu(), top.values.half().cpu()
            bar.update(part.numel())
    return {"ids": ids, "shares": shares}


@torch.no_grad()
def new_student(teacher: Any, size: str, seed: int) -> Any:
    """Random but for its embeddings: the teacher's, in the directions in which they vary most."""
    torch.manual_seed(seed)
    sizes = SIZES[size]
    config = Mamba2Config(
        vocab_size=teacher.config.vocab_size,
        head_dim=2 * sizes["hidden_size"] // sizes["num_heads"],
        expand=2,
        n_groups=1,
        conv_kernel=4,
        tie_word_embeddings=True,
        bos_token_id=teacher.config.bos_token_id,
        eos_token_id=teacher.config.eos_token_id,
        pad_token_id=teacher.config.pad_token_id or 0,
        **sizes,
    )
    student = Mamba2ForCausalLM(config).float()
    table = teacher.model.embed_tokens.weight.float().cpu()
    width = min(config.hidden_size, table.shape[1])
    _, _, directions = torch.svd_lowrank(table, q=width, niter=4)
    weight = student.backbone.embeddings.weight
    weight[:, :width] = table @ directions
    student.lm_head.weight = weight  # one matrix
    return student.train().requires_grad_(True)


@torch.inference_mode()
def perplexity(decoder: Any, windows: list[list[int]]) -> float:
    """Of `[S]` windows, each by itself."""
    total, count = 0.0, 0
    device = next(decoder.model.parameters()).device
    for window in tqdm(windows, desc="perplexity", leave=False):
        ids = torch.tensor([window], device=device)
        hidden, context = decoder.embed(ids)
        hidden = decoder.run_layers(range(len(decoder.layers)), hidden, context)
        logits = decoder.logits(hidden)[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += len(window) - 1
    return math.exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--teacher", type=Path, default=CACHE / "smollm2")
    parser.add_argument("--out", type=Path, default=CACHE / "mamba2")
    parser.add_argument("--size", choices=SIZES, default="16m")
    parser.add_argument("--text", type=Path, action="append", default=[], help="more text")
    parser.add_argument("--held-out", type=Path, help="text for the perplexity")
    parser.add_argument("--held-out-tokens", type=int, default=65536)
    parser.add_argument("--generated-tokens", type=int, default=524288)
    parser.add_argument("--tokens", type=int, default=3_000_000, help="to train on, all passes")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    build_smollm2(arguments.teacher)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = ("size", "generated_tokens", "tokens", "seed")
    request: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    request["text"] = [path.name for path in arguments.text]
    work = WorkDirectory(arguments.out.with_name(f".{arguments.out.name}.work"), request)

    kept = work.tensors("text")
    if kept is None:
        tokenizer = load_tokenizer(arguments.teacher)
        shape = TextShape(LENGTH, arguments.generated_tokens // LENGTH, 0, 0)
        written = generated(arguments.teacher, tokenizer, shape, arguments.seed).train
        files = [
            window
            for path in arguments.text
            for window in text_windows(arguments.teacher, path, LENGTH)
            if len(window) == LENGTH
        ]
        more = torch.tensor(files, dtype=torch.int64).view(-1, LENGTH)
        kept = {"tokens": torch.cat([written, more])}
        work.save_tensors("text", kept)
    tokens = kept["tokens"]
    precision = default_precision()
    working = torch.bfloat16 if precision == "bf16" else torch.float32
    teacher = load_model(arguments.teacher, working).to(device)
    targets = work.tensors("successors")
    if targets is None:
        targets = successors(teacher, tokens)
        work.save_tensors("successors", targets)
    student = new_student(teacher, arguments.size, arguments.seed).to(device)
    settings = Settings(tokens=arguments.tokens, precision=precision, seed=arguments.seed)
    distiller = Distiller(student, settings, tokens, targets)
    distiller.train(work.folder)
    student.eval().to(torch.bfloat16).save_pretrained(arguments.out)
    load_tokenizer(arguments.teacher).save_pretrained(arguments.out)
    loss = sum(distiller.losses[-50:]) / len(distiller.losses[-50:])
    print(
        f"{sum(p.numel() for p in student.parameters()) / 1e6:.1f}M parameters, "
        f"{len(tokens) * LENGTH:,} tokens of text, {arguments.tokens:,} trained on in "
        f"{distiller.seconds:.0f} s, KL {loss:.3f} nats"
    )
    if arguments.held_out is not None:
        count = arguments.held_out_tokens
        windows = text_windows(arguments.teacher, arguments.held_out, LENGTH, count)
        for name, decoder in (
            ("teacher", Decoder(teacher.float())),
            ("student", StateSpaceDecoder(student.float())),
        ):
            print(
                f"{name}: perplexity {perplexity(decoder, windows):.2f} on "
                f"{arguments.held_out.name}, first {count} tokens in windows of {LENGTH}"
            )


if __name__ == "__main__":
    main()
