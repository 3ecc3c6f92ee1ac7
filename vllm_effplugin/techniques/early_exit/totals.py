"""What early exits count, and how `/metrics` shows it."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_effplugin.engine.counters import Counters, Layout
from vllm_effplugin.engine.metrics import Families, Reporter

FIELDS = {
    "decoded": "decoded tokens that might have left",
    "left": "tokens that left the batch",
    "recomputed": "waiting tokens taken along, once per exit that they pass",
    "layer_tokens": "layers run times tokens, prompts included",
    "full_layer_tokens": "what that would have been without exits",
    "pending": "tokens that wait for their skipped layers now",
    "shadowed": "tokens that left at an exit and ran all layers for comparison",
    "shadow_agreed": "of these, those whose exit said what the full model says",
}
"""Name -> meaning. All but `pending` only grow."""

_COUNTERS = {
    "decoded": ("decode_tokens", "Decoded tokens that might have left early."),
    "left": ("compacted_tokens", "Tokens that left the batch: deeper layers ran without them."),
    "recomputed": ("recomputed_tokens", "Waiting tokens that deeper layers ran later."),
    "layer_tokens": ("layer_tokens", "Layers run times tokens, prompts included."),
    "full_layer_tokens": ("full_layer_tokens", "What layer_tokens would be without exits."),
    "shadowed": ("shadow_tokens", "Tokens that left and ran all layers for comparison."),
    "shadow_agreed": ("shadow_agreed_tokens", "Of these, those on which exit and model agree."),
}


def exit_totals(exits: int) -> Layout:
    """Those of a model with some exits; `exits` are the tokens whose gate fired at each."""
    return Layout(tuple(FIELDS), {"exits": exits})


class ExitReporter(Reporter):
    """Shows them.

    Args:
        depths: layers before each exit.
    """

    def __init__(self, depths: Sequence[int]) -> None:
        self.layout = exit_totals(len(depths))
        self._depths = tuple(depths)

    def show(self, totals: Counters, labels: list[str], families: Families) -> None:
        exits = families.counter("effplugin_exit_tokens", "Tokens whose gate fired.", "depth")
        for depth, count in zip(self._depths, totals.numbers("exits"), strict=True):
            exits.add_metric([*labels, str(depth)], count)
        for name, (public, help) in _COUNTERS.items():
            family = families.counter(f"effplugin_exit_{public}", help)
            family.add_metric(labels, totals[name])
        families.gauge(
            "effplugin_exit_pending_tokens", "Tokens that wait for the layers that they skipped."
        ).add_metric(labels, totals["pending"])
