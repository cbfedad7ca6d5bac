"""Cross entropy straight from hidden states: the logits are never all in memory.

Rows are taken a chunk at a time. Where gradients are wanted they are computed in the same pass
(three matrix products a chunk, none repeated), so nothing of size [targets, vocabulary] lives
longer than its chunk. Rows that are not targets are never multiplied.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from samestep.engine.targets import select_targets
from samestep.losses.logits import (
    HeadGradients,
    accumulation_dtype,
    at_least_float32,
    chunk_rows,
    linear_logits,
    soft_cap_derivative,
)
from samestep.utils.autocast import in_own_types, product_dtype


class CrossEntropySums(NamedTuple):
    """Sums over the targets of a micro-batch, each target times its weight, all 0-d.

    Attributes:
        loss: What to optimise, with a graph: (1 - s) nll + s * mean over the vocabulary of
            -log p + z * logsumexp², for label smoothing s and z-loss z.
        nll: Negative log likelihood in nats, detached.
        correct: Targets that are the most likely token, detached.
        entropy: Entropy of the predicted distributions in nats, detached; None unless wanted.
    """

    loss: Tensor
    nll: Tensor
    correct: Tensor
    entropy: Tensor | None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    target_weights: Tensor | None = None,
    positions: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    entropy: bool = False,
    chunk: int | None = None,
) -> CrossEntropySums:
    """Cross entropy of ``hidden @ weight.T + bias``, summed over targets.

    Label smoothing is that of Szegedy et al. 2016 (arXiv:1512.00567), z-loss that of PaLM
    (arXiv:2204.02311), the soft cap that of Gemma 2 (arXiv:2408.00118): c * tanh(logits / c).
    Low-precision inputs are multiplied as they are, under autocast all inputs in its type; softmax
    and sums are float32.

    Args:
        hidden: Hidden states [..., width].
        weight: Output embedding [vocabulary, width].
        targets: Class of each row [...], int64; ``IGNORE`` (-100) rows are never multiplied.
        bias: [vocabulary], or None.
        target_weights: Factor of each row [...], or None for 1.
        positions: Where the targets stand in the flattened rows [targets], as
            `samestep.engine.targets.target_positions` gives them; None: they are looked up, which
            waits for a GPU.
        label_smoothing: s, from 0 up to 1.
        z_loss: z, the factor of the squared logsumexp.
        softcap: c, or None.
        entropy: Also sum the entropies (one more pass over each chunk, no matrix product).
        chunk: Rows of logits held at once; None: as many as suit the device: 32 MB in float32 on
            a CPU, up to 4,096 rows within 1 GB on an accelerator.

    Returns:
        The sums. With no target at all the loss is a zero that still has a graph.

    Raises:
        ValueError: ``targets`` or ``target_weights`` has another shape than the rows.

    Example:
        Equal logits over a vocabulary of 4, so each of the two targets costs log 4; the third row
        is no target.

        >>> import torch, samestep
        >>> hidden, weight = torch.ones(3, 2), torch.zeros(4, 2, requires_grad=True)
        >>> targets = torch.tensor([1, 3, -100])
        >>> sums = samestep.linear_cross_entropy(hidden, weight, targets)
        >>> round(sums.loss.item(), 4), round(sums.loss.exp().item())
        (2.7726, 16)
        >>> sums.loss.backward()
        >>> weight.grad.shape
        torch.Size([4, 2])
    """
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets {tuple(targets.shape)} for hidden {tuple(hidden.shape)}")
    if target_weights is not None and target_weights.shape != targets.shape:
        raise ValueError(f"target_weights {tuple(target_weights.shape)}, not {targets.shape}")
    states, classes, positions = select_targets(hidden, targets, positions=positions)
    if target_weights is not None:
        target_weights = target_weights.flatten()[positions].to(accumulation_dtype(hidden.dtype))
    sums = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        states.to(product_dtype(hidden)),
        weight,
        bias,
        classes,
        target_weights,
        _Options(
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            entropy=entropy,
            chunk=chunk_rows(
                chunk, states, vocabulary=len(weight), copies=2 + (softcap is not None)
            ),
            gradients=torch.is_grad_enabled(),
        ),
    )
    return CrossEntropySums(sums[0], sums[1], sums[2], sums[3] if entropy else None)


class _Options(NamedTuple):
    label_smoothing: float
    z_loss: float
    softcap: float | None
    entropy: bool
    chunk: int
    gradients: bool


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        target_weights: Tensor | None,
        options: _Options,
    ) -> tuple[Tensor, ...]:
        """Sums, and the gradients of the first one for a unit incoming gradient."""
        sums, gradients = _sums_and_gradients(
            hidden,
            weight,
            bias=bias,
            targets=targets,
            target_weights=target_weights,
            options=options,
            needs_grad=ctx.needs_input_grad if options.gradients else (False, False, False),
        )
        ctx.save_for_backward(hidden, weight, bias, targets, target_weights)
        ctx.gradients, ctx.options = gradients, options
        results = tuple(sums.clone().unbind())
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """The kept gradients times the incoming one, handed over without a copy.

        A second backward through the same graph computes them anew.
        """
        gradients: tuple[Tensor | None, ...] | None = ctx.gradients
        ctx.gradients = None
        hidden, weight, bias, targets, target_weights = ctx.saved_tensors
        if gradients is None:
            gradients = _sums_and_gradients(
                hidden,
                weight,
                bias=bias,
                targets=targets,
                target_weights=target_weights,
                options=ctx.options,
                needs_grad=ctx.needs_input_grad,
            )[1]
        scaled = [None if one is None else _scaled(one, grad_loss) for one in gradients]
        return (*scaled, None, None, None)


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """The gradient times a number, in place if it is not of low precision.

    There the number would be rounded as well, and with it every element alike.
    """
    wide = at_least_float32(gradient)
    return wide.mul_(factor.to(wide.dtype)).to(gradient.dtype)


@in_own_types
def _sums_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None,
    targets: Tensor,
    target_weights: Tensor | None,
    options: _Options,
    needs_grad: Sequence[bool],
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The four sums, and the gradients of the first that are needed."""
    dtype = accumulation_dtype(hidden.dtype)
    gradients = HeadGradients(hidden, weight, bias=bias, needs_grad=needs_grad, dtype=dtype)
    weight = gradients.weight
    sums = torch.zeros(4, dtype=dtype, device=hidden.device)
    for start in range(0, len(hidden), options.chunk):
        rows = slice(start, start + options.chunk)
        row_weights = None if target_weights is None else target_weights[rows]
        logits = linear_logits(
            hidden[rows], weight, bias=bias, softcap=options.softcap, dtype=dtype
        )
        chunk_sums, grad_logits = _chunk_sums(
            logits, targets[rows], row_weights=row_weights, options=options
        )
        del logits  # before the gradient is copied to a lower precision
        sums += chunk_sums
        if any(needs_grad):
            gradients.add(rows, grad_logits.to(hidden.dtype), row_weights=row_weights)
        del grad_logits  # before the next chunk's are made
    return sums, gradients.gradients()


def _chunk_sums(
    logits: Tensor, targets: Tensor, *, row_weights: Tensor | None, options: _Options
) -> tuple[Tensor, Tensor]:
    """Sums of one chunk (loss, nll, correct, entropy), and d loss / d logits before the weights.

    The gradient overwrites the softmax. Each row's logsumexp is read off the softmax at the row's
    maximum, where it is at least 1 / vocabulary and so loses no digits.

    Args:
        logits: [chunk, vocabulary], after the soft cap.
        targets: [chunk].
        row_weights: [chunk], or None for 1.
        options: What to compute.

    Returns:
        [4], and [chunk, vocabulary], which is the softmax alone where no gradient is wanted.
    """
    s, z = options.label_smoothing, options.z_loss
    highest, predicted = logits.max(dim=-1)
    softmax = logits.softmax(dim=-1)
    logsumexp = highest - softmax.gather(1, predicted[:, None]).squeeze(1).log()
    nll = logsumexp - logits.gather(1, targets[:, None]).squeeze(1)
    loss = nll
    if s:
        loss = (1 - s) * nll + s * (logsumexp - logits.mean(dim=-1))
    if z:
        loss = loss + z * logsumexp.square()
    entropy = torch.zeros_like(nll)
    if options.entropy:
        entropy = torch.special.entr(softmax).sum(dim=-1)
    rows = torch.stack([loss, nll, (predicted == targets).to(nll), entropy])
    # Not `rows @ row_weights`: under autocast a product is made and rounded in low precision.
    sums = (rows if row_weights is None else rows * row_weights).sum(dim=1)
    if not options.gradients:
        return sums, softmax
    grad_logits = softmax
    if z:
        grad_logits.mul_((1 + 2 * z * logsumexp)[:, None])
    if s:
        grad_logits.sub_(s / logits.shape[1])
    grad_logits.scatter_add_(1, targets[:, None], torch.full_like(nll, s - 1)[:, None])
    if options.softcap is not None:
        grad_logits.mul_(soft_cap_derivative(logits, options.softcap))
    return sums, grad_logits
