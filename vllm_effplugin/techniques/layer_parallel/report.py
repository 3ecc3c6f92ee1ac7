"""What `prepare` shows and stores: quality on held-out text, a table and the frontier plot.

Shapes: `M` sequences, `S` positions, `d` hidden size, `V` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import BaseModel
from rich.table import Table
from torch import Tensor
from tqdm.auto import tqdm

from vllm_effplugin.plan import Unit
from vllm_effplugin.preparation.head import LOGITS_CHUNK
from vllm_effplugin.preparation.plot import new_axes, to_png
from vllm_effplugin.techniques.layer_parallel.config import LayerParallelConfig
from vllm_effplugin.techniques.layer_parallel.reference import ReferenceDecoder
from vllm_effplugin.techniques.layer_parallel.search import SearchResult, partition_units


class Quality(BaseModel):
    """How well a model predicts held-out text, and how closely it follows the original."""

    depth: int
    perplexity: float
    agreement: float
    """Share of positions whose most likely next token is the original's."""
    kl: float
    """Mean KL(original || this) per token, in nats."""


class QualityMeter:
    """Compares models with the original on held-out text, in fp32.

    Args:
        model: the original model, in fp32.
        tokens: `[M, S]` held-out token ids.
    """

    def __init__(self, model: Any, tokens: Tensor) -> None:
        self._tokens = tokens
        self._original = ReferenceDecoder(model)
        self.num_layers = len(self._original.layers)
        units = partition_units((), self.num_layers)
        self._reference = self._final_hidden(self._original, units, None, "original")

    def original(self) -> Quality:
        """The original's own figures."""
        return self._compare(self._original, self._reference, self.num_layers)

    def measure(self, model: Any, config: LayerParallelConfig, what: str) -> Quality:
        """Figures of a model, in fp32, that runs under `config`.

        The model may be the original itself: its grouped, untrained self.
        """
        decoder = ReferenceDecoder(model)
        units = partition_units(config.resolve_groups(self.num_layers), self.num_layers)
        hidden = self._final_hidden(decoder, units, config, what)
        return self._compare(decoder, hidden, len(units))

    @torch.inference_mode()
    def _final_hidden(
        self,
        decoder: ReferenceDecoder,
        units: Sequence[Unit],
        config: LayerParallelConfig | None,
        what: str,
    ) -> list[Tensor]:
        """`[S, d]` hidden states behind the last layer, one tensor per sequence."""
        final = []
        for row in tqdm(self._tokens, desc=f"measuring: {what}", unit="sequence", leave=False):
            hidden, context = decoder.embed(row[None])
            final.append(decoder.run(units, hidden, context, config)[0])
        return final

    @torch.inference_mode()
    def _compare(self, decoder: ReferenceDecoder, hidden: list[Tensor], depth: int) -> Quality:
        loss = divergence = 0.0
        agreeing = positions = predicted = 0
        for row, ours, theirs in zip(self._tokens, hidden, self._reference, strict=True):
            for start in range(0, len(row), LOGITS_CHUNK):
                part = slice(start, start + LOGITS_CHUNK)
                q = torch.log_softmax(decoder.logits(ours[part]), -1)
                t = torch.log_softmax(self._original.logits(theirs[part]), -1)
                following = row[start + 1 : start + 1 + LOGITS_CHUNK, None]
                loss -= float(q[: len(following)].gather(-1, following).sum())
                divergence += float((t.exp() * (t - q)).sum())
                agreeing += int((t.argmax(-1) == q.argmax(-1)).sum())
                positions += len(q)
                predicted += len(following)
        return Quality(
            depth=depth,
            perplexity=math.exp(loss / predicted),
            agreement=agreeing / positions,
            kl=divergence / positions,
        )


def quality_table(rows: Mapping[str, Quality]) -> Table:
    """The final table, one row per model."""
    original = next(iter(rows.values()))
    table = Table(title="Quality on held-out text")
    for name in ("model", "depth", "perplexity", "ratio", "agreement", "KL (nats)"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for name, quality in rows.items():
        table.add_row(
            name,
            str(quality.depth),
            f"{quality.perplexity:.2f}",
            f"{quality.perplexity / original.perplexity:.3f}",
            f"{quality.agreement:.3f}",
            f"{quality.kl:.4f}",
        )
    return table


def pairs_table(result: SearchResult) -> Table:
    """Both measures of each chosen group: damage alone, and similarity of its layers' inputs."""
    alone = {item.groups[0]: item.kl for item in result.singles}
    table = Table(title="Chosen groups")
    for name in ("layers", "KL alone (nats)", "cosine of inputs"):
        table.add_column(name, justify="right")
    for group in result.best.groups:
        cosine = min(result.cosine[layer] for layer in group[:-1])
        table.add_row(" ".join(map(str, group)), f"{alone[group]:.4f}", f"{cosine:.4f}")
    return table


def frontier_png(result: SearchResult, rows: Mapping[str, Quality], num_layers: int) -> bytes:
    """Plot of damage against depth: the search, contiguous ranges, and the result."""
    from matplotlib.ticker import MaxNLocator

    axes = new_axes("sequential depth (units)", "KL to the original (nats per token)")
    searched = [(num_layers, 0.0), *((item.depth, item.kl) for item in result.frontier)]
    axes.plot(*zip(*searched, strict=True), "o-", label="search")
    if result.contiguous:
        least: dict[int, float] = {}
        for item in result.contiguous:
            least[item.depth] = min(item.kl, least.get(item.depth, math.inf))
        axes.plot(*zip(*sorted(least.items()), strict=True), "s--", label="contiguous range")
    for name, marker in (("grouped", "D"), ("repaired", "P"), ("distilled", "*")):
        if name in rows:
            axes.plot(
                rows[name].depth, rows[name].kl, marker, ms=10, label=f"{name}, held-out text"
            )
    axes.invert_xaxis()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return to_png(axes)
