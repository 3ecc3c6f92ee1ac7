"""Inputs of compiled parts whose CUDA graphs are replayed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import override_forward_context

from vllm_effplugin.engine.graphs import NO_SLOT, GraphInputs

WIDTH = 4


@pytest.fixture
def inputs():
    compilation = SimpleNamespace(
        cudagraph_mode=CUDAGraphMode.PIECEWISE,
        cudagraph_capture_sizes=[8, 4, 2],
        compile_ranges_endpoints=[6, 10],
    )
    return GraphInputs(SimpleNamespace(compilation_config=compilation), WIDTH, torch.float32)


def run(inputs, tokens, mode):
    """A part's call in a forward pass of the runner's."""
    with override_forward_context(SimpleNamespace(cudagraph_runtime_mode=mode)):
        return inputs.place(torch.arange(tokens), torch.ones(tokens, WIDTH), None)


def mode_of(inputs, tokens):
    return inputs.context(torch.arange(tokens))["cudagraph_runtime_mode"]


def test_a_graph_is_asked_for_once_it_was_captured(inputs):
    """vLLM runs steps before it captures; one captured amid a step fails on CUDA."""
    run(inputs, 4, CUDAGraphMode.NONE)
    assert mode_of(inputs, 3) == CUDAGraphMode.NONE
    run(inputs, 4, CUDAGraphMode.PIECEWISE)
    assert inputs.captured == {4}
    assert mode_of(inputs, 3) == CUDAGraphMode.PIECEWISE
    assert mode_of(inputs, 2) == CUDAGraphMode.NONE
    assert mode_of(inputs, 9) == CUDAGraphMode.NONE


def test_places_and_slots_are_filled_up_alike(inputs):
    """Whether or not the graph is there yet."""
    for mode in (CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE):
        positions, hidden, _ = run(inputs, 3, mode)
        slots = inputs.context(torch.arange(3))["slot_mapping"]
        assert len(positions) == len(hidden) == len(slots) == 4
        assert slots[3] == NO_SLOT


def test_more_tokens_than_vllm_compiles_for_run_uncompiled(inputs):
    assert "skip_compiled" not in inputs.context(torch.arange(10))
    assert inputs.context(torch.arange(11))["skip_compiled"]
