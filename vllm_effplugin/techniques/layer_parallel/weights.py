"""From the tensors of a group's layers to the tensors of the module that runs the group.

Pure PyTorch. Checkpoint names stay as they are in every family: `self_attn.q_proj.weight` and so
on, relative to the layer. The result is named for the modules of `layer.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from vllm_effplugin.errors import CheckpointError
from vllm_effplugin.plan import Unit

LayerTensors = dict[str, Tensor]

_QKV = ("q_proj", "k_proj", "v_proj")


def fuse_bypass(members: Sequence[LayerTensors], local: range) -> LayerTensors:
    """Tensors of a `BypassGroup` on one rank.

    The members share one input, so their q, k and v projections stand in one matrix. When this
    rank owns several members, their first norms differ only in weights, which move into that
    matrix; a single member keeps its own norm.

    Args:
        members: one dictionary of relative names per layer of the group.
        local: indices of the members that this rank owns.
    """
    fold = len(local) > 1
    fused = _fused_qkv(members, fold=fold)
    own = [members[index] for index in local]
    if not fold:
        fused["input_layernorm.weight"] = own[0]["input_layernorm.weight"]
    for slot, member in enumerate(own):
        fused[f"post_attention_layernorm.{slot}.weight"] = member["post_attention_layernorm.weight"]
        for name, tensor in member.items():
            module, _, rest = name.partition("_proj.")
            if module == "self_attn.o":
                fused[f"o_proj.{slot}.{rest}"] = tensor
            elif module in ("mlp.gate", "mlp.up"):
                fused[f"{module.removeprefix('mlp.')}_proj.{slot}.{rest}"] = tensor
    fused["down_proj.weight"] = torch.cat([m["mlp.down_proj.weight"] for m in own], dim=1)
    fused.update(_summed_bias(own, "mlp.down_proj.bias", "down_proj.bias"))
    return fused


def fuse_wide(members: Sequence[LayerTensors]) -> LayerTensors:
    """Tensors of a `FusedGroup`: one ordinary layer with the heads and MLP columns of all members.

    Both norms move into the projections that follow them. The result covers all ranks; vLLM's
    parallel linear layers take their share while loading.

    Args:
        members: one dictionary of relative names per layer of the group.
    """
    fused = _fused_qkv(members, fold=True)
    fused["self_attn.o_proj.weight"] = torch.cat(
        [m["self_attn.o_proj.weight"] for m in members], dim=1
    )
    fused.update(_summed_bias(members, "self_attn.o_proj.bias", "self_attn.o_proj.bias"))
    for projection in ("gate_proj", "up_proj"):
        name = f"mlp.{projection}.weight"
        fused[name] = torch.cat(
            [_fold(m[name], m["post_attention_layernorm.weight"]) for m in members]
        )
        fused.update(_concatenated(members, f"mlp.{projection}.bias"))
    fused["mlp.down_proj.weight"] = torch.cat([m["mlp.down_proj.weight"] for m in members], dim=1)
    fused.update(_summed_bias(members, "mlp.down_proj.bias", "mlp.down_proj.bias"))
    return fused


def _fused_qkv(members: Sequence[LayerTensors], *, fold: bool) -> LayerTensors:
    fused: LayerTensors = {}
    for projection in _QKV:
        name = f"self_attn.{projection}.weight"
        fused[name] = torch.cat(
            [_fold(m[name], m["input_layernorm.weight"]) if fold else m[name] for m in members]
        )
        fused.update(_concatenated(members, f"self_attn.{projection}.bias"))
    for name in ("self_attn.q_norm.weight", "self_attn.k_norm.weight"):  # Qwen3
        if name in members[0]:
            fused[name] = torch.stack([m[name] for m in members])
    return fused


def _fold(weight: Tensor, norm: Tensor) -> Tensor:
    """Move a norm's weight into the projection after it: in fp32, rounded once."""
    return (weight.float() * norm.float()).to(weight.dtype)


def _concatenated(members: Sequence[LayerTensors], name: str) -> LayerTensors:
    return {name: torch.cat([m[name] for m in members])} if name in members[0] else {}


def _summed_bias(members: Sequence[LayerTensors], name: str, target: str) -> LayerTensors:
    if name not in members[0]:
        return {}
    total = sum((m[name].float() for m in members[1:]), members[0][name].float())
    return {target: total.to(members[0][name].dtype)}


class GroupCollector:
    """Gathers the tensors of each group's layers from a stream of checkpoint tensors.

    Args:
        units: the plan's groups.
        prefix: what precedes the layer number in checkpoint names, e.g. `model.layers.`.
    """

    def __init__(self, units: Iterable[Unit], prefix: str = "model.layers.") -> None:
        self.prefix = prefix
        self._unit_of = {layer: unit for unit in units for layer in unit.layers}
        self._tensors: dict[int, LayerTensors] = {layer: {} for layer in self._unit_of}

    def take(self, name: str, tensor: Tensor) -> bool:
        """Keep a tensor if it belongs to a group's layer; tell whether it does."""
        if not name.startswith(self.prefix):
            return False
        layer, _, rest = name.removeprefix(self.prefix).partition(".")
        if not layer.isdecimal() or int(layer) not in self._tensors:
            return False
        if "rotary_emb" not in rest:  # computed buffers that some old checkpoints carry
            self._tensors[int(layer)][rest] = tensor
        return True

    def groups(self) -> Iterator[tuple[Unit, list[LayerTensors]]]:
        """Each group with its layers' tensors; what was yielded is no longer kept.

        Raises:
            CheckpointError: when layers of a group do not have the same tensors, naming one.
        """
        for unit in dict.fromkeys(self._unit_of.values()):
            members = [self._tensors.pop(layer) for layer in unit.layers]
            names = set().union(*members)
            if not names:
                raise CheckpointError(f"the checkpoint has no tensors of layers {unit.layers}")
            for layer, member in zip(unit.layers, members, strict=True):
                if missing := sorted(names - member.keys()):
                    raise CheckpointError(f"the checkpoint lacks {self.prefix}{layer}.{missing[0]}")
            yield unit, members
