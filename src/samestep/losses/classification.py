"""Losses of classifiers and regressors: one number a label, from logits."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from samestep.engine.targets import IGNORE


def class_losses(logits: Tensor, classes: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy of each labelled row, in float32 or above.

    Args:
        logits: [..., classes].
        classes: The class of each row [...], int64; ``IGNORE`` where there is none.
        label_smoothing: Share of the target probability that is spread over the classes.

    Returns:
        [...]; 0 where there is no class.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    losses = cross_entropy(
        wide.flatten(0, -2),
        classes.flatten(),
        reduction="none",
        label_smoothing=label_smoothing,
        ignore_index=IGNORE,
    )
    return losses.view(classes.shape)


def correct(logits: Tensor, classes: Tensor) -> Tensor:
    """Whether the most likely class is the right one [...]; 0 where there is none."""
    return (logits.argmax(dim=-1) == classes).to(logits).detach()


def squared_errors(values: Tensor, wanted: Tensor) -> Tensor:
    """(value - wanted)² of each row, summed over its columns, in float32 or above.

    Args:
        values: [rows, columns].
        wanted: [rows, columns].

    Returns:
        [rows].
    """
    wide = values if values.dtype == torch.float64 else values.float()
    return (wide - wanted.to(wide)).square().sum(dim=-1)
