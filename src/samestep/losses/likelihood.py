"""The negative log likelihood of every target by itself, without whole logits.

For objectives that weigh or compare targets by the likelihood that the model gives them:
preferences, policy gradients, DFT. The gradient that comes back is a vector, one factor for each
target, known only after the forward; so the backward computes each chunk's logits once more.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from samestep.engine.targets import select_targets
from samestep.losses.logits import (
    HeadGradients,
    accumulation_dtype,
    at_least_float32,
    chunk_rows,
    columns_of,
    linear_logits,
    map_chunks,
    soft_cap,
    soft_cap_derivative,
)
from samestep.utils.autocast import in_own_types, product_dtype


class Likelihoods(NamedTuple):
    """The likelihood of each target and two statistics [targets], in reading order.

    Attributes:
        nll: Negative log likelihood in nats, with a graph; float32, or float64.
        correct: Whether the target is the most likely token: 1 or 0, detached.
        entropy: Entropy of the predicted distribution in nats, detached.
    """

    nll: Tensor
    correct: Tensor
    entropy: Tensor


def linear_likelihoods(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    positions: Tensor | None = None,
    chunk: int | None = None,
) -> Likelihoods:
    """Likelihoods of targets under ``softmax(hidden @ weight.T + bias)``.

    Args:
        hidden: Hidden states [..., width].
        weight: Output embedding [vocabulary, width].
        targets: Class of each row [...], int64; ``IGNORE`` rows are never multiplied.
        bias: [vocabulary], or None.
        softcap: As in `samestep.losses.logits.soft_cap`.
        positions: As in `samestep.losses.linear_cross_entropy.linear_cross_entropy`.
        chunk: Rows of logits held at once; None: as in `linear_cross_entropy`.

    Returns:
        The likelihoods of the rows that are targets. Without any the vectors are empty and still
        have a graph.

    Raises:
        ValueError: ``targets`` has another shape than the rows.
    """
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets {tuple(targets.shape)} for hidden {tuple(hidden.shape)}")
    states, classes, _ = select_targets(hidden, targets, positions=positions)
    return Likelihoods(
        *_LinearLikelihoods.apply(  # type: ignore[no-untyped-call]
            states.to(product_dtype(hidden)),
            weight,
            bias,
            classes,
            softcap,
            chunk_rows(chunk, states, vocabulary=len(weight), copies=3 + (softcap is not None)),
        )
    )


class _LinearLikelihoods(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        softcap: float | None,
        chunk: int,
    ) -> tuple[Tensor, ...]:
        """Nll, correct and entropy of each row [rows]."""
        dtype = accumulation_dtype(hidden.dtype)
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.softcap, ctx.chunk, ctx.dtype = softcap, chunk, dtype
        vectors = _chunked_likelihoods(
            hidden, weight, bias=bias, targets=targets, softcap=softcap, chunk=chunk
        )
        results = tuple(vector.clone() for vector in vectors.unbind())
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_nll: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """(softmax - one-hot) times each row's incoming gradient, through the head."""
        hidden, weight, bias, targets = ctx.saved_tensors
        gradients = HeadGradients(
            hidden, weight, bias=bias, needs_grad=ctx.needs_input_grad, dtype=ctx.dtype
        )
        _add_gradients(
            hidden,
            weight.to(hidden.dtype),
            bias=bias,
            targets=targets,
            grad_nll=grad_nll,
            softcap=ctx.softcap,
            chunk=ctx.chunk,
            gradients=gradients,
        )
        return (*gradients.gradients(), None, None, None)


@in_own_types
def _chunked_likelihoods(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None,
    targets: Tensor,
    softcap: float | None,
    chunk: int,
) -> Tensor:
    """Nll, correct and entropy of each row [3, rows]."""
    dtype, weight = accumulation_dtype(hidden.dtype), weight.to(hidden.dtype)
    chunks = [torch.empty(3, 0, dtype=dtype, device=hidden.device)]
    for start in range(0, len(hidden), chunk):
        rows = slice(start, start + chunk)
        logits = linear_logits(hidden[rows], weight, bias=bias, softcap=softcap, dtype=dtype)
        chunks.append(torch.stack(_row_likelihoods(logits, targets[rows])))
        del logits
    return torch.cat(chunks, dim=1)


@in_own_types
def _add_gradients(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None,
    targets: Tensor,
    grad_nll: Tensor,
    softcap: float | None,
    chunk: int,
    gradients: HeadGradients,
) -> None:
    """Add up the head's gradients, each row's times its ``grad_nll``."""
    dtype = accumulation_dtype(hidden.dtype)
    for start in range(0, len(hidden), chunk):
        rows = slice(start, start + chunk)
        logits = linear_logits(hidden[rows], weight, bias=bias, softcap=softcap, dtype=dtype)
        grad_logits = logits.softmax(dim=-1)
        classes = targets[rows][:, None]
        grad_logits.scatter_add_(1, classes, grad_logits.new_full(classes.shape, -1.0))
        grad_logits *= grad_nll[rows][:, None]
        if softcap is not None:
            grad_logits *= soft_cap_derivative(logits, softcap)
        del logits
        gradients.add(rows, grad_logits.to(hidden.dtype))
        del grad_logits  # before the next chunk's are made


def logits_likelihoods(
    logits: Tensor, targets: Tensor, *, positions: Tensor | None = None
) -> Likelihoods:
    """Likelihoods from given logits, by autograd.

    Args:
        logits: [..., vocabulary]; low precision is raised to float32.
        targets: Class of each row [...], int64; ``IGNORE`` rows count nothing.
        positions: As in `samestep.losses.linear_cross_entropy.linear_cross_entropy`.

    Returns:
        The likelihoods of the rows that are targets.
    """
    rows, classes, _ = select_targets(logits, targets, positions=positions)
    return _likelihoods_of_rows(rows, classes)


def module_likelihoods(
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    *,
    softcap: float | None = None,
    positions: Tensor | None = None,
    chunk: int | None = None,
) -> Likelihoods:
    """Likelihoods through any head, such as one wrapped by LoRA, in chunks of targets.

    Args:
        head: Maps hidden states [rows, width] to logits [rows, vocabulary].
        hidden: Hidden states [..., width].
        targets: As in `linear_likelihoods`; ``IGNORE`` rows never reach the head.
        softcap: As in `linear_likelihoods`.
        positions: As in `samestep.losses.linear_cross_entropy.linear_cross_entropy`.
        chunk: Rows of logits held at once; None: as in `linear_cross_entropy`.

    Returns:
        The likelihoods of the rows that are targets.
    """

    def chunk_likelihoods(states: Tensor, classes: Tensor) -> Likelihoods:
        return _likelihoods_of_rows(soft_cap(head(states), softcap), classes)

    states, classes, _ = select_targets(hidden, targets, positions=positions)
    chunks = map_chunks(
        chunk_likelihoods, states, classes, chunk=chunk, vocabulary=columns_of(head)
    )
    return Likelihoods(*(torch.cat(vectors) for vectors in zip(*chunks, strict=True)))


@in_own_types
def _likelihoods_of_rows(logits: Tensor, targets: Tensor) -> Likelihoods:
    return Likelihoods(*_row_likelihoods(at_least_float32(logits), targets))


def _row_likelihoods(logits: Tensor, targets: Tensor) -> list[Tensor]:
    """Nll, correct and entropy of each row."""
    log_softmax = logits.log_softmax(dim=-1)
    nll = -log_softmax.gather(1, targets[:, None]).squeeze(1)
    with torch.no_grad():
        correct = (logits.argmax(dim=-1) == targets).to(nll)
        entropy = -log_softmax.exp().mul_(log_softmax).sum(dim=-1)
    return [nll, correct, entropy]
