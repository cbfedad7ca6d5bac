"""Cross entropy from logits: for heads that are not one plain matrix."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from samestep.engine.targets import at_targets
from samestep.losses.linear_cross_entropy import CHUNK_ELEMENTS, CrossEntropySums


def logits_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    target_weights: Tensor | None = None,
    positions: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> CrossEntropySums:
    """Cross entropy of given logits, summed over targets.

    The same sums as `linear_cross_entropy`, by autograd.

    Args:
        logits: [..., vocabulary]; low precision is raised to float32.
        targets: Class of each row [...], int64; ``IGNORE`` rows count nothing.
        target_weights: Factor of each row [...], or None for 1.
        positions: As in `linear_cross_entropy`.
        label_smoothing: As in `linear_cross_entropy`.
        z_loss: As in `linear_cross_entropy`.

    Returns:
        The sums, without entropy.
    """
    rows, targets, scale = _chosen(logits, targets, target_weights, positions)
    rows = rows if rows.dtype == torch.float64 else rows.float()
    scale = scale.to(rows.dtype)
    logsumexp = rows.logsumexp(dim=-1)
    nll = logsumexp - rows.gather(1, targets[:, None]).squeeze(1)
    loss = (1 - label_smoothing) * nll + z_loss * logsumexp.square()
    if label_smoothing:
        loss = loss + label_smoothing * (logsumexp - rows.mean(dim=-1))
    correct = (rows.argmax(dim=-1) == targets).to(rows.dtype)
    return CrossEntropySums(loss @ scale, (nll @ scale).detach(), correct @ scale, None)


def module_cross_entropy(
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    *,
    target_weights: Tensor | None = None,
    positions: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    chunk: int | None = None,
) -> CrossEntropySums:
    """Cross entropy through any head, such as one wrapped by LoRA, in chunks of targets.

    A chunk's logits are recomputed in the backward, so they are never whole in memory.

    Args:
        head: Maps hidden states [rows, width] to logits [rows, vocabulary].
        hidden: Hidden states [..., width].
        targets: As in `linear_cross_entropy`; ``IGNORE`` rows never reach the head.
        target_weights: As in `linear_cross_entropy`.
        positions: As in `linear_cross_entropy`.
        label_smoothing: As in `linear_cross_entropy`.
        z_loss: As in `linear_cross_entropy`.
        softcap: As in `linear_cross_entropy`.
        chunk: Rows of logits held at once; None: those that fill 32 MB for 64 k classes.

    Returns:
        The sums, without entropy. With no target the loss is a zero that still has a graph.
    """
    hidden, targets, scale = _chosen(hidden, targets, target_weights, positions)
    chunk = chunk or CHUNK_ELEMENTS // 2**16

    def sums(states: Tensor, classes: Tensor, factors: Tensor) -> CrossEntropySums:
        logits = head(states)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return logits_cross_entropy(
            logits,
            classes,
            target_weights=factors,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
        )

    parts = [
        checkpoint(sums, states, classes, factors, use_reentrant=False)
        for states, classes, factors in zip(
            hidden.split(chunk), targets.split(chunk), scale.split(chunk), strict=True
        )
    ]
    return CrossEntropySums(
        loss=torch.stack([part.loss for part in parts]).sum(),
        nll=torch.stack([part.nll for part in parts]).sum(),
        correct=torch.stack([part.correct for part in parts]).sum(),
        entropy=None,
    )


def _chosen(
    rows: Tensor, targets: Tensor, weights: Tensor | None, positions: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows that are targets, their classes, and their factors."""
    chosen, classes, positions = at_targets(rows, targets, positions)
    ones = torch.ones_like(classes, dtype=torch.float64)
    factors = ones if weights is None else weights.flatten()[positions]
    return chosen, classes, factors
