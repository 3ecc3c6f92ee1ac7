"""Distillation through a language model head.

Shapes: `N` tokens, `d` hidden size, `V` vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LOGITS_CHUNK = 128
"""Tokens whose `[chunk, V]` logits exist at a time."""


class HeadDivergence(torch.autograd.Function):
    """Language model head and mean KL(teacher || student) in one, a chunk of tokens at a time.

    With `z = h W^T`, `q = softmax(z)` and teacher `t`, dKL/dz is `q - t`: the gradient of the
    hidden states needs no `[N, V]` tensor to survive the chunk.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
        """Loss of normed hidden states `[N, d]` of both, under `[V, d]` head weights."""
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        gradient = torch.empty_like(student)
        rows, vocab = min(LOGITS_CHUNK, len(student)), len(head)
        # Written again for each chunk: fresh memory of this size costs more than the arithmetic.
        products = head.new_empty(rows, vocab)
        logits, log_t, log_q = (torch.empty(rows, vocab, device=head.device) for _ in range(3))
        for start in range(0, len(student), rows):
            part = slice(start, start + rows)
            n = len(student[part])
            for hidden, log_p in ((teacher, log_t), (student, log_q)):
                torch.mm(hidden[part].to(head.dtype), head.T, out=products[:n])
                logits[:n].copy_(products[:n])
                torch.log_softmax(logits[:n], -1, out=log_p[:n])
            t = torch.exp(log_t[:n], out=logits[:n])
            total += log_t[:n].sub_(log_q[:n]).mul_(t).sum(-1).double().sum()
            products[:n].copy_(log_q[:n].exp_().sub_(t))
            gradient[part] = products[:n] @ head
        ctx.save_for_backward(gradient.div_(len(student)))
        return (total / len(student)).to(torch.float32)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of the student's hidden states."""
        (gradient,) = ctx.saved_tensors
        return upstream.to(gradient.dtype) * gradient, None, None
