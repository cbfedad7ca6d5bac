"""Cross entropy from logits: for heads that are not one plain matrix."""

import torch
from torch import Tensor, nn

from samestep.engine.targets import select_targets
from samestep.losses.linear_cross_entropy import CrossEntropySums
from samestep.losses.logits import at_least_float32, columns_of, map_chunks, soft_cap
from samestep.utils.autocast import in_own_types


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

    The same sums as `samestep.losses.linear_cross_entropy.linear_cross_entropy`, by autograd.

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
    selected = _select_weighted_targets(
        logits, targets, target_weights=target_weights, positions=positions
    )
    return _sums(*selected, label_smoothing=label_smoothing, z_loss=z_loss)


@in_own_types
def _sums(
    rows: Tensor, targets: Tensor, weights: Tensor, *, label_smoothing: float, z_loss: float
) -> CrossEntropySums:
    """The sums over rows that are all targets."""
    rows = at_least_float32(rows)
    weights = weights.to(rows.dtype)
    logsumexp = rows.logsumexp(dim=-1)
    nll = logsumexp - rows.gather(1, targets[:, None]).squeeze(1)
    loss = (1 - label_smoothing) * nll + z_loss * logsumexp.square()
    if label_smoothing:
        loss = loss + label_smoothing * (logsumexp - rows.mean(dim=-1))
    correct = (rows.argmax(dim=-1) == targets).to(rows.dtype)
    # Not `loss @ weights`: under autocast a product is made and rounded in low precision.
    return CrossEntropySums(
        loss=(loss * weights).sum(),
        nll=(nll * weights).sum().detach(),
        correct=(correct * weights).sum(),
        entropy=None,
    )


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

    A chunk's logits are recomputed in the backward, so that they are never all in memory.

    Args:
        head: Maps hidden states [rows, width] to logits [rows, vocabulary].
        hidden: Hidden states [..., width].
        targets: As in `linear_cross_entropy`; ``IGNORE`` rows never reach the head.
        target_weights: As in `linear_cross_entropy`.
        positions: As in `linear_cross_entropy`.
        label_smoothing: As in `linear_cross_entropy`.
        z_loss: As in `linear_cross_entropy`.
        softcap: As in `linear_cross_entropy`.
        chunk: Rows of logits held at once; None: as in `linear_cross_entropy`.

    Returns:
        The sums, without entropy. With no target the loss is a zero that still has a graph.
    """

    def chunk_sums(states: Tensor, classes: Tensor, weights: Tensor) -> CrossEntropySums:
        logits = soft_cap(head(states), softcap)
        return _sums(logits, classes, weights, label_smoothing=label_smoothing, z_loss=z_loss)

    selected = _select_weighted_targets(
        hidden, targets, target_weights=target_weights, positions=positions
    )
    sums = map_chunks(chunk_sums, *selected, chunk=chunk, vocabulary=columns_of(head))
    return CrossEntropySums(
        loss=torch.stack([part.loss for part in sums]).sum(),
        nll=torch.stack([part.nll for part in sums]).sum(),
        correct=torch.stack([part.correct for part in sums]).sum(),
        entropy=None,
    )


def _select_weighted_targets(
    rows: Tensor, targets: Tensor, *, target_weights: Tensor | None, positions: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows that are targets [targets, width], their classes and their weights [targets]."""
    rows, classes, positions = select_targets(rows, targets, positions=positions)
    if target_weights is None:
        return rows, classes, torch.ones_like(classes, dtype=torch.float64)
    return rows, classes, target_weights.flatten()[positions]
