"""Distillation: a student's distributions against a teacher's, a chunk of targets at a time."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from samestep.losses.linear_cross_entropy import CHUNK_ELEMENTS

Divergence = Literal["forward_kl", "reverse_kl", "jensen_shannon"]
Logits = Callable[[Tensor], Tensor]
"""Hidden states [rows, width] to logits [rows, vocabulary]."""


def divergences(
    student: Tensor,
    teacher: Tensor,
    *,
    student_logits: Logits,
    teacher_logits: Logits,
    kind: Divergence,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """How far the student is from the teacher at each target.

    With p of the teacher and q of the student, both at the temperature: "forward_kl" is KL(p || q)
    (arXiv:1503.02531), "reverse_kl" KL(q || p) (arXiv:2306.08543), "jensen_shannon" the mean of
    both's KL to (p + q) / 2 (arXiv:2306.13649 with beta = 1/2). A chunk's logits are computed again
    in the backward, so that neither model's are ever whole in memory.

    Args:
        student: Its hidden states at the targets [targets, width].
        teacher: The teacher's, without a graph [targets, any width].
        student_logits: The student's head.
        teacher_logits: The teacher's head.
        kind: Which divergence.
        temperature: Logits are divided by it. The losses are not multiplied by its square.
        chunk: Targets at once; None: those that fill 64 MB for 64 k classes.

    Returns:
        [targets], at least 0; float32 or above.
    """
    chunk = chunk or CHUNK_ELEMENTS // 2**16

    def part(own: Tensor, other: Tensor) -> Tensor:
        with torch.no_grad():
            log_p = _log_softmax(teacher_logits(other), temperature)
        return divergence(_log_softmax(student_logits(own), temperature), log_p, kind)

    parts = [
        checkpoint(part, own, other, use_reentrant=False)
        for own, other in zip(student.split(chunk), teacher.split(chunk), strict=True)
    ]
    return torch.cat(parts)


def divergence(log_q: Tensor, log_p: Tensor, kind: Divergence) -> Tensor:
    """The divergence of each row [rows] of log q and log p [rows, vocabulary]."""
    if kind == "forward_kl":
        return _kl(log_p, log_q)
    if kind == "reverse_kl":
        return _kl(log_q, log_p)
    middle = torch.logaddexp(log_p, log_q) - torch.log(log_p.new_tensor(2.0))
    return (_kl(log_p, middle) + _kl(log_q, middle)) / 2


def _kl(log_one: Tensor, log_other: Tensor) -> Tensor:
    return (log_one.exp() * (log_one - log_other)).sum(dim=-1)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return (wide / temperature).log_softmax(dim=-1)
