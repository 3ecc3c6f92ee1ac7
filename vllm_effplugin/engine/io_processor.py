"""Classification with options: `POST /pooling` with a `data` object, for efficient classifiers.

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
from vllm_effplugin.techniques.multiplex.request import multiplex_pooling_params


class ClassifyData(BaseModel):
    """What `data` may hold."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    input: str | list[str] = Field(description="Text, or several.")
    exit: bool = Field(True, description="Whether the texts may leave early.")
    exit_bias: float | None = Field(
        None, allow_inf_nan=False, description="Above 0, they leave earlier."
    )
    mux: bool = Field(True, description="Whether the texts may be merged with others.")
    mux_group: str | None = Field(
        None,
        min_length=1,
        max_length=256,
        description="With whom: those that say the same, such as a tenant's name.",
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
        efficiency = efficiency_of(hf_config)
        self._exits, self._multiplex = efficiency.joint_exit, efficiency.multiplex
        exits = () if self._exits is None else self._exits.depths
        self._depths = [*exits, hf_config.num_hidden_layers]
        # Overrides of the configuration leave the keys as JSON has them.
        self._labels = {int(place): name for place, name in hf_config.id2label.items()}
        # vLLM asks for a request's prompts and then, in the same task, for its parameters.
        self._asked: ContextVar[ClassifyData] = ContextVar("asked")

    def parse_data(self, data: object) -> ClassifyData:
        """Validate; what is wrong, or asks for what the model has not, gets HTTP 400."""
        try:
            asked = ClassifyData.model_validate(data)
        except ValidationError as error:
            problems = "; ".join(
                f"data.{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()
            )
            raise VLLMValidationError(problems, parameter="data") from None
        for technique, section in (("exit", self._exits), ("mux", self._multiplex)):
            for name in sorted(asked.model_fields_set):
                if section is None and name.split("_")[0] == technique:
                    raise VLLMValidationError(
                        f"data.{name}: the model has nothing of the kind", parameter="data"
                    )
        return asked

    def pre_process(
        self, prompt: ClassifyData, request_id: str | None = None, **kwargs: Any
    ) -> Sequence[str]:
        """The texts."""
        self._asked.set(prompt)
        return [prompt.input] if isinstance(prompt.input, str) else prompt.input

    def merge_pooling_params(self, params: PoolingParams | None = None) -> PoolingParams:
        """What the request whose texts were just given asks of the model."""
        asked = self._asked.get()
        merged = params or PoolingParams()
        exits = exit_pooling_params(exit=asked.exit, exit_bias=asked.exit_bias, exit_report=True)
        mux = multiplex_pooling_params(mux=asked.mux, mux_group=asked.mux_group, mux_report=True)
        merged.extra_kwargs = {**(exits.extra_kwargs or {}), **(mux.extra_kwargs or {})}
        merged.task, merged.use_activation = "classify", True  # answers are probabilities
        return merged

    def post_process(
        self,
        model_output: Sequence[PoolingRequestOutput],
        request_id: str | None = None,
        **kwargs: Any,
    ) -> list[dict[str, Any]]:
        """Probabilities, where each text got its answer, in what company, and prediction sets."""
        return [self._answer(output.outputs.data.tolist()) for output in model_output]

    def _answer(self, row: list[float]) -> dict[str, Any]:
        *probabilities, depth, as_prepared, merged = row
        place = self._depths.index(round(depth))
        best = max(range(len(probabilities)), key=probabilities.__getitem__)
        sets = [
            {
                "coverage": level.coverage,
                "labels": [
                    self._labels[i] for i in prediction_set(probabilities, level.thresholds[place])
                ],
            }
            # They hold for what leaves where the checkpoint's own rule says, and runs alone.
            for level in (self._exits.conformal if self._exits and as_prepared else ())
            if merged == 1
        ]
        answer = {
            "label": self._labels[best],
            "probs": probabilities,
            "layers": round(depth),
            "sets": sets,
        }
        if self._multiplex is not None:
            answer["merged"] = round(merged)
        return answer
