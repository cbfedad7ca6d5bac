"""Losses of one number for each example: classes and values from logits, contrasted embeddings."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from samestep.engine.targets import IGNORE
from samestep.losses.logits import at_least_float32
from samestep.utils.autocast import in_own_types


def class_losses(logits: Tensor, classes: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy of each labelled row, in float32 or above.

    Args:
        logits: [..., classes].
        classes: The class of each row [...], int64; ``IGNORE`` where there is none.
        label_smoothing: Share of the target probability that is spread over the classes.

    Returns:
        [...]; 0 where there is no class.
    """
    losses = cross_entropy(
        at_least_float32(logits).flatten(0, -2),
        classes.flatten(),
        reduction="none",
        label_smoothing=label_smoothing,
        ignore_index=IGNORE,
    )
    return losses.view(classes.shape)


def is_correct(logits: Tensor, classes: Tensor) -> Tensor:
    """Whether the most likely class is the right one: 1 or 0, detached.

    Args:
        logits: [..., classes].
        classes: As for `class_losses`.

    Returns:
        [...], in the type of the logits; 0 where there is no class.
    """
    return (logits.argmax(dim=-1) == classes).to(logits).detach()


def squared_errors(predictions: Tensor, targets: Tensor) -> Tensor:
    """(prediction - target)² of each row, summed over its columns, in float32 or above.

    Args:
        predictions: [rows, columns].
        targets: [rows, columns].

    Returns:
        [rows].
    """
    predictions = at_least_float32(predictions)
    return (predictions - targets.to(predictions)).square().sum(dim=-1)


@in_own_types
def contrastive_losses(
    anchors: Tensor, positives: Tensor, *, negatives: Tensor | None, scale: float, symmetric: bool
) -> Tensor:
    """InfoNCE with in-batch negatives, arXiv:1807.03748.

    -log softmax of scale x cosine(anchor, own positive) among the positives of all anchors and all
    negatives; symmetric: the mean of that and of the same for positives among all anchors.

    Args:
        anchors: [examples, width].
        positives: [examples, width].
        negatives: [examples x any, width], or None.
        scale: Inverse temperature.
        symmetric: Whether positives are matched with their anchors too.

    Returns:
        [examples].
    """
    anchors, positives = normalize(anchors, dim=1), normalize(positives, dim=1)
    candidates = positives
    if negatives is not None:
        candidates = torch.cat([positives, normalize(negatives, dim=1)])
    matches = torch.arange(len(anchors), device=anchors.device)
    losses = cross_entropy(scale * anchors @ candidates.t(), matches, reduction="none")
    if not symmetric:
        return losses
    reverse = cross_entropy(scale * positives @ anchors.t(), matches, reduction="none")
    return (losses + reverse) / 2


@in_own_types
def retrieves_positive(anchors: Tensor, positives: Tensor) -> Tensor:
    """Whether each anchor's most similar positive is its own.

    Args:
        anchors: [examples, width].
        positives: [examples, width].

    Returns:
        [examples], bool.
    """
    similarity = normalize(anchors, dim=1) @ normalize(positives, dim=1).t()
    return similarity.argmax(dim=1) == torch.arange(len(anchors), device=anchors.device)
