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


class Extras(NamedTuple):
    """What `Likelihoods` hold beside the likelihood, for some time and memory.

    Attributes:
        entropy_graph: The entropy has a graph.
        collision: The chance of a collision is computed.
    """

    entropy_graph: bool = False
    collision: bool = False


NOTHING_ELSE = Extras()
"""The likelihood, and what costs nothing beside it."""


class Likelihoods(NamedTuple):
    """The likelihood of each target and statistics [targets], in reading order.

    Attributes:
        nll: Negative log likelihood in nats, with a graph; float32, or float64.
        correct: Whether the target is the most likely token: 1 or 0, detached.
        entropy: Entropy of the predicted distribution in nats; with a graph if that was asked for.
        collision: Log of the chance that two draws of the predicted distribution are the same
            token, log sum p², detached; 0 unless it was asked for.
    """

    nll: Tensor
    correct: Tensor
    entropy: Tensor
    collision: Tensor


def linear_likelihoods(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    positions: Tensor | None = None,
    chunk: int | None = None,
    extras: Extras = NOTHING_ELSE,
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
        extras: What else is wanted.

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
            chunk_rows(
                *(chunk, states),
                vocabulary=len(weight),
                copies=3 + (softcap is not None) + extras.entropy_graph,
            ),
            extras,
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
        extras: Extras,
    ) -> tuple[Tensor, ...]:
        """The fields of `Likelihoods`, each [rows]."""
        dtype = accumulation_dtype(hidden.dtype)
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.softcap, ctx.chunk, ctx.dtype, ctx.extras = softcap, chunk, dtype, extras
        vectors = _chunked_likelihoods(
            hidden, weight, bias=bias, targets=targets, softcap=softcap, chunk=chunk, extras=extras
        )
        nll, correct, entropy, collision = (vector.clone() for vector in vectors.unbind())
        ctx.mark_non_differentiable(
            correct, collision, *(() if extras.entropy_graph else (entropy,))
        )
        return nll, correct, entropy, collision

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_nll: Tensor, _: Tensor, grad_entropy: Tensor, __: Tensor
    ) -> tuple[Tensor | None, ...]:
        """(softmax - one-hot) times each row's incoming gradient, through the head."""
        hidden, weight, bias, targets = ctx.saved_tensors
        gradients = HeadGradients(
            hidden, weight, bias=bias, needs_grad=ctx.needs_input_grad, dtype=ctx.dtype
        )
        _add_gradients(
            hidden,
            gradients.weight,
            bias=bias,
            targets=targets,
            grad_nll=grad_nll,
            grad_entropy=grad_entropy if ctx.extras.entropy_graph else None,
            softcap=ctx.softcap,
            chunk=ctx.chunk,
            gradients=gradients,
        )
        return (*gradients.gradients(), None, None, None, None)


@in_own_types
def _chunked_likelihoods(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None,
    targets: Tensor,
    softcap: float | None,
    chunk: int,
    extras: Extras,
) -> Tensor:
    """The fields of `Likelihoods` [4, rows]."""
    dtype, weight = accumulation_dtype(hidden.dtype), weight.to(hidden.dtype)
    chunks = [torch.empty(len(Likelihoods._fields), 0, dtype=dtype, device=hidden.device)]
    for start in range(0, len(hidden), chunk):
        rows = slice(start, start + chunk)
        logits = linear_logits(hidden[rows], weight, bias=bias, softcap=softcap, dtype=dtype)
        chunks.append(torch.stack(_row_likelihoods(logits, targets[rows], extras)))
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
    grad_entropy: Tensor | None,
    softcap: float | None,
    chunk: int,
    gradients: HeadGradients,
) -> None:
    """Add up the head's gradients, each row's times its ``grad_nll``, and those of the entropy."""
    dtype = accumulation_dtype(hidden.dtype)
    for start in range(0, len(hidden), chunk):
        rows = slice(start, start + chunk)
        logits = linear_logits(hidden[rows], weight, bias=bias, softcap=softcap, dtype=dtype)
        grad_logits = logits.softmax(dim=-1)
        of_entropy = None
        if grad_entropy is not None:
            of_entropy = _entropy_gradient(logits, grad_logits).mul_(grad_entropy[rows][:, None])
        classes = targets[rows][:, None]
        grad_logits.scatter_add_(1, classes, grad_logits.new_full(classes.shape, -1.0))
        grad_logits *= grad_nll[rows][:, None]
        if of_entropy is not None:
            grad_logits += of_entropy
            del of_entropy
        if softcap is not None:
            grad_logits *= soft_cap_derivative(logits, softcap)
        del logits
        gradients.add(rows, grad_logits.to(hidden.dtype))
        del grad_logits  # before the next chunk's are made


def _entropy_gradient(logits: Tensor, p: Tensor) -> Tensor:
    """The derivative of each row's entropy at its logits: -p (log p + entropy)."""
    surprise = logits.log_softmax(dim=-1).neg_()
    entropy = (p * surprise).sum(dim=-1, keepdim=True)
    return surprise.sub_(entropy).mul_(p)


def logits_likelihoods(
    logits: Tensor,
    targets: Tensor,
    *,
    positions: Tensor | None = None,
    extras: Extras = NOTHING_ELSE,
) -> Likelihoods:
    """Likelihoods from given logits, by autograd.

    Args:
        logits: [..., vocabulary]; low precision is raised to float32.
        targets: Class of each row [...], int64; ``IGNORE`` rows count nothing.
        positions: As in `samestep.losses.linear_cross_entropy.linear_cross_entropy`.
        extras: What else is wanted.

    Returns:
        The likelihoods of the rows that are targets.
    """
    rows, classes, _ = select_targets(logits, targets, positions=positions)
    return _likelihoods_of_rows(rows, classes, extras)


def module_likelihoods(
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    *,
    softcap: float | None = None,
    positions: Tensor | None = None,
    chunk: int | None = None,
    extras: Extras = NOTHING_ELSE,
) -> Likelihoods:
    """Likelihoods through any head, such as one wrapped by LoRA, in chunks of targets.

    Args:
        head: Maps hidden states [rows, width] to logits [rows, vocabulary].
        hidden: Hidden states [..., width].
        targets: As in `linear_likelihoods`; ``IGNORE`` rows never reach the head.
        softcap: As in `linear_likelihoods`.
        positions: As in `samestep.losses.linear_cross_entropy.linear_cross_entropy`.
        chunk: Rows of logits held at once; None: as in `linear_cross_entropy`.
        extras: What else is wanted.

    Returns:
        The likelihoods of the rows that are targets.
    """

    def chunk_likelihoods(states: Tensor, classes: Tensor) -> Likelihoods:
        return _likelihoods_of_rows(soft_cap(head(states), softcap), classes, extras)

    states, classes, _ = select_targets(hidden, targets, positions=positions)
    chunks = map_chunks(
        chunk_likelihoods, states, classes, chunk=chunk, vocabulary=columns_of(head)
    )
    return Likelihoods(*(torch.cat(vectors) for vectors in zip(*chunks, strict=True)))


@in_own_types
def _likelihoods_of_rows(logits: Tensor, targets: Tensor, extras: Extras) -> Likelihoods:
    return Likelihoods(*_row_likelihoods(at_least_float32(logits), targets, extras))


def _row_likelihoods(logits: Tensor, targets: Tensor, extras: Extras) -> list[Tensor]:
    """The fields of `Likelihoods` of each row."""
    log_softmax = logits.log_softmax(dim=-1)
    nll = -log_softmax.gather(1, targets[:, None]).squeeze(1)
    if extras.entropy_graph:
        entropy = -(log_softmax.exp() * log_softmax).sum(dim=-1)
    with torch.no_grad():
        if not extras.entropy_graph:
            entropy = -log_softmax.exp().mul_(log_softmax).sum(dim=-1)
        correct = (logits.argmax(dim=-1) == targets).to(nll)
        collision = torch.zeros_like(nll)
        if extras.collision:
            collision = (2 * log_softmax).logsumexp(dim=-1)
    return [nll, correct, entropy, collision]
