"""What runners call of a model that knows its requests (engine/v1_rows.py, v2_state.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from vllm_effplugin.config.checkpoint import EXTRA_FOLDER
from vllm_effplugin.engine.batch import RowSource
from vllm_effplugin.engine.loop import TrunkLoop
from vllm_effplugin.engine.settings import efficiency_of

if TYPE_CHECKING:
    from vllm.pooling_params import PoolingParams
    from vllm.sampling_params import SamplingParams

EXTRA_PREFIX = f"{EXTRA_FOLDER}."
"""Marks names of the checkpoint's extra tensors while they are loaded."""


class LoopedModel(nn.Module):
    """Passes on to the loop of its trunk, if that has one."""

    encodes = False
    """Whether its attention looks both ways, without a cache."""

    @property
    def loop(self) -> TrunkLoop | None:
        """What runs the trunk where rows change on the way."""
        raise NotImplementedError

    def connect(self, vllm_config: VllmConfig) -> None:
        """Tell vLLM what the model needs. Once the trunk is built."""
        self.secondary_weights = self._extra_files(vllm_config)
        if self.loop is not None:
            # vLLM looks whether a model has this; without a loop its own choice stands.
            self.get_model_state_cls = self._model_state

    def _model_state(self) -> type[Any]:
        """Imported when runner V2 asks for it, because it needs what runner V2 needs."""
        from vllm_effplugin.engine import v2_state

        return v2_state.EncoderRowsModelState if self.encodes else v2_state.RowsModelState

    @staticmethod
    def _extra_files(vllm_config: VllmConfig) -> tuple[DefaultModelLoader.Source, ...]:
        """The checkpoint's extra tensors, which the loader streams after the base model's."""
        if not efficiency_of(vllm_config.model_config.hf_config).has_tensors:
            return ()
        return (
            DefaultModelLoader.Source(
                vllm_config.model_config.model,
                vllm_config.model_config.revision,
                subfolder=EXTRA_FOLDER,
                prefix=EXTRA_PREFIX,
                allow_patterns_overrides=["*.safetensors"],
            ),
        )

    def attach(self, source: RowSource) -> None:
        """Where the rows of a step come from."""
        if self.loop is not None:
            self.loop.attach(source, self)

    def admit_request(self, slot: int, params: SamplingParams | PoolingParams | None) -> None:
        """A request takes one of the runner's slots."""
        if self.loop is not None:
            self.loop.admit(slot, params)

    def release_request(self, slot: int) -> None:
        """The request in a slot has ended or lost its cache."""
        if self.loop is not None:
            self.loop.release(slot)

    def measure_costs(self, run_dummy: Callable[[int], bool]) -> None:
        """The engine is ready: measure what depends on the machine.

        Args:
            run_dummy: runs the model on so many tokens of requests that are none; false where
                there is no room for them.
        """
        if self.loop is not None:
            self.loop.measure_costs(run_dummy)
