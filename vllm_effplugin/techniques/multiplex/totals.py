"""What a multiplexing classifier counts, and how `/metrics` shows it."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_effplugin.engine.counters import Counters, Layout
from vllm_effplugin.engine.metrics import Families, Reporter

FIELDS = ("alone", "member_tokens", "slot_tokens")


def multiplex_totals(sizes: int) -> Layout:
    """Those of so many sizes of groups.

    `alone` and `merged` are sequences that reached the layer of merging, the latter per size;
    `member_tokens` are those of merged sequences, `slot_tokens` the room in composites.
    """
    return Layout(FIELDS, {"merged": sizes})


class MultiplexReporter(Reporter):
    """Shows them.

    Args:
        sizes: numbers of sequences in a group.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.layout = multiplex_totals(len(sizes))
        self._sizes = tuple(sizes)

    def show(self, totals: Counters, labels: list[str], families: Families) -> None:
        sequences = families.counter(
            "effplugin_multiplex_sequences",
            "Sequences by how many ran as one; 1 for those that ran alone.",
            "size",
        )
        merged = totals.numbers("merged")
        for size, count in zip((1, *self._sizes), (totals["alone"], *merged), strict=True):
            sequences.add_metric([*labels, str(size)], count)
        slots, members = totals["slot_tokens"], totals["member_tokens"]
        for name, help, value in (
            ("effplugin_multiplex_slot_tokens", "Room in composites, in tokens.", slots),
            ("effplugin_multiplex_member_tokens", "What of that was used.", members),
        ):
            families.counter(name, help).add_metric(labels, value)


QUEUE_TOTALS = Layout(("passed_over", "held", "held_us"), {})
"""What the scheduler counts: requests that started a step later for the sake of better groups,
those that waited for a partner, and the microseconds that all of these waited for it."""


class QueueReporter(Reporter):
    """Shows them."""

    layout = QUEUE_TOTALS

    def show(self, totals: Counters, labels: list[str], families: Families) -> None:
        for name, help, value in (
            (
                "passed_over_requests",
                "Requests that started a step later, so that those in a step merge better.",
                totals["passed_over"],
            ),
            (
                "held_requests",
                "Requests held back until a partner came, or for long enough.",
                totals["held"],
            ),
            (
                "held_seconds",
                "Time that requests were passed over or held back.",
                totals["held_us"] / 1e6,
            ),
        ):
            families.counter(f"effplugin_multiplex_{name}", help).add_metric(labels, value)
