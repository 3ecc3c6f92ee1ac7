"""Classifiers: a trunk on a plan, the full model's head, and the heads of the exits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.pooler import DispatchPooler
from vllm.model_executor.layers.pooler.seqwise import ClassifierPoolerHead
from vllm.model_executor.models.adapters import as_seq_cls_model
from vllm.model_executor.models.bert import (
    BertForSequenceClassification,
    BertPoolingModel,
)
from vllm.model_executor.models.interfaces_base import default_pooling_type
from vllm.model_executor.models.utils import maybe_prefix
from vllm.v1.pool.metadata import PoolingMetadata

from vllm_effplugin.engine.batch import remember_batches
from vllm_effplugin.engine.graphs import GraphInputs
from vllm_effplugin.engine.loop import TrunkLoop
from vllm_effplugin.engine.segments import compiled_part
from vllm_effplugin.engine.sequences import Part, SequenceLoop, Stack, sequence_loop
from vllm_effplugin.engine.settings import efficiency_of, plan_for
from vllm_effplugin.models.families import (
    EfficientLlamaForCausalLM,
    EfficientMistralForCausalLM,
    EfficientQwen2ForCausalLM,
    EfficientQwen3ForCausalLM,
)
from vllm_effplugin.models.looped import EXTRA_PREFIX, LoopedModel
from vllm_effplugin.models.trunk import compile_trunk
from vllm_effplugin.techniques.joint_exit.heads import ExitHeads
from vllm_effplugin.techniques.joint_exit.request import as_prepared
from vllm_effplugin.techniques.multiplex.layers import multiplexers


class SequencePoolerHead(ClassifierPoolerHead):
    """vLLM's pooler head, on the logits of each row's exit.

    Args:
        stock: the head without exits; its classifier is the full model's.
        loop: knows which rows left, and with what logits, and which ran as one.
    """

    def __init__(self, stock: ClassifierPoolerHead, loop: SequenceLoop) -> None:
        super().__init__(
            classifier=self._logits,
            logit_mean=stock.logit_mean,
            logit_sigma=stock.logit_sigma,
            head_dtype=stock.head_dtype,
            activation=stock.activation,
        )
        self._full = (stock.classifier,)  # no submodule: it has its place in the model
        self._loop = loop
        self._depths: Any = None
        self._merged: Any = None

    def _logits(self, pooled: Tensor) -> Tensor:
        logits, self._depths, self._merged = self._loop.answer(self._full[0](pooled))
        return logits

    def forward(self, pooled_data: Any, pooling_metadata: PoolingMetadata) -> Any:
        """Probabilities of each row.

        Where it asked for `exit_report`, the number of its layers is behind them, and 1 if it left
        or stayed as the checkpoint has it, else 0; where it asked for `mux_report`, how many
        sequences ran as one.
        """
        answers = super().forward(pooled_data, pooling_metadata)
        extras = [params.extra_kwargs or {} for params in pooling_metadata.pooling_params]
        if not any(extra.get(name) for extra in extras for name in ("exit_report", "mux_report")):
            return answers
        return [
            torch.cat([row, row.new_tensor(self._report(place, extra))])
            for place, (row, extra) in enumerate(zip(answers, extras, strict=True))
        ]

    def _report(self, row: int, extra: dict[str, Any]) -> list[float]:
        report: list[float] = []
        if extra.get("exit_report"):
            report += [float(self._depths[row]), float(as_prepared(extra))]
        if extra.get("mux_report"):
            report.append(float(self._merged[row]))
        return report


class _EfficientClassifier(LoopedModel):
    """What classifiers share. Mixed into one that vLLM has built."""

    pooler: Any
    config: Any

    def add_heads(self, vllm_config: VllmConfig) -> None:
        """What the boundaries need, and a pooler that knows them. The last step of `__init__`."""
        if not isinstance(self.loop, SequenceLoop):
            return
        model = vllm_config.model_config
        efficiency, hidden_size = efficiency_of(model.hf_config), model.get_hidden_size()
        if efficiency.joint_exit is not None:
            self.exit_heads = ExitHeads(
                efficiency.joint_exit, hidden_size, model.hf_config.num_labels
            )
        if efficiency.multiplex is not None:
            self.multiplexers = multiplexers(hidden_size, efficiency.multiplex.sizes)
            self.multiplexers.to(model.dtype).eval().requires_grad_(False)
        classify = self.pooler.poolers_by_task["classify"]
        classify.head = SequencePoolerHead(classify.head, self.loop)
        # Classes of single tokens would need a head per exit that reads them.
        self.pooler = DispatchPooler({"classify": classify})


def _classifier(base: type[Any]) -> type[Any]:
    """vLLM's own way from a language model to a classifier, with exits."""

    class Classifier(_EfficientClassifier, as_seq_cls_model(base)):  # type: ignore[misc]
        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            self.add_heads(vllm_config)

    return Classifier


class EfficientLlamaForSequenceClassification(_classifier(EfficientLlamaForCausalLM)):  # type: ignore[misc]
    """Llama's classifier on a plan."""


class EfficientMistralForSequenceClassification(_classifier(EfficientMistralForCausalLM)):  # type: ignore[misc]
    """Mistral's classifier on a plan."""


class EfficientQwen2ForSequenceClassification(_classifier(EfficientQwen2ForCausalLM)):  # type: ignore[misc]
    """Qwen2's classifier on a plan."""


class EfficientQwen3ForSequenceClassification(_classifier(EfficientQwen3ForCausalLM)):  # type: ignore[misc]
    """Qwen3's classifier on a plan."""


# --- BERT: no residual pair, no positions behind the embedding, the first token is read -----------


def _bert_segment(self: Any, hidden: Tensor) -> Tensor:
    for unit in self.units:
        hidden = self.owned[0].encoder.layer[unit.first](hidden)
    return hidden


def _bert_stack(
    self: Any, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None
) -> Tensor:
    trunk = self.owned[0]
    hidden = trunk.embeddings(
        input_ids=input_ids, position_ids=positions, inputs_embeds=inputs_embeds
    )
    for unit in self.units:
        hidden = trunk.encoder.layer[unit.first](hidden)
    return hidden


@compile_trunk
class EfficientBertModel(BertPoolingModel):
    """BERT's trunk on a plan."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
        self.loop: SequenceLoop | None = None
        plan = plan_for(self.config)
        if not plan.has_sequences:
            return
        layers = self.encoder.layer
        for layer in layers:
            remember_batches(layer.attention.self.attn)
        model = vllm_config.model_config
        graphs = GraphInputs(vllm_config, model.get_hidden_size(), model.dtype)
        parts: list[Any] = [
            compiled_part(_bert_segment, f"Segment{index}", self, part.units, vllm_config, prefix)
            if part.units
            else None
            for index, part in enumerate(plan.segments)
        ]

        plain = compiled_part(_bert_stack, "Plain", self, plan.units, vllm_config, prefix)
        # What is compiled is a submodule: vLLM captures CUDA graphs where it finds one.
        self.parts = nn.ModuleList([*(part for part in parts if part is not None), plain])

        def to_boundary(part: Any) -> Part:
            return graphs.placed(lambda _, hidden, __: (part(hidden), None))

        *before, last = parts
        self.loop = sequence_loop(
            Stack(
                layer_name=layers[0].attention.self.attn.layer_name,
                embed=lambda ids, positions, embeds: self.embeddings(
                    input_ids=ids, position_ids=positions, inputs_embeds=embeds
                ),
                segments=[None if part is None else to_boundary(part) for part in before],
                to_end=graphs.placed(lambda _, hidden, __: last(hidden)),
                plain=plain,
                read=lambda hidden, _: hidden,
                place="first",
                graphs=graphs,
            ),
            vllm_config,
        )

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Hidden states `[T, d]` behind the last layer."""
        if self.loop is not None:
            return self.loop(input_ids, positions, inputs_embeds)
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)


@default_pooling_type(seq_pooling_type="CLS")
class EfficientBertForSequenceClassification(_EfficientClassifier, BertForSequenceClassification):
    """BERT's classifier on a plan."""

    encodes = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        # As the stock class does, which names its trunk's class.
        nn.Module.__init__(self)
        model = vllm_config.model_config
        config = model.hf_config
        self.num_labels = config.num_labels
        self.bert = EfficientBertModel(
            vllm_config=vllm_config,
            prefix=maybe_prefix(prefix, "bert"),
            embedding_class=self.embedding_class,
        )
        self.classifier = nn.Linear(config.hidden_size, config.num_labels, dtype=model.head_dtype)
        assert model.pooler_config is not None
        self.pooler = DispatchPooler.for_seq_cls(
            model.pooler_config, pooling=self.bert.pooler, classifier=self.classifier
        )
        self.connect(vllm_config)
        self.add_heads(vllm_config)

    @property
    def loop(self) -> TrunkLoop | None:
        return self.bert.loop

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load checkpoint tensors, named as in the stock model."""
        return super().load_weights(
            (name.removeprefix(EXTRA_PREFIX), tensor) for name, tensor in weights
        )
