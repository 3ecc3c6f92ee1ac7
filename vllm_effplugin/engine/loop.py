"""What runs a trunk whose plan has boundaries at which the rows of a batch change."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group

from vllm_effplugin.engine.counters import Counters, Layout, publish_for

if TYPE_CHECKING:
    from vllm.pooling_params import PoolingParams
    from vllm.sampling_params import SamplingParams

    from vllm_effplugin.engine.batch import RowSource


class TrunkLoop(ABC):
    """A technique's way through a trunk; one per model.

    Args:
        vllm_config: of the engine.
        totals: what it counts.
    """

    def __init__(self, vllm_config: VllmConfig, totals: Layout) -> None:
        self.vllm_config = vllm_config
        self._totals = totals
        self.counters = Counters(totals)
        self._source: RowSource | None = None

    @abstractmethod
    def __call__(
        self, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None
    ) -> Tensor:
        """Hidden states `[T, d]` after the final norm, where the runner looks for them."""

    def attach(self, source: RowSource, model: Any) -> None:
        """Where the rows of a step come from, and the whole model around the trunk."""
        self._source = source
        if get_tp_group().rank_in_group == 0:
            self.counters = publish_for(self, self.vllm_config, self._totals)

    @property
    def attached(self) -> bool:
        """Whether a runner shows its rows."""
        return self._source is not None

    @abstractmethod
    def admit(self, slot: int, params: SamplingParams | PoolingParams | None) -> None:
        """A request takes one of the runner's slots. Its wishes were checked when it arrived."""

    def release(self, slot: int) -> None:  # noqa: B027
        """The request in a slot has ended or lost its cache."""

    def weights_loaded(self) -> None:  # noqa: B027
        """The trunk has its weights, in the layout of the checkpoint."""

    def measure_costs(self, run_dummy: Callable[[int], bool]) -> None:  # noqa: B027
        """The engine is ready: measure what depends on the machine.

        Args:
            run_dummy: runs the model on so many tokens of requests that are none; false where
                there is no room for them.
        """

    def agreed(self, decisions: np.ndarray) -> np.ndarray:
        """The first rank's decisions, so that all ranks run the same."""
        if self.vllm_config.parallel_config.tensor_parallel_size == 1:
            return decisions
        group = get_tp_group()
        shared = torch.from_numpy(decisions).to(group.device)
        return group.broadcast(shared, src=0).cpu().numpy()
