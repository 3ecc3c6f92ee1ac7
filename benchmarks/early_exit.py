"""Early exit against stock vLLM: decode speed where a chosen share of tokens leaves at a depth.

    python benchmarks/early_exit.py --quick --json result.json --plot result.png

`forced` cases let a pseudo-random share of the tokens leave, whatever they are: what the machinery
costs and saves, not what a model can spare. Case names: `early_exit/forced/l10/50/propagate` lets
50 % leave behind 10 layers under the cache policy `propagate`.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import CACHE, Case, Engine, EngineSpec, Metric, argument_parser, efficient, main
from layer_parallel import build_smollm2

POLICIES = ("recompute", "propagate", "copy")


@dataclass(frozen=True)
class DecodeThroughput:
    """Tokens per second of a full batch, from the first step in which every request got a token.

    Over all steps, because a step that makes up for skipped layers takes longer than the rest.
    """

    batch: int
    tokens: int

    def __call__(self, engine: Engine) -> float:
        steps = engine.run(engine.prompts(self.batch, length=8), self.tokens)
        full = [step for step in steps if step.emitted == self.batch]
        emitted = sum(step.emitted for step in full[1:])
        return emitted / (full[-1].seconds - full[0].seconds)


METRICS = tuple(
    Metric(f"decode_tok_s_b{batch}", DecodeThroughput(batch, tokens), better="higher")
    for batch, tokens in ((1, 96), (8, 64), (32, 40))
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
    ]


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--model", type=Path, default=CACHE / "smollm2", help="SmolLM2 checkpoint directory"
    )
    arguments = parser.parse_args()
    if not arguments.list:
        build_smollm2(arguments.model)
    sys.exit(main(arguments, cases(arguments.model)))
