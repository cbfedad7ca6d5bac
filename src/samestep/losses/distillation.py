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
        chunk: Targets at once; None: those that fill 32 MB for 64 k classes.

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


def top_k_divergences(
    student: Tensor,
    top_ids: Tensor,
    top_logps: Tensor,
    *,
    student_logits: Logits,
    kind: Divergence,
    chunk: int | None = None,
) -> Tensor:
    """How far the student is from a teacher of which the k likeliest tokens are known.

    All other tokens together count as one more, in both distributions; that divergence is a lower
    bound of the one over the whole vocabulary (merging outcomes cannot raise it), and the same
    where k is everything.

    Args:
        student: Its hidden states at the targets [targets, width].
        top_ids: The teacher's tokens [targets, k].
        top_logps: Their log probabilities [targets, k], over the whole vocabulary.
        student_logits: The student's head.
        kind: As for `divergences`.
        chunk: As for `divergences`.

    Returns:
        [targets], at least 0; float32 or above.
    """
    chunk = chunk or CHUNK_ELEMENTS // 2**16

    def part(own: Tensor, ids: Tensor, log_p: Tensor) -> Tensor:
        log_q = _log_softmax(student_logits(own), 1.0).gather(1, ids)
        return divergence(_with_rest(log_q), _with_rest(log_p.to(log_q)), kind)

    parts = [
        checkpoint(part, own, ids, log_p, use_reentrant=False)
        for own, ids, log_p in zip(
            student.split(chunk), top_ids.split(chunk), top_logps.split(chunk), strict=True
        )
    ]
    return torch.cat(parts)


def _with_rest(log_p: Tensor) -> Tensor:
    """Log probabilities [rows, k], and that of everything else [rows, k + 1]."""
    least = torch.finfo(log_p.dtype).eps  # of the rest, which rounding could make negative
    rest = (1 - log_p.exp().sum(dim=-1, keepdim=True)).clamp(min=least).log()
    return torch.cat([log_p, rest], dim=-1)


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
