"""A boundary of a classifier's stack at which whole sequences may leave.

A sequence whose last token is in the step may leave with all its tokens; its answer is then that of
the exit's head, and the others run on without it.

Shapes: `R` sequences of the step ("rows"), `E` exits, `d` hidden size, `C` classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vllm_effplugin.errors import ConfigError
from vllm_effplugin.techniques.joint_exit.config import HEADS, JointExitConfig
from vllm_effplugin.techniques.joint_exit.heads import Decision, ExitHeads
from vllm_effplugin.techniques.joint_exit.request import engine_request

if TYPE_CHECKING:
    from vllm_effplugin.engine.batch import Rows
    from vllm_effplugin.engine.sequences import Passage


class ExitPass:
    """What the exits decide in one step.

    Args:
        heads: of the exits.
        asked: `[R]` rows that may leave.
        bias: `[R]` of their gates.

    Attributes:
        exits: `[R]` where rows left, or `E`.
        logits: `[R, C]` of those that left; None if none did.
    """

    def __init__(self, heads: ExitHeads, asked: np.ndarray, bias: np.ndarray) -> None:
        self._heads, self._asked = heads, asked
        self._device = heads.weight.device
        self._decision = Decision(heads, torch.from_numpy(bias).to(self._device, torch.float32))
        self.exits = np.full(len(asked), self.count)
        self.logits: Tensor | None = None
        self._here: tuple[np.ndarray, Tensor] = (asked, torch.empty(0))

    @property
    def count(self) -> int:
        """`E`."""
        return len(self._heads.config.exits)

    def decide(self, exit: int, passage: Passage) -> np.ndarray:
        """A mask of the rows that are left: who leaves at an exit."""
        leaves = np.zeros(len(passage.alive), dtype=bool)
        wanted = np.flatnonzero(self._asked[passage.alive])
        if len(wanted):
            logits = self._heads.logits(exit, passage.states(wanted))
            rows = self._on_device(passage.alive[wanted])
            leaves[wanted] = self._decision.leaves(exit, logits.softmax(-1), rows).cpu().numpy()
            self._here = wanted, logits
        return leaves

    def leave(self, exit: int, alive: np.ndarray, leaves: np.ndarray) -> None:
        """Rows take the answers of an exit that has just decided.

        Args:
            alive: the rows that are left.
            leaves: a mask of them.
        """
        wanted, logits = self._here
        if self.logits is None:
            self.logits = logits.new_zeros(len(self.exits), logits.shape[1])
        temperature = self._heads.config.exits[exit].temperature
        gone = self._on_device(alive[leaves])
        self.logits[gone] = logits[self._on_device(leaves[wanted])] / temperature
        self.exits[alive[leaves]] = exit

    def answers(self, logits: Tensor) -> Tensor:
        """`[R, C]`: those of the exits, and the full model's `logits` where nobody left."""
        if self.logits is None:
            return logits
        away = self._on_device(self.exits < self.count)[:, None]
        return torch.where(away, self.logits.to(logits.dtype), logits)

    def _on_device(self, indices: np.ndarray) -> Tensor:
        return torch.from_numpy(indices).to(self._device, non_blocking=True)


class ExitBoundary:
    """All exits of a classifier.

    Args:
        config: exits and rule.
        slots: requests that the runner may hold.
    """

    heads: ExitHeads

    def __init__(self, config: JointExitConfig, slots: int) -> None:
        self.config = config
        self._bias = np.full(slots, config.bias)

    def admit(self, slot: int, extra: Mapping[str, Any] | None) -> None:
        """A request takes a slot.

        Args:
            extra: arguments of its own.
        """
        self._bias[slot] = engine_request(extra).bias(self.config.bias)

    def begin(self, rows: Rows) -> ExitPass | None:
        """A step; None if no sequence may leave in it."""
        bias = self._bias[rows.slots]
        asked = rows.completes & (bias > -np.inf)
        return ExitPass(self.heads, asked, bias) if asked.any() else None

    def replace(self, config: JointExitConfig, tensors: Mapping[str, Tensor]) -> None:
        """Other heads, gates and rule at the same depths; for measurements, between requests.

        Args:
            tensors: as in a checkpoint.
        """
        if config.depths != self.config.depths:
            raise ConfigError(f"exits at {self.config.depths} cannot become {config.depths}")
        self.config = config
        self._bias.fill(config.bias)
        heads = ExitHeads(config, self.heads.weight.shape[2], self.heads.weight.shape[1])
        heads.load_state_dict({k.removeprefix(f"{HEADS}."): v for k, v in tensors.items()})
        self.heads = heads.to(self.heads.weight.device)
