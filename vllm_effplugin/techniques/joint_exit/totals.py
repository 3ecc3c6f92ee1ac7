"""What the exits of a classifier count, and how `/metrics` shows it."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_effplugin.engine.counters import Counters, Layout
from vllm_effplugin.engine.metrics import Families, Reporter

MILLION = 1_000_000

FIELDS = {
    "layer_tokens": "layers run times tokens",
    "full_layer_tokens": "what that would have been without exits",
}
"""Name -> meaning."""


def sequence_totals(exits: int) -> Layout:
    """Those of a classifier with some exits, per exit and for the full model.

    `sequences` are those that got their answer there; `confidence` adds up the probability of
    their most likely class, in millionths.
    """
    return Layout(tuple(FIELDS), {"sequences": exits + 1, "confidence": exits + 1})


class SequenceReporter(Reporter):
    """Shows them.

    Args:
        depths: layers before each exit.
        num_layers: of the model.
    """

    def __init__(self, depths: Sequence[int], num_layers: int) -> None:
        self.layout = sequence_totals(len(depths))
        self._depths = (*depths, num_layers)

    def show(self, totals: Counters, labels: list[str], families: Families) -> None:
        answered, confident = totals.numbers("sequences"), totals.numbers("confidence")
        sequences = families.counter(
            "effplugin_classify_sequences", "Sequences that got their answer at a depth.", "depth"
        )
        confidence = families.counter(
            "effplugin_classify_confidence",
            "Sum of their most likely classes' probabilities; by the sequences, the mean.",
            "depth",
        )
        for depth, count, total in zip(self._depths, answered, confident, strict=True):
            sequences.add_metric([*labels, str(depth)], count)
            confidence.add_metric([*labels, str(depth)], total / MILLION)
        families.counter("effplugin_classify_layer_tokens", "Layers run times tokens.").add_metric(
            labels, totals["layer_tokens"]
        )
        families.counter(
            "effplugin_classify_full_layer_tokens", "What layer_tokens would be without exits."
        ).add_metric(labels, totals["full_layer_tokens"])
