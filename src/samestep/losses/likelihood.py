"""The negative log likelihood of every target by itself, without whole logits.

For objectives that weigh or compare targets by what the model says of them: preferences, policy
gradients, DFT. The gradient that comes back is a vector, one factor a target, known only after the
forward; so the backward computes each chunk's logits once more.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from samestep.engine.targets import at_targets
from samestep.kernels.gemm import product
from samestep.losses.head_gradients import HeadGradients
from samestep.losses.linear_cross_entropy import CHUNK_ELEMENTS


class Likelihoods(NamedTuple):
    """What a model says of each target [targets], in reading order.

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
        softcap: c of c * tanh(logits / c), or None.
        positions: As in `linear_cross_entropy`.
        chunk: Rows of logits held at once; None: as many as fill 32 MB in float32.

    Returns:
        The likelihoods of the rows that are targets. Without any the vectors are empty and still
        have a graph.

    Raises:
        ValueError: ``targets`` has another shape than the rows.
    """
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets {tuple(targets.shape)} for hidden {tuple(hidden.shape)}")
    states, classes, _ = at_targets(hidden, targets, positions)
    return Likelihoods(
        *_LinearLikelihoods.apply(  # type: ignore[no-untyped-call]
            states,
            weight.to(hidden.dtype),
            None if bias is None else bias.to(hidden.dtype),
            classes,
            softcap,
            chunk or max(1, CHUNK_ELEMENTS // weight.shape[0]),
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
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.softcap, ctx.chunk, ctx.wide = softcap, chunk, wide
        parts = [torch.empty(3, 0, dtype=wide, device=hidden.device)]
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = _logits(hidden[rows], weight, bias, softcap, wide)
            parts.append(torch.stack(_of_logits(logits, targets[rows])))
        results = tuple(part.clone() for part in torch.cat(parts, dim=1).unbind())
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """(softmax - one-hot) times each row's incoming gradient, through the head."""
        hidden, weight, bias, targets = ctx.saved_tensors
        gradients = HeadGradients(hidden, weight, bias, ctx.needs_input_grad, ctx.wide)
        for start in range(0, len(hidden), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            logits = _logits(hidden[rows], weight, bias, ctx.softcap, ctx.wide)
            slope = logits.softmax(dim=-1)
            column = targets[rows][:, None]
            slope.scatter_add_(1, column, slope.new_full(column.shape, -1.0))
            slope *= incoming[rows][:, None]
            if ctx.softcap is not None:
                slope *= 1 - (logits / ctx.softcap).square_()
            gradients.add(rows, slope.to(hidden.dtype))
        return (*gradients.finished(), None, None, None)


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, wide: torch.dtype
) -> Tensor:
    logits = product(hidden, weight.t()).to(wide)
    if bias is not None:
        logits += bias
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _of_logits(logits: Tensor, targets: Tensor) -> list[Tensor]:
    """Nll, correct and entropy of each row."""
    log_softmax = logits.log_softmax(dim=-1)
    nll = -log_softmax.gather(1, targets[:, None]).squeeze(1)
    with torch.no_grad():
        correct = (logits.argmax(dim=-1) == targets).to(nll)
        entropy = -(log_softmax.exp() * log_softmax).sum(dim=-1)
    return [nll, correct, entropy]


def logits_likelihoods(
    logits: Tensor, targets: Tensor, *, positions: Tensor | None = None
) -> Likelihoods:
    """Likelihoods from given logits, by autograd.

    Args:
        logits: [..., vocabulary]; low precision is raised to float32.
        targets: Class of each row [...], int64; ``IGNORE`` rows count nothing.
        positions: As in `linear_cross_entropy`.

    Returns:
        The likelihoods of the rows that are targets.
    """
    rows, classes, _ = at_targets(logits, targets, positions)
    rows = rows if rows.dtype == torch.float64 else rows.float()
    return Likelihoods(*_of_logits(rows, classes))


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
        positions: As in `linear_cross_entropy`.
        chunk: Rows of logits held at once; None: those that fill 32 MB for 64 k classes.

    Returns:
        The likelihoods of the rows that are targets.
    """
    hidden, targets, _ = at_targets(hidden, targets, positions)
    chunk = chunk or CHUNK_ELEMENTS // 2**16

    def part(states: Tensor, classes: Tensor) -> Likelihoods:
        logits = head(states)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return logits_likelihoods(logits, classes)

    pairs = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    parts = [checkpoint(part, *pair, use_reentrant=False) for pair in pairs]
    return Likelihoods(*(torch.cat(vectors) for vectors in zip(*parts, strict=True)))
