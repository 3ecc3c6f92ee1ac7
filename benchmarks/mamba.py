"""Exits of a Mamba-2 model, and gates that keep a state, against stock vLLM.

    python benchmarks/mamba.py --quick --json result.json --plot result.png
    python benchmarks/mamba.py --gates --json gates.json

Speed first: `mamba/backbone/half/POLICY` lets every decoded token of a random Mamba-2 of 370M
parameters leave behind half of its layers; `mamba/KIND/idle` has gates of a kind in SmolLM2 at a
third and at two thirds, and nothing leaves. `mamba/codestral/...` has the width of Codestral Mamba
7B, and 16 of its 64 layers.

`--gates` tells how well gates separate right from wrong exits, on held-out text that the model
wrote (area under the ROC curve), trained alike from several seeds.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from checkpoints import build_smollm2
from early_exit import DecodeThroughput, forced, short_prompts
from harness import (
    CACHE,
    SEED,
    Case,
    EngineSpec,
    Metric,
    PrefillThroughput,
    Row,
    argument_parser,
    as_table,
    describe_run,
    efficient,
    main,
    plot,
    select,
    write_json,
)
from rich.console import Console

from vllm_effplugin.config import EfficiencyConfig
from vllm_effplugin.config.checkpoint import write_checkpoint
from vllm_effplugin.techniques.early_exit.config import EarlyExitConfig

SHAPES: dict[str, dict[str, Any]] = {
    "mamba2-370m": {
        "hidden_size": 1024,
        "num_hidden_layers": 48,
        "num_heads": 32,
        "head_dim": 64,
        "state_size": 128,
        "n_groups": 1,
        "vocab_size": 50288,
        "tie_word_embeddings": True,
    },
    "codestral": {
        "hidden_size": 4096,
        "num_hidden_layers": 16,
        "num_heads": 128,
        "head_dim": 64,
        "state_size": 128,
        "n_groups": 8,
        "vocab_size": 32768,
        "tie_word_embeddings": False,
    },
}
POLICIES = ("freeze", "state-only", "recompute")
GATES = ("linear", "mlp", "mamba")
NEVER = 0.9999999
SEEDS = (0, 1, 2)
TRAIN_TOKENS, HELD_OUT_TOKENS, LENGTH = 65536, 32768, 256

METRICS = (
    Metric("decode_tok_s_b1", DecodeThroughput(1, 96, short_prompts), better="higher"),
    Metric("decode_tok_s_b32", DecodeThroughput(32, 40, short_prompts), better="higher"),
    Metric("prefill_tok_s", PrefillThroughput(count=4, length=512), better="higher"),
)
DECODE = METRICS[:2]


def cases(smollm2: Path, models: dict[str, Path]) -> list[Case]:
    """Forced exits of state-space models, and gates that never fire in SmolLM2."""
    found = []
    for name, label in (("mamba2-370m", "backbone"), ("codestral", "codestral")):
        # A state is large, and 32 requests have one of each layer.
        stock = EngineSpec(str(models[name]), options={"kv_cache_memory_bytes": 4 * 2**30})
        half = SHAPES[name]["num_hidden_layers"] // 2
        for policy in POLICIES:
            exits = {"exits": [forced(half, 100)], "cache": policy}
            ours = efficient(stock, "Mamba2", early_exit=exits)
            path = f"mamba/{label}/half/{policy}"
            found.append(Case(path, stock, ours, DECODE, quick=label == "backbone"))
        idle = {**forced(half, 0), "threshold": NEVER}
        ours = efficient(stock, "Mamba2", early_exit={"exits": [idle]})
        found.append(Case(f"mamba/{label}/idle", stock, ours, DECODE))
    stock = EngineSpec(str(smollm2))
    for kind in GATES:
        path = f"mamba/{'classifier' if kind == 'mamba' else kind}/idle"
        ours = EngineSpec(str(idle_gates(smollm2, kind)))
        found.append(Case(path, stock, ours, METRICS, quick=kind != "mlp"))
    return found


def idle_gates(smollm2: Path, kind: str) -> Path:
    """Where SmolLM2 with untrained gates of a kind is kept."""
    return CACHE / "benchmarks" / f"smollm2-idle-{kind}"


def build_idle_gates(smollm2: Path, kind: str) -> None:
    """Write it, unless it is there."""
    import torch

    from vllm_effplugin.techniques.early_exit.exits import Exit

    out = idle_gates(smollm2, kind)
    config = EarlyExitConfig.model_validate(
        {"exits": [{"depth": depth, "gate": kind, "threshold": NEVER} for depth in (10, 20)]}
    )
    torch.manual_seed(SEED)
    exits = [Exit(point, config, 576) for point in config.exits]
    tensors = {
        f"model.exits.{index}.{name}": value
        for index, exit in enumerate(exits)
        for name, value in exit.state_dict().items()
    }
    efficiency = EfficiencyConfig(early_exit=config)
    write_checkpoint(smollm2, out, efficiency, tensors=tensors, provenance={}, overwrite=True)


def build_state_space(folder: Path, shape: dict[str, Any]) -> None:
    """Write a Mamba-2 with seeded random weights, unless it is there."""
    if folder.exists():
        return
    import torch
    from transformers import Mamba2Config, Mamba2ForCausalLM

    torch.manual_seed(SEED)
    config = Mamba2Config(
        expand=2, conv_kernel=4, chunk_size=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        **shape,
    )  # fmt: skip
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model = Mamba2ForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(partial)
    partial.rename(folder)


# --- How well gates separate ----------------------------------------------------------------------


def gate_rows(model: Path, label: str) -> Iterator[Row]:
    """Area under the ROC curve of each kind of gate at each exit, against `linear`."""
    import numpy as np
    import torch

    from vllm_effplugin.preparation.base import find_text, load_model
    from vllm_effplugin.preparation.text import TextShape
    from vllm_effplugin.preparation.workdir import WorkDirectory
    from vllm_effplugin.techniques.early_exit.exits import Exit
    from vllm_effplugin.techniques.early_exit.features import Features, capture
    from vllm_effplugin.techniques.early_exit.thresholds import Sample, auroc
    from vllm_effplugin.techniques.early_exit.training import Trainer, TrainSettings, confidence

    loaded = load_model(model, torch.bfloat16)
    layers = int(loaded.config.num_hidden_layers)
    depths = sorted({layers * part // 12 for part in (7, 9, 10)})
    work = WorkDirectory(CACHE / "benchmarks" / f"gates-{label}", {"model": label, "v": 1})
    shape = TextShape(LENGTH, TRAIN_TOKENS // LENGTH, HELD_OUT_TOKENS // LENGTH, 1)
    text = find_text(model, None, shape, SEED, work)
    features = []
    for name, tokens, starts in (
        ("train", text.train, text.train_starts),
        ("held-out", text.held_out, text.held_out_starts),
    ):
        kept = work.tensors(name)
        if kept is None:
            kept = vars(capture(loaded, tokens, starts, depths, "bf16"))
            work.save_tensors(name, kept)
        features.append(Features(**kept))
    train, held_out = features
    # One matrix per exit, by least squares: the same for all kinds.
    plain = EarlyExitConfig.model_validate(
        {"exits": [{"depth": depth, "adapter": "linear"} for depth in depths]}
    )
    width = int(loaded.config.hidden_size)
    bare = [Exit(point, plain, width) for point in plain.exits]
    trainer = Trainer(loaded, TrainSettings(adapter_tokens=0))
    for index, exit in enumerate(bare):
        trainer.fit_adapter(exit, index, train)
    seen, asked = trainer.verdicts(bare, train), trainer.verdicts(bare, held_out)
    agrees = np.stack([verdict.agrees.numpy() for verdict in asked])
    shares = ", ".join(f"{share:.3f}" for share in agrees.mean(1))
    print(f"{label}, exits behind {depths} of {layers} layers: {shares} of the tokens are right")
    area = Metric("auroc", DecodeThroughput(1, 1, short_prompts), better="higher")
    found: dict[str, list[list[float]]] = {}
    for kind in GATES:
        config = EarlyExitConfig.model_validate(
            {"exits": [{"depth": depth, "gate": kind} for depth in depths]}
        )
        found[kind] = []
        for seed in SEEDS:
            torch.manual_seed(seed)
            exits = [Exit(point, config, width) for point in config.exits]
            Trainer(loaded, TrainSettings(seed=seed)).fit_gates(exits, train, seen)
            said = np.stack(
                [
                    confidence(exit, hidden, held_out.starts, verdict).numpy()
                    for exit, hidden, verdict in zip(exits, held_out.exits, asked, strict=True)
                ]
            )
            found[kind].append(auroc(Sample(said, agrees)))
        for place, depth in enumerate(depths):
            yield Row(
                f"mamba/gates/{label}/{kind}/l{depth}",
                area,
                [areas[place] for areas in found["linear"]],
                [areas[place] for areas in found[kind]],
            )


def compare_gates(arguments: Any) -> int:
    """`--gates`: the rows of every backbone that is there."""
    rows: list[Row] = []
    for label, model in (("smollm2", arguments.model), ("mamba2", CACHE / "mamba2")):
        if (model / "config.json").exists():
            rows += gate_rows(model, label)
    meta = describe_run(arguments)
    table = as_table(rows)
    Console(width=Console(width=1000).measure(table).maximum).print(table)
    if arguments.json is not None:
        write_json(arguments.json, meta, rows)
    if arguments.plot is not None:
        plot(arguments.plot, meta, rows)
    return 0


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--model", type=Path, default=CACHE / "smollm2", help="SmolLM2 checkpoint directory"
    )
    parser.add_argument("--gates", action="store_true", help="compare kinds of gates instead")
    arguments = parser.parse_args()
    folders = {name: CACHE / "benchmarks" / name for name in SHAPES}
    if not arguments.list:
        build_smollm2(arguments.model)
    if arguments.gates:
        sys.exit(compare_gates(arguments))
    found = cases(arguments.model, folders)
    if not arguments.list:
        wanted = select(found, arguments.cases, quick=arguments.quick)
        for name, folder in folders.items():
            if any(case.candidate.model == str(folder) for case in wanted):
                folder.parent.mkdir(parents=True, exist_ok=True)
                build_state_space(folder, SHAPES[name])
        for kind in GATES:
            build_idle_gates(arguments.model, kind)
    sys.exit(main(arguments, found))
