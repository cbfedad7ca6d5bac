"""Cross entropy straight from hidden states: the logits are never whole in memory.

Rows are taken a chunk at a time. Where gradients are wanted they are computed in the same pass
(three matrix products a chunk, none repeated), so nothing of size [targets, vocabulary] lives
longer than its chunk. Rows that are not targets are never multiplied.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from samestep.engine.targets import at_targets
from samestep.kernels.gemm import product
from samestep.losses.head_gradients import HeadGradients

CHUNK_ELEMENTS = 2**23
"""Logits held at once by default: 32 MB in float32."""


class CrossEntropySums(NamedTuple):
    """Sums over the targets of a micro-batch, each target times its weight, all 0-d.

    Attributes:
        loss: What to optimise, with a graph: (1 - s) nll + s * mean over the vocabulary of
            -log p + z * logsumexp², for label smoothing s and z-loss z.
        nll: Negative log likelihood in nats, detached.
        correct: Targets that are the most likely token, detached.
        entropy: Entropy of the predicted distributions in nats, detached; None unless asked.
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
    Low-precision inputs are multiplied as they are; softmax and sums are float32.

    Args:
        hidden: Hidden states [..., width].
        weight: Output embedding [vocabulary, width].
        targets: Class of each row [...], int64; ``IGNORE`` rows are never multiplied.
        bias: [vocabulary], or None.
        target_weights: Factor of each row [...], or None for 1.
        positions: Where the targets stand in the flattened rows [targets], as
            `samestep.engine.targets.target_positions` gives them; None: they are looked for,
            which waits for a GPU.
        label_smoothing: s, from 0 up to 1.
        z_loss: z, the factor of the squared logsumexp.
        softcap: c, or None.
        entropy: Also sum the entropies (one more pass over each chunk, no matrix product).
        chunk: Rows of logits held at once; None: as many as fill 32 MB in float32.

    Returns:
        The sums. With no target at all the loss is a zero that still has a graph.

    Raises:
        ValueError: ``targets`` or ``target_weights`` has another shape than the rows.
    """
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets {tuple(targets.shape)} for hidden {tuple(hidden.shape)}")
    if target_weights is not None and target_weights.shape != targets.shape:
        raise ValueError(f"target_weights {tuple(target_weights.shape)}, not {targets.shape}")
    states, classes, rows = at_targets(hidden, targets, positions)
    wanted = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    sums = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        states,
        weight.to(hidden.dtype),
        None if bias is None else bias.to(hidden.dtype),
        classes,
        None if target_weights is None else target_weights.flatten()[rows].to(wanted),
        _Options(
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            entropy=entropy,
            chunk=chunk or max(1, CHUNK_ELEMENTS // weight.shape[0]),
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
        sums, gradients = _pass(
            hidden,
            weight,
            bias,
            targets,
            target_weights,
            options=options,
            needed=ctx.needs_input_grad if options.gradients else (False, False, False),
        )
        ctx.save_for_backward(hidden, weight, bias, targets, target_weights)
        ctx.gradients, ctx.options = gradients, options
        results = tuple(sums.clone().unbind())
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """The kept gradients times the incoming one, handed over without a copy.

        A second backward through the same graph computes them anew.
        """
        kept, ctx.gradients = ctx.gradients, None
        if kept is None:
            needed = ctx.needs_input_grad
            kept = _pass(*ctx.saved_tensors, options=ctx.options, needed=needed)[1]
        factor = incoming.to(ctx.saved_tensors[0].dtype)
        scaled = [None if gradient is None else gradient.mul_(factor) for gradient in kept]
        return (*scaled, None, None, None)


def _pass(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    target_weights: Tensor | None,
    *,
    options: _Options,
    needed: Sequence[bool],
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The four sums, and the gradients of the first that are needed."""
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    gradients = HeadGradients(hidden, weight, bias, needed, wide)
    sums = torch.zeros(4, dtype=wide, device=hidden.device)
    for start in range(0, len(hidden), options.chunk):
        rows = slice(start, start + options.chunk)
        scale = None if target_weights is None else target_weights[rows]
        logits = product(hidden[rows], weight.t()).to(wide)
        if bias is not None:
            logits += bias
        found, slope = _chunk(logits, targets[rows], scale, options)
        sums += found
        if any(needed):
            gradients.add(rows, slope.to(hidden.dtype), scale)
    return sums, gradients.finished()


def _chunk(
    logits: Tensor, targets: Tensor, scale: Tensor | None, options: _Options
) -> tuple[Tensor, Tensor]:
    """Sums of one chunk (loss, nll, correct, entropy), and d loss / d logits before ``scale``.

    The slope overwrites the softmax. Each row's logsumexp is read off the softmax at the row's
    maximum, where it is at least 1 / vocabulary and so loses no digits.
    """
    s, z, cap = options.label_smoothing, options.z_loss, options.softcap
    if cap is not None:
        logits = logits.div_(cap).tanh_().mul_(cap)
    column = targets[:, None]
    highest, best = logits.max(dim=-1)
    slope = logits.softmax(dim=-1)
    logsumexp = highest - slope.gather(1, best[:, None]).squeeze(1).log()
    nll = logsumexp - logits.gather(1, column).squeeze(1)
    loss = nll
    if s:
        loss = (1 - s) * nll + s * (logsumexp - logits.mean(dim=-1))
    if z:
        loss = loss + z * logsumexp.square()
    entropy = torch.zeros_like(nll)
    if options.entropy:
        entropy = torch.special.entr(slope).sum(dim=-1)
    found = torch.stack([loss, nll, (best == targets).to(nll), entropy])
    found = found.sum(dim=1) if scale is None else found @ scale
    if options.gradients:
        if z:
            slope.mul_((1 + 2 * z * logsumexp)[:, None])
        if s:
            slope.sub_(s / logits.shape[1])
        slope.scatter_add_(1, column, torch.full_like(nll, s - 1)[:, None])
        if cap is not None:
            slope.mul_(1 - (logits / cap).square_())
    return found, slope
