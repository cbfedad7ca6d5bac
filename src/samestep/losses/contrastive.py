"""Contrastive losses over a whole batch of embeddings."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize


def contrastive_losses(
    anchors: Tensor, positives: Tensor, negatives: Tensor | None, *, scale: float, symmetric: bool
) -> Tensor:
    """InfoNCE with in-batch negatives, arXiv:1807.03748.

    -log softmax of scale x cosine(anchor, own positive) among the positives of all anchors and all
    negatives; symmetric: the mean of that and of the same for positives among all anchors.

    Args:
        anchors: [examples, width].
        positives: [examples, width].
        negatives: [examples x any, width], or None.
        scale: Inverse temperature.
        symmetric: Whether positives look for their anchors too.

    Returns:
        [examples].
    """
    anchors, positives = normalize(anchors, dim=1), normalize(positives, dim=1)
    candidates = positives
    if negatives is not None:
        candidates = torch.cat([positives, normalize(negatives, dim=1)])
    own = torch.arange(len(anchors), device=anchors.device)
    losses = cross_entropy(scale * anchors @ candidates.t(), own, reduction="none")
    if not symmetric:
        return losses
    back = cross_entropy(scale * positives @ anchors.t(), own, reduction="none")
    return (losses + back) / 2


def found_positives(anchors: Tensor, positives: Tensor) -> Tensor:
    """Whether each anchor's most similar positive is its own [examples]."""
    similar = normalize(anchors, dim=1) @ normalize(positives, dim=1).t()
    return similar.argmax(dim=1) == torch.arange(len(anchors), device=anchors.device)
