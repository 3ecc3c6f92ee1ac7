"""Checkpoints that several benchmarks serve."""

from __future__ import annotations

from pathlib import Path

import torch
from harness import CACHE, SEED

from vllm_effplugin.config import EfficiencyConfig, parse_efficiency
from vllm_effplugin.config.checkpoint import staged_directory, write_checkpoint
from vllm_effplugin.preparation.classifier import write_classifier
from vllm_effplugin.techniques.early_exit.config import EarlyExitConfig
from vllm_effplugin.techniques.edge_cloud.config import CloudConfig, EdgeConfig
from vllm_effplugin.techniques.edge_cloud.contexts import Limits
from vllm_effplugin.techniques.edge_cloud.split import model_name, write_part
from vllm_effplugin.techniques.multiplex.config import MULTIPLEXERS
from vllm_effplugin.techniques.multiplex.layers import Multiplexer

MADE = CACHE / "benchmarks" / "untrained"
LAYERS, HIDDEN = 30, 576
"""SmolLM2-135M's."""


def build_smollm2(folder: Path) -> None:
    """Build the demo checkpoint, unless it is there."""
    if not folder.exists():
        from vllm_effplugin.cli.demo import demo_model

        demo_model(folder)


def build_untrained(smollm2: Path) -> Path:
    """SmolLM2 with a classification head of random weights."""
    folder = MADE / "classifier"
    if not folder.exists():
        torch.manual_seed(0)
        with staged_directory(folder, overwrite=False) as staging:
            write_classifier(
                smollm2,
                staging,
                "LlamaForSequenceClassification",
                ("negative", "positive"),
                0.02 * torch.randn(2, HIDDEN),
                None,
            )
    return folder


def build_exits(smollm2: Path) -> Path:
    """SmolLM2 with exits that look at their own softmax, and a live comparison."""
    exits = [{"depth": depth, "gate": "softmax", "threshold": 0.4} for depth in (20, 25)]
    efficiency = parse_efficiency(
        {"early_exit": {"exits": exits, "shadow": 0.1, "compaction": "always"}}
    )
    write_checkpoint(smollm2, MADE / "exits", efficiency, provenance={}, overwrite=True)
    return MADE / "exits"


def build_merging(smollm2: Path) -> Path:
    """A classifier whose texts leave after 10 layers or merge in pairs after 15."""
    torch.manual_seed(SEED)
    efficiency = parse_efficiency(
        {
            "joint_exit": {"rule": "confidence", "exits": [{"depth": 10, "threshold": 0.52}]},
            "multiplex": {"depth": 15, "sizes": [2]},
        }
    )
    assert efficiency.joint_exit is not None
    tensors = {
        name: 0.02 * torch.randn(shape)
        for name, shape in efficiency.joint_exit.tensors(HIDDEN, 2).items()
    }
    layer = Multiplexer(HIDDEN, 2)
    layer.initialise()
    tensors |= {f"{MULTIPLEXERS}.2.{name}": value for name, value in layer.state_dict().items()}
    write_checkpoint(
        build_untrained(smollm2),
        MADE / "merging",
        efficiency,
        tensors=tensors,
        provenance={},
        overwrite=True,
    )
    return MADE / "merging"


def build_parts(smollm2: Path, **limits: float) -> tuple[Path, Path]:
    """Edge and cloud, with gates that let a pseudo-random half of the tokens leave.

    Args:
        limits: of the cloud, instead of its own.
    """
    depth, name = 15, model_name(smollm2)
    gates = [{"depth": exit, "gate": "rate", "threshold": 0.5} for exit in (10, depth)]
    exits = EarlyExitConfig.model_validate({"exits": gates})
    edge = EdgeConfig(role="edge", model=name, layers=LAYERS, deadline_s=5.0)
    cloud = CloudConfig(role="cloud", model=name, partition=depth, limits=Limits(**limits))
    for part, first, end, efficiency in (
        ("edge", 0, depth, EfficiencyConfig(early_exit=exits, edge_cloud=edge)),
        ("cloud", depth, LAYERS, EfficiencyConfig(edge_cloud=cloud)),
    ):
        write_part(
            smollm2, MADE / part, first, end, efficiency,
            work=MADE, provenance={}, overwrite=True,
        )  # fmt: skip
    return MADE / "edge", MADE / "cloud"
