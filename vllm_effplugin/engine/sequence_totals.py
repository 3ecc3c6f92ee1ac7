"""What a classifier counts whose sequences leave or merge, and how `/metrics` shows it."""

from __future__ import annotations

from vllm_effplugin.config import EfficiencyConfig
from vllm_effplugin.engine.counters import Counters, Layout
from vllm_effplugin.engine.metrics import Families, Reporter
from vllm_effplugin.techniques.joint_exit.totals import SequenceReporter
from vllm_effplugin.techniques.multiplex.totals import MultiplexReporter


class _Together(Reporter):
    """Several techniques' totals in one place.

    Args:
        parts: who shows which of them; no name occurs twice.
    """

    def __init__(self, parts: list[Reporter]) -> None:
        self._parts = parts
        self.layout = Layout(
            tuple(name for part in parts for name in part.layout.fields),
            {name: size for part in parts for name, size in part.layout.lists.items()},
        )

    def show(self, totals: Counters, labels: list[str], families: Families) -> None:
        for part in self._parts:
            part.show(totals, labels, families)


def sequence_reporter(efficiency: EfficiencyConfig, num_layers: int) -> Reporter:
    """Of a classifier with exits, with merging, or with both."""
    exits = efficiency.joint_exit
    parts: list[Reporter] = [SequenceReporter(exits.depths if exits else (), num_layers)]
    if efficiency.multiplex is not None:
        parts.append(MultiplexReporter(efficiency.multiplex.sizes))
    return _Together(parts)
