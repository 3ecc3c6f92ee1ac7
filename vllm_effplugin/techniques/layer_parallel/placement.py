"""Which rank holds which member of a group. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_effplugin.errors import UnsupportedError
from vllm_effplugin.plan import Plan
from vllm_effplugin.techniques.layer_parallel.config import LayerParallelConfig


def local_members(group_size: int, tp_size: int, tp_rank: int) -> range:
    """Members of a group that one rank owns whole: an equal, contiguous share.

    `tp_size` = `group_size` gives one layer per rank, `tp_size` = 1 the whole group.
    """
    share = group_size // tp_size
    return range(tp_rank * share, (tp_rank + 1) * share)


def check_placement(
    config: LayerParallelConfig,
    plan: Plan,
    *,
    tp_size: int,
    num_heads: int,
    num_kv_heads: int,
    layer_types: Sequence[str] | None = None,
) -> None:
    """Refuse groups that cannot be laid out over `tp_size` ranks, or mix kinds of attention.

    Under the bypass schedule a rank owns whole layers, so `tp_size` must divide every group.
    A fused group is one wide layer: it may instead be split by heads.

    Raises:
        UnsupportedError: naming the group, the setting and the way out.
    """
    for unit in plan.groups:
        layers, size = list(unit.layers), len(unit.layers)
        if layer_types is not None and len({layer_types[layer] for layer in layers}) > 1:
            raise UnsupportedError(
                f"layer-parallel group {layers} mixes kinds of attention "
                f"({', '.join(layer_types[layer] for layer in layers)}): group layers of one kind"
            )
        if size % tp_size == 0:
            continue
        by_heads = (size * num_heads) % tp_size == 0 and (size * num_kv_heads) % tp_size == 0
        if config.schedule == "fused" and by_heads:
            continue
        way_out = (
            "use `schedule: fused`, which also splits by heads, or"
            if config.schedule == "bypass" and by_heads
            else "use"
        )
        raise UnsupportedError(
            f"--tensor-parallel-size {tp_size} does not divide the layer-parallel group {layers} "
            f"of {size} layers: {way_out} groups whose size is a multiple of {tp_size}, "
            "or another tensor-parallel size"
        )
