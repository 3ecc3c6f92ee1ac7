"""The decoder trunk: vLLM's own, with its layers arranged by a plan.

Mixed into a family's trunk class. The trunk with a single segment is compiled whole, exactly as
vLLM compiles the stock model; with boundaries, each segment is compiled by itself and the trunk
runs uncompiled between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import Any

from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.sequence import IntermediateTensors

from vllm_effplugin.engine.batch import cached_part, remember_batches
from vllm_effplugin.engine.graphs import GraphInputs
from vllm_effplugin.engine.loop import TrunkLoop
from vllm_effplugin.engine.segments import (
    build_segments,
    compiled_part,
    run_units,
    segment,
    to_end,
    whole_stack,
)
from vllm_effplugin.engine.sequences import Stack, sequence_loop
from vllm_effplugin.engine.settings import efficiency_of, plan_for
from vllm_effplugin.engine.state_pages import StatePages
from vllm_effplugin.plan import Plan, Unit
from vllm_effplugin.techniques.early_exit.exits import AllGates, Exit
from vllm_effplugin.techniques.early_exit.gates import MambaGate
from vllm_effplugin.techniques.early_exit.loop import ExitLoop
from vllm_effplugin.techniques.edge_cloud.config import EdgeConfig
from vllm_effplugin.techniques.edge_cloud.loop import EdgeLoop
from vllm_effplugin.techniques.layer_parallel.layer import (
    AttentionFactory,
    LayerGroup,
    group_class,
)
from vllm_effplugin.techniques.layer_parallel.weights import GroupCollector


def compile_trunk(cls: type[Any]) -> type[Any]:
    """Decorator: compile the trunk as one graph when its plan has a single segment."""
    return support_torch_compile(
        dynamic_arg_dims={
            "input_ids": {0: "b"},
            "positions": {-1: "b"},
            "intermediate_tensors": {0: "b"},
            "inputs_embeds": {0: "b"},
        },
        enable_if=_is_single_segment,
    )(cls)


def _is_single_segment(vllm_config: VllmConfig) -> bool:
    return not plan_for(vllm_config.model_config.hf_config).boundaries


class LayerFactory:
    """What a family's trunk builds at each index: a layer, a group at its first one, or nothing.

    Args:
        single: the family's own layer, called as the family's trunk calls it.
        attention: the family's attention, with the heads of several layers.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        plan: Plan,
        single: Callable[..., nn.Module],
        attention: AttentionFactory,
    ) -> None:
        self._vllm_config, self._single, self._attention = vllm_config, single, attention
        self._layer_parallel = efficiency_of(vllm_config.model_config.hf_config).layer_parallel
        self._unit_of = plan.unit_of
        self._arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def __call__(self, *args: Any, prefix: str, **kwargs: Any) -> nn.Module:
        index = int(prefix.rsplit(".", 1)[-1])
        unit = self._unit_of[index]
        self._arguments = args, kwargs
        if not unit.is_group:
            return self._single(*args, prefix=prefix, **kwargs)
        if index != unit.first:
            return PPMissingLayer()
        config = self._layer_parallel
        assert config is not None
        return group_class(config)(self._vllm_config, unit, config, self._attention, prefix)

    def another(self, prefix: str) -> nn.Module:
        """One more layer of the family, once the trunk has built its own.

        Args:
            prefix: ends with the index of a layer of its kind.
        """
        args, kwargs = self._arguments
        return self._single(*args, prefix=prefix, **kwargs)


class PlannedTrunk(nn.Module):
    """Executes a plan: embedding, segment, boundary, segment, ..., final norm."""

    plan: Plan
    layers: nn.ModuleList
    norm: nn.Module
    embed_input_ids: Callable[[Tensor], Tensor]

    def arrange(
        self, vllm_config: VllmConfig, prefix: str, factory: LayerFactory | None = None
    ) -> None:
        """Split the built layers into segments. The last step of a family's `__init__`.

        Args:
            factory: that built the layers; None where exits have no layers of their own.
        """
        self.loop: TrunkLoop | None = None
        self.segments = None
        # What is compiled is a submodule: vLLM captures CUDA graphs where it finds one.
        self.parts = nn.ModuleList()
        if self.plan.has_exits:
            self._arrange_exits(vllm_config, prefix, factory)
        elif self.plan.has_sequences:
            self._arrange_sequences(vllm_config, prefix)
        else:
            self.segments = build_segments(self.plan, self, vllm_config, prefix)

    def _arrange_exits(
        self, vllm_config: VllmConfig, prefix: str, factory: LayerFactory | None
    ) -> None:
        early_exit = efficiency_of(vllm_config.model_config.hf_config).early_exit
        assert early_exit is not None
        hidden_size = vllm_config.model_config.get_hidden_size()
        exits = []
        for index, point in enumerate(early_exit.exits):
            name, own = f"{prefix}.exits.{index}", None
            if point.adapter == "block":
                assert factory is not None
                own = factory.another(name)
            exits.append(Exit(point, early_exit, hidden_size, own))
        self.exits = nn.ModuleList(exits)
        gates = [exit.gate for exit in exits if isinstance(exit.gate, MambaGate)]
        pages = None
        if gates:
            name, like = f"{prefix}.exits.0.gates", cached_part(self.layers[0])
            pages = StatePages(gates, like, name, vllm_config)
            for number, gate in enumerate(gates):
                gate.states = pages.part(number)
        self.gates = AllGates(exits, pages)
        blocks = [exit.block for exit in exits if exit.block is not None]
        for layer in (*(self.layers[unit.first] for unit in self.plan.units), *blocks):
            remember_batches(cached_part(layer))
        edge = efficiency_of(vllm_config.model_config.hf_config).edge_cloud
        if isinstance(edge, EdgeConfig):
            self.loop = EdgeLoop(self, early_exit, edge, self.plan, vllm_config, prefix)
        else:
            self.loop = ExitLoop(self, early_exit, self.plan, vllm_config, prefix)
        self.parts = self.loop.parts

    def _arrange_sequences(self, vllm_config: VllmConfig, prefix: str) -> None:
        for layer in self.layers:
            remember_batches(layer.self_attn.attn)
        *before, last = self.plan.segments
        graphs = GraphInputs(vllm_config, self.norm.weight.numel(), vllm_config.model_config.dtype)

        def part(forward: Callable[..., Any], name: str, units: Sequence[Unit]) -> nn.Module:
            made = compiled_part(forward, name, self, units, vllm_config, prefix)
            self.parts.append(made)
            return made

        self.loop = sequence_loop(
            Stack(
                layer_name=self.layers[0].self_attn.attn.layer_name,
                embed=lambda ids, _, embeds: self.embed(ids, embeds),
                segments=[
                    graphs.placed(part(segment, f"Segment{index}", each.units))
                    if each.units
                    else None
                    for index, each in enumerate(before)
                ],
                to_end=graphs.placed(part(to_end, "ToEnd", last.units)),
                plain=part(whole_stack, "Plain", self.plan.units),
                read=lambda hidden, residual: self.norm(hidden + residual),
                place="last",
                graphs=graphs,
            ),
            vllm_config,
        )

    def embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """What the first layer reads, `[T, d]`."""
        return self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Hidden states `[T, d]` after the final norm, from `[T]` token ids or their embeddings."""
        if self.loop is not None:
            return self.loop(input_ids, positions, inputs_embeds)
        hidden = self.embed(input_ids, inputs_embeds)
        residual = None
        if self.segments is None:
            hidden, residual = run_units(self.plan.units, self.layers, positions, hidden, residual)
        else:
            for part, _boundary in zip_longest(self.segments, self.plan.boundaries):
                hidden, residual = part(positions, hidden, residual)
        hidden, _ = self.norm(hidden, residual)
        return hidden


def arranged_weights(
    weights: Iterable[tuple[str, Tensor]], model: nn.Module, extra_prefix: str
) -> Iterator[tuple[str, Tensor]]:
    """Rewrite a stream of checkpoint tensors for the modules of the plan.

    Tensors of ordinary layers pass unchanged, in order. Those of grouped layers are gathered and
    leave fused, at the end. Tensors of the extra file replace the base tensors of their name.

    Args:
        model: the causal language model, with `model.plan` and `model.layers`.
        extra_prefix: marks the names of the extra file.
    """
    trunk: PlannedTrunk = model.model
    collector = GroupCollector(trunk.plan.groups)
    for name, tensor in weights:
        name = name.removeprefix(extra_prefix)
        if not collector.take(name, tensor):
            yield name, tensor
    for unit, members in collector.groups():
        group: LayerGroup = trunk.layers[unit.first]
        for name, tensor in group.fuse(members).items():
            yield f"{collector.prefix}{unit.first}.{name}", tensor
