"""A multiplexing classifier in plain PyTorch: one composite at a time, formula by formula.

RevMUX (arXiv 2410.04519), section 3. What vLLM computes is compared with this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vllm_effplugin.preparation.backbone import Backbone
from vllm_effplugin.techniques.multiplex.config import MULTIPLEXERS


class ReferenceMultiplexer:
    """Classifies sequences that run as one.

    Args:
        backbone: the Hugging Face model.
        head: weight `[C, d]` and bias `[C]` of the classifier.
        depth: layers that each sequence runs alone.
        tensors: of the multiplexers, as in a checkpoint.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: tuple[Tensor, Tensor | None],
        depth: int,
        tensors: Mapping[str, Tensor],
    ) -> None:
        self._backbone, self._head, self._depth, self._tensors = backbone, head, depth, tensors

    @torch.inference_mode()
    def __call__(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Class probabilities of each; a single one runs as in the stock model."""
        backbone, depth = self._backbone, self._depth
        count, size = len(sequences), backbone.hidden_size
        lengths = [len(ids) for ids in sequences]
        longest = torch.tensor([max(lengths)])
        below = [
            backbone.below(torch.tensor([ids]), torch.tensor([len(ids)]), depth)[0]
            for ids in sequences
        ]
        composite = below[0]
        if count > 1:
            composite = torch.stack([self._merged(below, t) for t in range(max(lengths))])
        states = backbone.above(composite[None], longest, depth)[0]
        found = []
        for slot, length in enumerate(lengths):
            state = states[int(backbone.places(torch.tensor(length)))]
            if count > 1:
                state = self._lifted(self._slots(state, count, size // count)[slot], count)
            weight, bias = self._head
            logits = weight.float() @ backbone.pooled(state).float()
            found.append((logits if bias is None else logits + bias.float()).softmax(-1).tolist())
        return found

    def _merged(self, below: Sequence[Tensor], position: int) -> Tensor:
        """The composite's state at one position."""
        count, size = len(below), below[0].shape[1]
        z, norms = [], []
        for member in below:
            h = member[position] if position < len(member) else torch.zeros(size)
            norm = (h @ h / size).sqrt()
            if position < len(member):
                norms.append(float(norm))
            z.append(self._linear(count, "down", h / norm.clamp_min(1e-6)))
        y = [z[-1] + self._coupling(count, 0, z[-2])]
        for i in range(1, count):
            y.append(z[count - 1 - i] + self._coupling(count, i, y[i - 1]))
        whole = torch.zeros(size)
        whole[: count * (size // count)] = torch.cat(y)
        return whole * (sum(norms) / len(norms))

    def _slots(self, state: Tensor, count: int, width: int) -> list[Tensor]:
        o = [state[i * width : (i + 1) * width] for i in range(count)]
        z = {count - 1 - i: o[i] - self._coupling(count, i, o[i - 1]) for i in range(1, count)}
        z[count - 1] = o[0] - self._coupling(count, 0, z[count - 2])
        return [z[slot] for slot in range(count)]

    def _lifted(self, z: Tensor, count: int) -> Tensor:
        for name in ("up.0", "up.1"):
            z = self._linear(count, name, z).relu()
        return self._linear(count, "up.2", z)

    def _coupling(self, count: int, i: int, z: Tensor) -> Tensor:
        inner = self._linear(count, f"couplings.{i}.0", z).relu()
        return self._linear(count, f"couplings.{i}.1", inner).relu()

    def _linear(self, count: int, name: str, x: Tensor) -> Tensor:
        prefix = f"{MULTIPLEXERS}.{count}.{name}"
        return self._tensors[f"{prefix}.weight"] @ x + self._tensors[f"{prefix}.bias"]
