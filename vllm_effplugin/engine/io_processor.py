"""Classification with options: `POST /pooling` with a `data` object, for classifiers with exits.

vLLM's `/classify` has no field for what a request asks of a model. Its interface for requests of
a model's own is an IO processor, which `/pooling` calls when a request has `data`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from vllm import PoolingParams, PoolingRequestOutput
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.plugins.io_processors.interface import IOProcessor
from vllm.renderers import BaseRenderer

from vllm_effplugin.engine.settings import efficiency_of
from vllm_effplugin.techniques.joint_exit.request import exit_pooling_params
from vllm_effplugin.techniques.joint_exit.uncertainty import prediction_set


class ClassifyData(BaseModel):
    """What `data` may hold."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    input: str | list[str] = Field(description="Text, or several.")
    exit: bool = Field(True, description="Whether the texts may leave early.")
    exit_bias: float | None = Field(
        None, allow_inf_nan=False, description="Above 0, they leave earlier."
    )

    @model_validator(mode="after")
    def _some(self) -> ClassifyData:
        if not self.input:
            raise ValueError("`input` is empty")
        return self


class ClassifyProcessor(IOProcessor[ClassifyData, list[dict[str, Any]]]):
    """Turns `data` into prompts with parameters, and rows of the pooler into answers."""

    def __init__(self, vllm_config: VllmConfig, renderer: BaseRenderer) -> None:
        super().__init__(vllm_config, renderer)
        hf_config = vllm_config.model_config.hf_config
        joint_exit = efficiency_of(hf_config).joint_exit
        assert joint_exit is not None
        self._exits = joint_exit
        self._depths = [*joint_exit.depths, hf_config.num_hidden_layers]
        # Overrides of the configuration leave the keys as JSON has them.
        self._labels = {int(place): name for place, name in hf_config.id2label.items()}
        # vLLM asks for a request's prompts and then, in the same task, for its parameters.
        self._asked: ContextVar[ClassifyData] = ContextVar("asked")

    def parse_data(self, data: object) -> ClassifyData:
        """Validate; what is wrong gets HTTP 400."""
        try:
            return ClassifyData.model_validate(data)
        except ValidationError as error:
            problems = "; ".join(
                f"data.{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()
            )
            raise VLLMValidationError(problems, parameter="data") from None

    def pre_process(
        self, prompt: ClassifyData, request_id: str | None = None, **kwargs: Any
    ) -> Sequence[str]:
        """The texts."""
        self._asked.set(prompt)
        return [prompt.input] if isinstance(prompt.input, str) else prompt.input

    def merge_pooling_params(self, params: PoolingParams | None = None) -> PoolingParams:
        """What the request whose texts were just given asks of the exits."""
        asked = self._asked.get()
        merged = params or PoolingParams()
        wishes = exit_pooling_params(exit=asked.exit, exit_bias=asked.exit_bias, exit_report=True)
        merged.extra_kwargs = wishes.extra_kwargs
        merged.task, merged.use_activation = "classify", True  # answers are probabilities
        return merged

    def post_process(
        self,
        model_output: Sequence[PoolingRequestOutput],
        request_id: str | None = None,
        **kwargs: Any,
    ) -> list[dict[str, Any]]:
        """Probabilities, where each text got its answer, and its prediction sets."""
        return [self._answer(output.outputs.data.tolist()) for output in model_output]

    def _answer(self, row: list[float]) -> dict[str, Any]:
        *probabilities, depth, as_prepared = row
        place = self._depths.index(round(depth))
        best = max(range(len(probabilities)), key=probabilities.__getitem__)
        sets = [
            {
                "coverage": level.coverage,
                "labels": [
                    self._labels[i] for i in prediction_set(probabilities, level.thresholds[place])
                ],
            }
            # They hold for what leaves where the checkpoint's own rule says.
            for level in (self._exits.conformal if as_prepared else ())
        ]
        return {
            "label": self._labels[best],
            "probs": probabilities,
            "layers": round(depth),
            "sets": sets,
        }
