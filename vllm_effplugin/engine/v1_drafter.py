"""Runner V1: drafts for `exit: "verify"`, through vLLM's speculative decoding.

Named in `--speculative-config`, method `custom_class`. vLLM schedules the drafts, verifies them in
the next step with its rejection sampler, and rolls back what it rejects.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from vllm.config import VllmConfig

from vllm_effplugin.errors import UnsupportedError


class ExitProposer:
    """Drafts with the layers before an exit."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        assert vllm_config.speculative_config is not None
        self._most = int(vllm_config.speculative_config.num_speculative_tokens)
        self._loop: Any = None

    def load_model(self, model: Any) -> None:
        """Called by the runner with the model that it has loaded."""
        self._loop = getattr(model, "loop", None)
        if self._loop is None:
            raise UnsupportedError(
                "--speculative-config asks for verified early exits, but the model has no exits: "
                "leave it off, or serve a checkpoint of `effplugin prepare early-exit`"
            )

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Drafts for each row of the step.

        Args:
            sampled_token_ids: what each row got in the step; nothing where it runs a prompt.
            num_tokens_no_spec: tokens that each row has now.
            token_ids_cpu: `[rows, positions]`.
            slot_mappings: unused; drafts have slots of their own.
        """
        rows = np.array([row for row, ids in enumerate(sampled_token_ids) if ids], dtype=np.int64)
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        if len(rows):
            positions = num_tokens_no_spec[rows].astype(np.int64) - 1
            ids = token_ids_cpu[rows, positions].astype(np.int64)
            guessed = self._loop.draft(rows, positions, ids, self._most)
            for row, tokens in zip(rows.tolist(), guessed, strict=True):
                drafts[row] = tokens
        return drafts
