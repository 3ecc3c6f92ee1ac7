"""A group of layers as one vLLM module.

Two schedules, one interface: both are called like vLLM's decoder layers, with the hidden states
and the residual of the step before, and return the pair for the step after.

Shapes: `T` tokens, `d` hidden size, `p` members of the group, `k` members on this rank,
`H` heads and `D` head size of one member.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, ReplicatedLinear
from vllm.model_executor.models.llama import LlamaMLP

from vllm_effplugin.plan import Unit
from vllm_effplugin.techniques.layer_parallel.config import LayerParallelConfig
from vllm_effplugin.techniques.layer_parallel.placement import local_members
from vllm_effplugin.techniques.layer_parallel.weights import (
    LayerTensors,
    fuse_bypass,
    fuse_wide,
)

AttentionFactory = Callable[[VllmConfig, int, str], nn.Module]
"""Builds a family's attention with the heads of `size` layers: (vllm_config, size, prefix)."""


class _PassThrough(nn.Module):
    """Stands where a family's attention has its output projection, when members have their own."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x, None


class BypassGroup(nn.Module):
    """`y = x + sum_j [A_j(x) + M_j(x + A_j(x) + b_j)]` (CQIL, section 3.1).

    Each rank owns `k = p / tensor_parallel_size` whole members: with `k = 1`, one layer per rank,
    the group costs one all-reduce. A bypass needs the attention deltas of the other ranks, one
    all-gather more. Members on the same rank share one QKV projection, one attention call and one
    down projection.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        unit: Unit,
        config: LayerParallelConfig,
        attention: AttentionFactory,
        prefix: str,
    ) -> None:
        super().__init__()
        hf_config = vllm_config.model_config.hf_config
        size = len(unit.layers)
        self.tp_size = get_tensor_model_parallel_world_size()
        self.members = local_members(size, self.tp_size, get_tensor_model_parallel_rank())
        self.bypass = config.bypass
        self.double_count_bypass = config.double_count_bypass

        hidden, eps = hf_config.hidden_size, hf_config.rms_norm_eps
        k = len(self.members)
        self.input_layernorm = RMSNorm(hidden, eps=eps, has_weight=k == 1)
        self.self_attn = attention(vllm_config, size, f"{prefix}.self_attn")
        o_proj = self.self_attn.o_proj
        self.self_attn.o_proj = _PassThrough()
        mlp_bias = getattr(hf_config, "mlp_bias", False)
        self.o_proj = nn.ModuleList(
            ReplicatedLinear(
                o_proj.input_size // size,
                hidden,
                bias=o_proj.bias is not None,
                prefix=f"{prefix}.o_proj.{slot}",
                return_bias=False,
            )
            for slot in range(k)
        )
        self.post_attention_layernorm = nn.ModuleList(RMSNorm(hidden, eps=eps) for _ in range(k))
        self.gate_up_proj = nn.ModuleList(
            MergedColumnParallelLinear(
                hidden,
                [hf_config.intermediate_size] * 2,
                bias=mlp_bias,
                prefix=f"{prefix}.gate_up_proj.{slot}",
                disable_tp=True,
                return_bias=False,
            )
            for slot in range(k)
        )
        self.act_fn = SiluAndMul()
        self.down_proj = ReplicatedLinear(
            k * hf_config.intermediate_size,
            hidden,
            bias=mlp_bias,
            prefix=f"{prefix}.down_proj",
            return_bias=False,
        )

    def forward(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Both tensors `[T, d]`; the group's input `x` is their sum."""
        if residual is None:
            x = hidden_states
            normed = self.input_layernorm(x)
        else:
            normed, x = self.input_layernorm(hidden_states, residual)
        heads = self.self_attn(positions=positions, hidden_states=normed)  # [T, k * H * D]
        parts = heads.chunk(len(self.members), dim=-1)
        attention = [self.o_proj[slot](part) for slot, part in enumerate(parts)]  # A_j, [T, d]
        exchanged = self.bypass > 0 and self.tp_size > 1
        if exchanged:
            attention = self._exchange(attention)
        activations = []
        for slot, member in enumerate(self.members):
            # Without an exchange under tensor parallelism, only this rank's deltas are at hand.
            u = x + attention[member if self.bypass else slot]
            if (bypass := self._bypass(attention, member)) is not None:
                u = u + bypass
            gate_up = self.gate_up_proj[slot](self.post_attention_layernorm[slot](u))
            activations.append(self.act_fn(gate_up))
        wide = activations[0] if len(activations) == 1 else torch.cat(activations, dim=-1)
        output = self.down_proj(wide)
        added = _sum(attention)
        if self.double_count_bypass:
            bypasses = [self._bypass(attention, member) for member in range(len(attention))]
            added = added + _sum([bypass for bypass in bypasses if bypass is not None])
        if exchanged:
            # Every rank sums what it gathered. Were it left to the all-reduce, a rank whose member
            # has no bypass would not use the gathered deltas; compiled, it would drop the exchange
            # as dead code, and the other ranks would wait for it forever.
            return tensor_model_parallel_all_reduce(output) + added, x
        output = output + added
        return tensor_model_parallel_all_reduce(output) if self.tp_size > 1 else output, x

    def fuse(self, members: list[LayerTensors]) -> LayerTensors:
        """The tensors that this module loads, from those of the group's layers."""
        return fuse_bypass(members, self.members)

    def _exchange(self, attention: list[Tensor]) -> list[Tensor]:
        """The deltas of all `p` members, from the `k` of each rank."""
        tokens = attention[0].shape[0]
        gathered = tensor_model_parallel_all_gather(torch.cat(attention), dim=0)  # [p * T, d]
        return list(gathered.split(tokens))

    def _bypass(self, attention: list[Tensor], member: int) -> Tensor | None:
        """`b_j`, the sum of the deltas of the `min(d, j)` members before `j`; None for no member.

        Args:
            attention: deltas of all members, unless `d` is 0.
            member: `j`.
        """
        before = attention[max(0, member - self.bypass) : member] if self.bypass else []
        return _sum(before) if before else None


def _sum(tensors: list[Tensor]) -> Tensor:
    return sum(tensors[1:], tensors[0])


class FusedGroup(nn.Module):
    """`u = x + sum_i A_i(x)`, `y = u + sum_j M_j(u)`: one ordinary layer, `p` times as wide.

    Four projections and one attention call for the whole group. Under tensor parallelism it is
    split like any layer, with two all-reduces; where the group size is a multiple of the ranks,
    the split falls between members.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        unit: Unit,
        config: LayerParallelConfig,
        attention: AttentionFactory,
        prefix: str,
    ) -> None:
        super().__init__()
        del config  # the schedule has no parameters
        hf_config = vllm_config.model_config.hf_config
        size = len(unit.layers)
        self.input_layernorm = RMSNorm(
            hf_config.hidden_size, eps=hf_config.rms_norm_eps, has_weight=False
        )
        self.self_attn = attention(vllm_config, size, f"{prefix}.self_attn")
        self.post_attention_layernorm = RMSNorm(
            hf_config.hidden_size, eps=hf_config.rms_norm_eps, has_weight=False
        )
        self.mlp = LlamaMLP(
            hidden_size=hf_config.hidden_size,
            intermediate_size=size * hf_config.intermediate_size,
            hidden_act=hf_config.hidden_act,
            bias=getattr(hf_config, "mlp_bias", False),
            prefix=f"{prefix}.mlp",
        )

    def forward(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Both tensors `[T, d]`; the group's input `x` is their sum."""
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual

    def fuse(self, members: list[LayerTensors]) -> LayerTensors:
        """The tensors that this module loads, from those of the group's layers."""
        return fuse_wide(members)


LayerGroup = BypassGroup | FusedGroup


def group_class(config: LayerParallelConfig) -> type[BypassGroup] | type[FusedGroup]:
    """The module class of the configured schedule."""
    return FusedGroup if config.schedule == "fused" else BypassGroup


class MemberNorm(nn.Module):
    """A per-head norm whose weight belongs to the member a head comes from (Qwen3's q and k norm).

    Args:
        heads: heads on this rank, of all its members.
        norm: the family's norm, `weight` of shape `[D]`.
    """

    def __init__(self, heads: int, norm: RMSNorm) -> None:
        super().__init__()
        self.norm = RMSNorm(norm.hidden_size, eps=norm.variance_epsilon, has_weight=False)
        self.weight = nn.Parameter(torch.ones(heads, norm.hidden_size), requires_grad=False)
        self.weight.weight_loader = _load_head_weights

    def forward(self, heads: Tensor) -> Tensor:
        """`[T, heads, D]` -> the same shape."""
        return self.norm(heads) * self.weight


def _load_head_weights(parameter: nn.Parameter, loaded: Tensor) -> None:
    """Fill `[heads, D]` from one row per member, `[p, D]`; heads stand in member order."""
    heads = parameter.shape[0]
    total = heads * get_tensor_model_parallel_world_size()
    per_head = loaded.repeat_interleave(total // loaded.shape[0], dim=0)
    parameter.data.copy_(per_head.narrow(0, get_tensor_model_parallel_rank() * heads, heads))
