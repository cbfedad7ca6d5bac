"""Distillation: a student's distributions against a teacher's, a chunk of targets at a time."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from samestep.losses.logits import TYPICAL_VOCABULARY, at_least_float32, map_chunks

Divergence = Literal["forward_kl", "reverse_kl", "jensen_shannon"]
LogitsFn = Callable[[Tensor], Tensor]
"""Hidden states [rows, width] to logits [rows, vocabulary]."""

_COPIES = 12
"""Tensors as large as the logits that two models' distributions and their divergence hold."""


def divergences(
    student: Tensor,
    teacher: Tensor,
    *,
    student_logits: LogitsFn,
    teacher_logits: LogitsFn,
    kind: Divergence,
    temperature: float = 1.0,
    vocabulary: int = TYPICAL_VOCABULARY,
    chunk: int | None = None,
) -> Tensor:
    """How far the student is from the teacher at each target.

    With p of the teacher and q of the student, both at the temperature: "forward_kl" is KL(p || q)
    (arXiv:1503.02531), "reverse_kl" KL(q || p) (arXiv:2306.08543), "jensen_shannon" the mean of
    both's KL to (p + q) / 2 (arXiv:2306.13649 with beta = 1/2). A chunk's logits are recomputed in
    the backward, so that neither model's are ever all in memory.

    Args:
        student: Its hidden states at the targets [targets, width].
        teacher: The teacher's, without a graph [targets, any width].
        student_logits: The student's head.
        teacher_logits: The teacher's head.
        kind: Which divergence.
        temperature: Logits are divided by it. The losses are not multiplied by its square.
        vocabulary: Columns of the logits.
        chunk: Targets at once; None: as many as suit the device.

    Returns:
        [targets], at least 0; float32 or above.
    """

    def chunk_divergences(student_rows: Tensor, teacher_rows: Tensor) -> Tensor:
        with torch.no_grad():
            log_p = _log_softmax(teacher_logits(teacher_rows), temperature=temperature)
        log_q = _log_softmax(student_logits(student_rows), temperature=temperature)
        return _divergence(log_q, log_p, kind=kind)

    chunks = map_chunks(
        chunk_divergences, student, teacher, chunk=chunk, vocabulary=vocabulary, copies=_COPIES
    )
    return torch.cat(chunks)


def top_k_divergences(
    student: Tensor,
    *,
    top_ids: Tensor,
    top_logps: Tensor,
    student_logits: LogitsFn,
    kind: Divergence,
    vocabulary: int = TYPICAL_VOCABULARY,
    chunk: int | None = None,
) -> Tensor:
    """How far the student is from a teacher of which only the k likeliest tokens are stored.

    All other tokens together count as one more, in both distributions; that divergence is a lower
    bound of the one over the whole vocabulary (merging outcomes cannot raise it), and equal to it
    where k is the whole vocabulary.

    Args:
        student: Its hidden states at the targets [targets, width].
        top_ids: The teacher's tokens [targets, k].
        top_logps: Their log probabilities [targets, k], over the whole vocabulary.
        student_logits: The student's head.
        kind: As for `divergences`.
        vocabulary: As for `divergences`.
        chunk: As for `divergences`.

    Returns:
        [targets], at least 0; float32 or above.
    """

    def chunk_divergences(student_rows: Tensor, ids: Tensor, log_p: Tensor) -> Tensor:
        log_q = _log_softmax(student_logits(student_rows)).gather(1, ids)
        return _divergence(_append_rest(log_q), _append_rest(log_p.to(log_q)), kind=kind)

    chunks = map_chunks(
        chunk_divergences, student, top_ids, top_logps, chunk=chunk, vocabulary=vocabulary
    )
    return torch.cat(chunks)


def _append_rest(log_p: Tensor) -> Tensor:
    """Log probabilities [rows, k], and that of all other outcomes together: [rows, k + 1]."""
    eps = torch.finfo(log_p.dtype).eps  # rounding could make the rest negative
    rest = (1 - log_p.exp().sum(dim=-1, keepdim=True)).clamp(min=eps).log()
    return torch.cat([log_p, rest], dim=-1)


def _divergence(log_q: Tensor, log_p: Tensor, *, kind: Divergence) -> Tensor:
    """The divergence of each row [rows] of log q and log p [rows, vocabulary]."""
    if kind == "forward_kl":
        return _kl(log_p, log_q)
    if kind == "reverse_kl":
        return _kl(log_q, log_p)
    mixture = torch.logaddexp(log_p, log_q) - torch.log(log_p.new_tensor(2.0))
    return (_kl(log_p, mixture) + _kl(log_q, mixture)) / 2


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def _log_softmax(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    return (at_least_float32(logits) / temperature).log_softmax(dim=-1)
