"""Self-distillation: the grouped model learns to be the sequential one.

CQIL (arXiv 2404.06709, section 3.3): the teacher is the same weights run one layer after another,
the student the grouped schedule with LoRA on its grouped layers, the loss KL(teacher || student)
per token. To that, short training adds the mismatch of hidden states behind each group: student and
teacher have the same interface there, and it says more per token than the final distribution.

Teacher and student share all layers outside the groups: those before the first group run once for
both, and what the teacher says of a text that repeats is kept. Within the groups the student may
start from other weights than the teacher's, such as repaired ones.

Shapes: `B` sequences, `S` positions, `d` hidden size, `V` vocabulary, `N` = `B * S` tokens,
`G` groups.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from vllm_effplugin.plan import Unit
from vllm_effplugin.preparation.head import HeadDivergence
from vllm_effplugin.preparation.lora import add_lora
from vllm_effplugin.preparation.precision import autocast
from vllm_effplugin.preparation.trainer import WindowTrainer, WindowTrainerSettings
from vllm_effplugin.techniques.layer_parallel.config import LayerParallelConfig
from vllm_effplugin.techniques.layer_parallel.reference import ReferenceDecoder
from vllm_effplugin.techniques.layer_parallel.search import partition_units

LEARNING_RATES = {"lora": 2e-3, "full": 3e-4}
"""Defaults for the short training of a small model; the paper's 1e-4 suits 8,000 long steps."""

TEACHER_BYTES = 2 << 30
"""Teacher states to keep, where the text repeats and all of it fits."""


class DistillSettings(WindowTrainerSettings):
    """How to train."""

    train: Literal["lora", "full"] = "lora"
    matching: float = Field(
        10.0, ge=0, description="Weight of the hidden states' mismatch; 0 is the paper's loss."
    )


class Distiller(WindowTrainer):
    """Trains the grouped layers of one model.

    Trained weights and optimiser state are fp32; under `bf16` everything frozen is bf16 and the
    matrix products run in bf16.

    Args:
        model: a Hugging Face causal language model; it is changed in place.
        config: groups and schedule of the student.
        settings: how to train.
        tokens: `[N, S]` training token ids.
        initial: what the student's grouped layers start from, under checkpoint names; by default
            the model's own tensors.
    """

    def __init__(
        self,
        model: Any,
        config: LayerParallelConfig,
        settings: DistillSettings,
        tokens: Tensor,
        initial: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(settings, tokens, "distillation")
        self.config = config
        self.settings = settings
        num_layers = int(model.config.num_hidden_layers)
        units = partition_units(config.resolve_groups(num_layers), num_layers)
        first = next(i for i, unit in enumerate(units) if unit.is_group)
        self._prefix, self._student_units = units[:first], units[first:]
        self.grouped = [layer for unit in units if unit.is_group for layer in unit.layers]

        # Aliases of the weights as loaded: `to` gives a parameter new memory where it converts.
        loaded = layer_tensors(model, self.grouped)
        self._dtypes = {name: value.dtype for name, value in loaded.items()}
        self._initial = loaded if initial is None else initial
        compute = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        model.to(compute).requires_grad_(False).eval()
        self._teacher = ReferenceDecoder(with_own_layers(model, self.grouped))
        self._peft: Any = None
        torch.manual_seed(settings.seed)
        if settings.train == "lora":
            self._restore_initial(model)
            self._peft = add_lora(model, self.grouped)
        else:
            for layer in self.grouped:
                model.model.layers[layer].float().requires_grad_(True)
            self._restore_initial(model)
        self._student = ReferenceDecoder(model)
        self._known: dict[int, Tensor] = {}
        states = 2 + sum(unit.is_group for unit in units)
        size = states * tokens.numel() * int(model.config.hidden_size) * compute.itemsize
        repeats = self.total_steps * settings.batch > len(tokens)
        self._keep_teacher = repeats and size <= TEACHER_BYTES
        self.optimise({n: value for n, value in model.named_parameters() if value.requires_grad})

    def replacement_tensors(self) -> dict[str, Tensor]:
        """All tensors of the grouped layers, LoRA merged, in the dtypes of the base checkpoint.

        To be called once, after training.
        """
        if self._peft is not None:
            self._merge()
        return {
            name: value.to("cpu", self._dtypes[name]).contiguous()
            for name, value in layer_tensors(self._student.model, self.grouped).items()
        }

    def loss(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """How far the student is from the teacher on `rows` of the training text.

        Returns:
            mean KL(teacher || student) per token, in nats; and the mean squared distance of hidden
            states relative to the teacher's squared norm, summed over the groups.
        """
        with autocast(self.tokens.device, self.settings.precision):
            states, context = self._teach(rows)
            hidden, *behind_groups, target = states.unbind(1)
            mismatch = torch.zeros((), device=hidden.device)
            remaining = iter(behind_groups)
            for unit in self._student_units:
                hidden = self._student.run((unit,), hidden, context, self.config)
                if unit.is_group:
                    mismatch = mismatch + _relative_distance(hidden, next(remaining))
            output = self._student.decoder.norm(hidden)
        head = self._student.model.lm_head.weight
        divergence = HeadDivergence.apply(output.flatten(0, 1), target.flatten(0, 1), head)
        return divergence, mismatch

    @torch.no_grad()
    def _teach(self, rows: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Teacher states `[B, 2 + G, S, d]`, and the arguments of attention.

        The states are the first group's input, those behind each group, and the normed output.
        """
        hidden, context = self._teacher.embed(self.tokens[rows])
        wanted = rows.tolist()
        if all(row in self._known for row in wanted):
            return torch.stack([self._known[row] for row in wanted]), context
        hidden = self._teacher.run(self._prefix, hidden, context)
        states = [hidden]
        for unit in self._student_units:
            members = [Unit((layer,)) for layer in unit.layers]
            hidden = self._teacher.run(members, hidden, context)
            if unit.is_group:
                states.append(hidden)
        states.append(self._teacher.decoder.norm(hidden).to(hidden.dtype))
        stacked = torch.stack(states, 1)
        if self._keep_teacher:
            self._known.update(zip(wanted, stacked, strict=True))
        return stacked, context

    def objective(self, rows: Tensor) -> tuple[Tensor, float]:
        """The distillation loss, and its KL in nats."""
        divergence, mismatch = self.loss(rows)
        return divergence + self.settings.matching * mismatch, float(divergence.detach())

    @torch.no_grad()
    def _merge(self) -> None:
        """Merge LoRA in fp32 into the weights it started from, so that the sum is rounded once."""
        for layer in self.grouped:
            self._student.layers[layer].float()
        self._restore_initial(self._student.model)
        self._peft.merge_and_unload()

    @torch.no_grad()
    def _restore_initial(self, model: Any) -> None:
        for name, value in layer_tensors(model, self.grouped).items():
            initial = self._initial.get(name.replace(".base_layer.", "."))
            if initial is not None:  # None: a LoRA weight
                value.copy_(initial)


def _relative_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over tokens of `|s - t|^2 / |t|^2`; a few huge tokens must not outweigh the rest."""
    teacher = teacher.float()
    distance = (student.float() - teacher).square().sum(-1)
    return (distance / teacher.square().sum(-1)).mean()


def apply_replacements(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Load replacement tensors into a Hugging Face model that has all of them."""
    model.load_state_dict(dict(tensors), strict=False)


def layer_tensors(model: Any, layers: Sequence[int]) -> dict[str, Tensor]:
    """The tensors of some layers of a Hugging Face model, under their checkpoint names."""
    prefixes = tuple(f"model.layers.{layer}." for layer in layers)
    return {name: value for name, value in model.state_dict().items() if name.startswith(prefixes)}


def with_own_layers(model: Any, layers: list[int]) -> Any:
    """A model that shares all of `model` but has copies of `layers`."""
    memo: dict[int, Any] = {}
    for name, parameter in model.named_parameters():
        if not name.startswith(tuple(f"model.layers.{layer}." for layer in layers)):
            memo[id(parameter)] = parameter
    return copy.deepcopy(model, memo)
