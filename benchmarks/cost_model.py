"""What steps cost: the formulas and constants behind scale_model.py.

A layer reads its weights or multiplies, whichever takes longer, reads its cache, and starts its
kernels one after another; tensor-parallel ranks exchange activations after each half of it.
docs/scale-model.md says where each constant is from.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from vllm_effplugin.techniques.edge_cloud.gather import SHARE

BYTES = 2
"""Of a number, in bf16."""
FULL = 0.9
"""Of a device's memory, which weights and cache may take: vLLM's default."""
TOGETHER = 16
"""Tokens of a request whose cache entries may wait (`max_pending` of early exit)."""
EDGE_GATHER_S, CLOUD_GATHER_S = 0.050, 0.002
"""An edge's step waits so long at most, a cloud's after each question (`gather_ms`)."""

# --- Models ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A model.

    Attributes:
        layer, head: weights of a layer, and of the language model head.
        entry: numbers that a layer's cache keeps of a position.
        state: numbers of a layer's recurrent state that a token reads and writes.
        kernels: that a layer starts one after another. A Llama's: two norms, four products,
            rotation, attention, activation.
    """

    name: str
    layers: int
    hidden: int
    layer: int
    head: int
    entry: int = 0
    state: int = 0
    kernels: int = 9


def llama(
    name: str, layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, vocab: int,
    head_dim: int = 128,
) -> Shape:  # fmt: skip
    """`ffn` is the intermediate size."""
    layer = hidden * head_dim * 2 * (heads + kv_heads) + 3 * hidden * ffn
    return Shape(name, layers, hidden, layer, hidden * vocab, 2 * kv_heads * head_dim)


def mamba2(name: str, layers: int, hidden: int, heads: int, groups: int, vocab: int) -> Shape:
    """With heads of 64, states of 128, and an inner width of twice the hidden size."""
    layer = hidden * (4 * hidden + 2 * groups * 128 + heads) + 2 * hidden * hidden
    state = 2 * heads * 64 * 128
    return Shape(name, layers, hidden, layer, hidden * vocab, state=state, kernels=6)


LLAMA_7B = llama("7B", 32, 4096, 11008, 32, 32, 32000)
LLAMA_33B = llama("33B", 60, 6656, 17920, 52, 52, 32000)
LLAMA_70B = llama("70B", 80, 8192, 28672, 64, 8, 32000)
LLAMA_3B = llama("3.2B", 28, 3072, 8192, 24, 8, 128256)
LLAMA_480M = llama("480M", 16, 1536, 4096, 12, 4, 49152)
LLAMA_75M = llama("75M", 24, 512, 1408, 8, 4, 8192, head_dim=64)
SMOLLM2 = llama("SmolLM2-135M", 30, 576, 1536, 9, 3, 49152, head_dim=64)
MAMBA_370M = mamba2("Mamba-2 370M", 48, 1024, 32, 1, 50288)
CODESTRAL = mamba2("Codestral's width", 16, 4096, 128, 8, 32768)

# --- Machines -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """One rank.

    Attributes:
        bytes_per_s, flops: reached, not promised.
        kernel_s: from one kernel's end to the next one's start, and its ramp.
        step_s: of a step, outside its layers and the head.
        exchange_s, link_bytes_per_s: latency of an all-reduce, and each rank's way out.
        exit_s: host's time at an exit.
        fill_s: host's time to write the cache entries of tokens that left.
        memory: bytes of a device.
        overlaps: reads while it multiplies; else one after the other.
    """

    name: str
    bytes_per_s: float
    flops: float
    kernel_s: float
    step_s: float = 0.0
    exchange_s: float = 0.0
    link_bytes_per_s: float = math.inf
    exit_s: float = 0.0
    fill_s: float = 0.0
    memory: float = 80e9
    overlaps: bool = True


READS, MULTIPLIES, SENDS = 0.83, 0.54, 0.69
"""Shares of data sheets' figures that are reached."""


def gpu(name: str, tb_s: float, tflops: float, nvlink_gb_s: float, kernel_s: float) -> Machine:
    """From its data sheet; NVLink's figure counts both directions."""
    return Machine(
        name, READS * tb_s * 1e12, MULTIPLIES * tflops * 1e12, kernel_s, exchange_s=5.7e-6,
        link_bytes_per_s=SENDS * nvlink_gb_s / 2 * 1e9, exit_s=2.54e-3, fill_s=2.07e-3,
    )  # fmt: skip


A100 = gpu("A100", 2.039, 312, 600, 5.9e-6)
H100 = gpu("H100", 3.352, 989, 900, 3.7e-6)
H200 = replace(gpu("H200", 4.8, 989, 900, 3.7e-6), memory=141e9)
CPU = Machine("CPU", 30.5e9, 343e9, 21e-6, step_s=3.5e-3, exit_s=0.3e-3, overlaps=False)
"""Two cores."""
CORE = replace(CPU, bytes_per_s=26.3e9, flops=187.5e9)
"""One of them."""
FASTER = 1.79
"""What the same machine was on another day."""
QUICK_CPU = replace(
    CPU, bytes_per_s=FASTER * CPU.bytes_per_s, flops=FASTER * CPU.flops,
    kernel_s=CPU.kernel_s / FASTER, step_s=CPU.step_s / FASTER,
)  # fmt: skip
RANK = replace(
    QUICK_CPU, bytes_per_s=QUICK_CPU.bytes_per_s / 2, flops=QUICK_CPU.flops / 2, exchange_s=12.7e-6
)
"""A core then, while the other one is another rank."""


def fits(machine: Machine, shape: Shape, positions: float, ranks: int = 1) -> bool:
    """Whether weights, embedding included, and a cache of so many positions have room."""
    layers = shape.layers * (shape.layer + positions * shape.entry)
    return BYTES * (2 * shape.head + layers) / ranks <= FULL * machine.memory


# --- A step ---------------------------------------------------------------------------------------


def product_s(machine: Machine, weights: float, tokens: float) -> float:
    """Seconds to multiply weights with so many tokens."""
    read, multiply = BYTES * weights / machine.bytes_per_s, 2 * weights * tokens / machine.flops
    return max(read, multiply) if machine.overlaps else read + multiply


def exchange_s(machine: Machine, shape: Shape, tokens: float, ranks: int) -> float:
    """Seconds of an all-reduce of hidden states."""
    sent = 2 * (ranks - 1) / ranks * BYTES * tokens * shape.hidden
    return machine.exchange_s + sent / machine.link_bytes_per_s if ranks > 1 else 0.0


def stack_s(
    machine: Machine, shape: Shape, layers: float, tokens: float, positions: float = 0,
    ranks: int = 1, *, width: int = 1, exchanges: int = 2, kernels: float | None = None,
) -> float:  # fmt: skip
    """Seconds of equal layers.

    Args:
        positions: whose cache entries are read, over all requests.
        ranks: that share each layer.
        width: layers of the model that each of these is as wide as.
        exchanges, kernels: of each.
    """
    share = width / ranks
    cached = BYTES * share * (positions * shape.entry + tokens * shape.state)
    return layers * (
        product_s(machine, share * shape.layer, tokens)
        + cached / machine.bytes_per_s
        + (shape.kernels if kernels is None else kernels) * machine.kernel_s
        + exchanges * exchange_s(machine, shape, tokens, ranks)
    )


def around_s(machine: Machine, shape: Shape, rows: float, ranks: int = 1) -> float:
    """Seconds of a step outside its layers; `rows` tokens go through the head."""
    return machine.step_s + product_s(machine, shape.head / ranks, rows)


def stock_s(machine: Machine, shape: Shape, rows: float, context: float, ranks: int = 1) -> float:
    """Seconds of a decode step; `context` positions precede each of its rows."""
    layers = stack_s(machine, shape, shape.layers, rows, rows * context, ranks)
    return layers + around_s(machine, shape, rows, ranks)


# --- Techniques -----------------------------------------------------------------------------------


def grouped_s(
    machine: Machine, shape: Shape, rows: float, context: float, ranks: int, groups: int,
    size: int, how: Literal["wide", "members", "published"],
) -> float:  # fmt: skip
    """Seconds of a decode step with groups of `size` layers.

    Args:
        how: `wide`, each group one layer, `size` times as wide (schedule `fused`), shared by the
            ranks; `members`, whole layers side by side (`bypass`), `size / ranks` of them on each
            rank; `published`, the same, with what is in no group whole on each device.
    """
    positions, around = rows * context, 1 if how == "published" else ranks
    seconds = around_s(machine, shape, rows, around)
    seconds += stack_s(machine, shape, shape.layers - groups * size, rows, positions, around)
    apart: dict[str, Any] = {}
    if how != "wide":  # on each rank, a member has an output projection, a norm, and half an MLP
        apart = {"exchanges": 1, "kernels": 5 + 4 * size / ranks}
    return seconds + stack_s(machine, shape, groups, rows, positions, ranks, width=size, **apart)


def early_exit_s(
    machine: Machine, shape: Shape, rows: float, context: float, ranks: int, depth: int,
    share: float, policy: str,
) -> float:  # fmt: skip
    """Seconds of a decode step in which a share of the tokens leaves behind `depth` layers.

    Layers above run unless all rows leave. Under `recompute` every token runs them, later, and a
    row stays when `TOGETHER` of its tokens wait; under `propagate` entries are written that often,
    or when a row stays; `freeze` owes nothing.
    """
    if not share:
        return stock_s(machine, shape, rows, context, ranks)
    late = policy == "recompute"
    waits = share * (1 - 1 / TOGETHER)
    runs = 1 - (waits if late else share) ** rows
    tokens = rows if late else (1 - share) * rows
    seconds = around_s(machine, shape, rows, ranks) + machine.exit_s
    seconds += stack_s(machine, shape, depth, rows, rows * context, ranks)
    above = shape.layers - depth
    if runs:
        each = tokens / runs
        seconds += runs * stack_s(machine, shape, above, each, each * context, ranks)
    if policy == "propagate":
        writes = 1 - waits**rows
        weights = above * shape.hidden * shape.entry / ranks
        seconds += writes * (machine.fill_s + product_s(machine, weights, share * rows / writes))
    return seconds


def classify_s(
    machine: Machine, shape: Shape, texts: float, length: float, ranks: int, depth: float = 0,
    share: float = 0,
) -> float:  # fmt: skip
    """Seconds to classify texts at once, a share of which leaves behind `depth` layers."""
    tokens, above = texts * length, shape.layers - depth
    if not share:
        return machine.step_s + stack_s(machine, shape, shape.layers, tokens, ranks=ranks)
    seconds = machine.step_s + machine.exit_s + stack_s(machine, shape, depth, tokens, ranks=ranks)
    if runs := 1 - share**texts:
        stay = (1 - share) * tokens / runs
        seconds += runs * stack_s(machine, shape, above, stay, ranks=ranks)
    return seconds


def multiplexed_s(
    machine: Machine, shape: Shape, texts: int, length: float, ranks: int, depth: int, size: int
) -> float:
    """Seconds to classify texts at once, `size` of which are merged behind `depth` layers.

    Merging multiplies a composite's token with `d^2` weights on the way down and `2 d^2` of the
    couplings.
    """
    if size == 1:
        return classify_s(machine, shape, texts, length, ranks)
    merged, above = math.ceil(texts / size) * length, shape.layers - depth
    return (
        machine.step_s
        + machine.exit_s
        + stack_s(machine, shape, depth, texts * length, ranks=ranks)
        + product_s(machine, 3 * shape.hidden**2, merged)
        + stack_s(machine, shape, above, merged, ranks=ranks)
    )


@dataclass(frozen=True)
class Split:
    """A model on an edge and in a cloud, and what clients want of it.

    Attributes:
        partition: the edge's layers.
        asked: share of the tokens that the cloud gives.
        requests: in all; a client has one at a time.
        prompt, new: tokens of each.
        round_trip_s, bits_per_s: of the link.
    """

    partition: int
    asked: float
    requests: int
    prompt: int
    new: int
    round_trip_s: float = 0.040
    bits_per_s: float = 20e6

    def step_s(
        self, machine: Machine, shape: Shape, layers: int, rows: int, tokens: int, ranks: int
    ) -> float:
        """Seconds of a step of some layers and the head."""
        context = rows * (self.prompt + self.new / 2)
        stack = stack_s(machine, shape, layers, tokens, context, ranks)
        return stack + around_s(machine, shape, rows, ranks)


def split_s(
    edge: Machine, cloud: Machine, shape: Shape, clients: int, split: Split, ranks: int = 1
) -> tuple[float, float]:
    """Seconds until the last answer, and those of the cloud's engine.

    Played through, event by event: a step takes the requests that are ready, a question leaves
    when the link has carried all hidden states before it, and the cloud's next step runs what its
    request has not run there. Without questions it is one server.
    """
    draw = random.Random(0)
    sent_s = 8 * BYTES * shape.hidden / split.bits_per_s if split.asked else 0.0
    exit_s = edge.exit_s if split.asked else 0.0
    events: list[tuple[float, int, str, Sequence[int]]] = []
    made, owed = [0] * clients, [0] * clients
    ready, asking = list(range(min(clients, split.requests))), list[int]()
    left, parked, order = split.requests - len(ready), 0, 0
    edge_runs = cloud_runs = False
    now = ready_since = asked_at = link_free = spent = answered = 0.0

    def then(seconds: float, what: str, rows: Sequence[int] = ()) -> None:
        nonlocal order
        order += 1
        heapq.heappush(events, (now + seconds, order, what, rows))

    def go_on(rows: Sequence[int]) -> None:
        nonlocal left, ready_since, answered
        answered = now
        if not ready:
            ready_since = now
            then(EDGE_GATHER_S, "patience")
        for row in rows:
            made[row] = (made[row] + 1) % split.new
            if not made[row]:  # that was its last token, and the client's next request begins
                owed[row] = 0
                left -= 1
            if made[row] or left >= 0:
                ready.append(row)

    while True:
        few = len(ready) < SHARE * (len(ready) + parked)
        if ready and not edge_runs and not (few and now < ready_since + EDGE_GATHER_S):
            tokens = 0
            for row in ready:
                brings = 1 if made[row] else split.prompt + 1
                tokens, owed[row] = tokens + brings, owed[row] + brings
            seconds = split.step_s(edge, shape, split.partition, len(ready), tokens, ranks) + exit_s
            link_free = max(link_free, now + seconds) + sent_s * tokens
            then(seconds, "edge", ready)
            ready, edge_runs = [], True
        if asking and not cloud_runs and now >= asked_at + CLOUD_GATHER_S:
            tokens, above = sum(owed[row] for row in asking), shape.layers - split.partition
            seconds = split.step_s(cloud, shape, above, len(asking), tokens, ranks)
            spent += seconds
            for row in asking:
                owed[row] = 0
            then(seconds, "cloud", asking)
            asking, cloud_runs = [], True
        if not events:
            return answered, spent
        now, _, what, rows = heapq.heappop(events)
        if what == "edge":
            edge_runs = False
            asks = {row for row in rows if draw.random() < split.asked}
            parked += len(asks)
            if asks:
                then(link_free - now + split.round_trip_s / 2, "question", sorted(asks))
            go_on([row for row in rows if row not in asks])
        elif what == "question":
            asking, asked_at = [*asking, *rows], now
            then(CLOUD_GATHER_S, "patience")
        elif what == "cloud":
            cloud_runs = False
            then(split.round_trip_s / 2, "answer", rows)
        elif what == "answer":
            parked -= len(rows)
            go_on(rows)


def server_s(machine: Machine, shape: Shape, clients: int, split: Split, ranks: int = 1) -> float:
    """Seconds until the last answer of one server with the whole model."""
    whole = replace(split, partition=shape.layers, asked=0.0)
    return split_s(machine, machine, shape, clients, whole, ranks)[0]
