"""Runner V1 on CPU: sampled requests beside drafts.

vLLM's rejection sampler gives each draft its request's temperature, `top_k` and `top_p`. On CPU the
operation that does so (`_expand_kernel_impl`, vLLM 0.32) fills a copy of its result, which is then
dropped, unless it is of 64-bit integers: drafts get what the memory held before, other requests'
tokens with them, and `top_k` of that kind ends the engine. Here they are applied beforehand, and
vLLM is given neutral ones, of 64-bit integers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.sample.rejection_sampler import GREEDY_TEMPERATURE, RejectionSampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata


class Verifier(RejectionSampler):
    """vLLM's rejection sampler, for a CPU.

    Args:
        made: the runner's own, which this one stands in for.
    """

    def __init__(self, made: RejectionSampler) -> None:
        nn.Module.__init__(self)
        self.__dict__.update({k: v for k, v in vars(made).items() if not k.startswith("_")})
        self.sampler = _OfBonusTokens(made.sampler)

    def forward(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: Tensor | None,
        logits: Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:
        """Verify the drafts of a step, and sample a token behind them."""
        self.sampler.asked = self._asked = sampling_metadata
        neutral = sampling_metadata
        if not sampling_metadata.all_greedy:
            random = sampling_metadata.temperature != GREEDY_TEMPERATURE
            neutral = replace(sampling_metadata, temperature=random.long(), top_k=None, top_p=None)
        return super().forward(metadata, draft_probs, logits, neutral)

    def apply_logits_processors(
        self, logits: Tensor, sampling_metadata: SamplingMetadata, metadata: SpecDecodeMetadata
    ) -> Tensor:
        """And what should come after them: temperatures, `top_k` and `top_p` of each draft."""
        logits = super().apply_logits_processors(logits, sampling_metadata, metadata)
        asked = self._asked
        if asked.all_greedy:
            return logits
        counts = torch.tensor(metadata.num_draft_tokens)
        temperature, top_k, top_p = (
            None if each is None else each.repeat_interleave(counts)
            for each in (asked.temperature, asked.top_k, asked.top_p)
        )
        assert temperature is not None
        temperature = temperature.masked_fill(temperature == GREEDY_TEMPERATURE, 1.0)
        return apply_top_k_top_p(logits.div_(temperature[:, None]), top_k, top_p)


class _OfBonusTokens(nn.Module):
    """The runner's sampler, which is told what requests asked."""

    asked: SamplingMetadata

    def __init__(self, made: nn.Module) -> None:
        super().__init__()
        self.made = made

    def forward(
        self, *, logits: Tensor, sampling_metadata: SamplingMetadata, **options: Any
    ) -> Any:
        told = replace(
            sampling_metadata,
            temperature=self.asked.temperature,
            top_k=self.asked.top_k,
            top_p=self.asked.top_p,
        )
        return self.made(logits=logits, sampling_metadata=told, **options)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("made"), name)
