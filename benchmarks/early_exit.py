"""Early exit against stock vLLM: decode speed where a chosen share of tokens leaves at a depth.

    python benchmarks/early_exit.py --quick --json result.json --plot result.png

`forced` cases let a pseudo-random share of the tokens leave, whatever they are: what the machinery
costs and saves, not what a model can spare. Case names: `early_exit/forced/l10/50/propagate` lets
50 % leave behind 10 layers under the cache policy `propagate`.

`trained` cases serve what `effplugin prepare early-exit` makes of the model for an agreement of
0.95 or 0.99, on prompts of its own. The first run prepares them, which takes some minutes each.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints import build_smollm2
from harness import (
    CACHE,
    Case,
    Engine,
    EngineSpec,
    Metric,
    argument_parser,
    efficient,
    main,
    select,
)

from vllm_effplugin.config import parse_efficiency
from vllm_effplugin.techniques.early_exit.evaluate import counting

AGREEMENTS = ("0.95", "0.99")
POLICIES = ("recompute", "propagate", "copy")


OPENINGS = (
    "The bridge was closed because",
    "A healthy breakfast should",
    "Most volcanoes are found",
    "My grandmother taught me",
    "To change a bicycle tyre, first",
    "The capital of France is",
    "In the middle of the night",
    "Water boils when",
    "The committee decided that",
    "Bees are important because",
    "The first computers were",
    "Once upon a time there was",
    "If you want to save money,",
    "The human heart pumps",
    "During the summer holidays we",
    "A good teacher knows",
    "The train to the coast",
    "Scientists have discovered",
    "Photosynthesis is the process",
    "The old man and his dog",
    "Learning a new language",
    "The river flows through",
    "To bake bread you need",
    "The Roman Empire fell",
    "Children often ask",
    "The price of oil",
    "A long time ago in the desert",
    "Music has the power to",
    "The doctor told him that",
    "On the other side of the mountain",
    "Our solar system consists of",
    "The best way to learn is",
)


def openings(engine: Engine, count: int) -> list[list[int]]:
    """Prompts that no training text starts with."""
    tokenizer = engine.llm.get_tokenizer()
    return [tokenizer(text)["input_ids"] for text in OPENINGS[:count]]


def short_prompts(engine: Engine, count: int) -> list[list[int]]:
    """Prompts of a few arbitrary tokens, each of another length.

    So that rows are at different positions: which tokens leave at a forced exit depends on position
    and id, and short prompts often end in the same few words.
    """
    lengthening = enumerate(engine.prompts(count, length=8 + count))
    return [prompt[: 8 + extra] for extra, prompt in lengthening]


@dataclass(frozen=True)
class DecodeThroughput:
    """Tokens per second of a full batch, from the first step in which every request got a token.

    Over all steps, because a step that makes up for skipped layers takes longer than the rest.
    """

    batch: int
    tokens: int
    prompts: Callable[[Engine, int], list[list[int]]]

    def __call__(self, engine: Engine) -> float:
        steps = engine.run(self.prompts(engine, self.batch), self.tokens)
        full = [step for step in steps if step.emitted == self.batch]
        emitted = sum(step.emitted for step in full[1:])
        return emitted / (full[-1].seconds - full[0].seconds)


@dataclass(frozen=True)
class Agreement:
    """Share of the decoded tokens that are the full model's, given what came before them."""

    tokens: int

    def __call__(self, engine: Engine) -> float:
        efficiency = getattr(engine.llm.llm_engine.model_config.hf_config, "efficiency", None)
        early_exit = parse_efficiency(efficiency).early_exit
        if early_exit is None or not early_exit.exits:
            return 1.0
        with counting(engine.llm, shadow=1.0) as spent:
            engine.run(openings(engine, len(OPENINGS)), self.tokens)
        return spent.agreement(len(OPENINGS) * self.tokens)


def speed_metrics(prompts: Callable[[Engine, int], list[list[int]]]) -> tuple[Metric, ...]:
    """Decode speed at three batch sizes."""
    return tuple(
        Metric(f"decode_tok_s_b{batch}", DecodeThroughput(batch, tokens, prompts), better="higher")
        for batch, tokens in ((1, 96), (8, 64), (32, 40))
    )


METRICS = speed_metrics(short_prompts)
TRAINED_METRICS = (
    *speed_metrics(openings),
    Metric("agreement", Agreement(40), better="higher"),
)


def early_exit(stock: EngineSpec, policy: str, *exits: dict[str, Any]) -> EngineSpec:
    """`stock`, with exits."""
    return efficient(stock, early_exit={"exits": list(exits), "cache": policy})


def forced(depth: int, percent: int) -> dict[str, Any]:
    """An exit at which a share of the tokens leaves."""
    return {"depth": depth, "gate": "rate", "threshold": 1 - percent / 100}


def cases(smollm2: Path) -> list[Case]:
    """Off, idle, and forced exits at a third and at two thirds of SmolLM2's 30 layers."""
    stock = EngineSpec(str(smollm2))
    never = [{"depth": depth, "gate": "rate", "threshold": 0.9999999} for depth in (10, 20)]
    with_tokenizer = {"skip_tokenizer_init": False}
    off = [{**point, "threshold": 1} for point in never]
    shares = itertools.product((10, 20), (100, 50), POLICIES)
    quick = {"l10/100/propagate", "l10/100/recompute", "l10/50/propagate", "l10/50/recompute"}
    return [
        Case("early_exit/off", stock, early_exit(stock, "recompute", *off), METRICS, quick=True),
        Case("early_exit/idle", stock, early_exit(stock, "recompute", *never), METRICS, quick=True),
        *(
            Case(
                f"early_exit/forced/l{depth}/{percent}/{policy}",
                stock,
                early_exit(stock, policy, forced(depth, percent)),
                METRICS,
                quick=f"l{depth}/{percent}/{policy}" in quick,
            )
            for depth, percent, policy in shares
        ),
        *(
            Case(
                f"early_exit/trained/{agreement}",
                EngineSpec(str(smollm2), options=with_tokenizer),
                EngineSpec(str(trained(smollm2, agreement)), options=with_tokenizer),
                TRAINED_METRICS,
                quick=True,
            )
            for agreement in AGREEMENTS
        ),
    ]


def trained(smollm2: Path, agreement: str) -> Path:
    """Where the checkpoint with trained exits is kept."""
    return smollm2.with_name(f"{smollm2.name}-exits-{agreement}")


def prepare_trained(smollm2: Path, agreement: str) -> None:
    """Make the checkpoint with trained exits, unless it is there."""
    tokens = ("--text-tokens", "40960", "--held-out-tokens", "24576")
    prepare(smollm2, trained(smollm2, agreement), "--min-agreement", agreement, *tokens)


def prepare(model: Path, out: Path, *options: str) -> None:
    """Run `effplugin prepare early-exit`, unless its checkpoint is there."""
    if not (out / "config.json").exists():
        command = [sys.executable, "-m", "vllm_effplugin.cli.main", "prepare", "early-exit"]
        subprocess.run([*command, str(model), str(out), *options], check=True)


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--model", type=Path, default=CACHE / "smollm2", help="SmolLM2 checkpoint directory"
    )
    arguments = parser.parse_args()
    if not arguments.list:
        build_smollm2(arguments.model)
    found = cases(arguments.model)
    chosen = select(found, arguments.cases, quick=arguments.quick)
    for agreement in AGREEMENTS if not arguments.list else ():
        if any(case.path == f"early_exit/trained/{agreement}" for case in chosen):
            prepare_trained(arguments.model, agreement)
    sys.exit(main(arguments, found))
