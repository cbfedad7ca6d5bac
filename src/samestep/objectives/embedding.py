"""Sentence embeddings: contrastive over the whole effective batch."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from samestep.engine.terms import Counter, Coupled
from samestep.losses.per_example import contrastive_losses, retrieves_positive
from samestep.models.outputs import Pooling, sequence_embeddings
from samestep.objectives.units import EXAMPLE_COUNTERS, example_weights


@dataclass(frozen=True)
class Embedding:
    """InfoNCE (arXiv:1807.03748) with the whole effective batch as negatives; coupled.

    A record is an anchor, its positive, and any number of negatives, side by side. Terms:
    "contrastive", and the metric "accuracy" (an anchor's most similar positive is its own).

    Attributes:
        width: Sequences a record.
        pooling: How a sequence becomes one vector.
        scale: Inverse temperature.
        symmetric: Whether the loss of finding the anchor for each positive is averaged in.

    Examples:
        >>> from samestep import TwoPass
        >>> loss = TwoPass(Embedding(pooling="last", scale=20.0))
    """

    width: int = 2
    pooling: Pooling = "mean"
    _: KW_ONLY
    scale: float = 20.0
    symmetric: bool = False
    counters: ClassVar[Mapping[str, Counter]] = EXAMPLE_COUNTERS

    def __call__(self, model: nn.Module, micro_batch: Mapping[str, Any]) -> dict[str, Coupled]:
        """This micro-batch's part of the statistic: vectors and weights [records, ...]."""
        vectors = sequence_embeddings(model, micro_batch, pooling=self.pooling)
        records = vectors.view(-1, self.width * vectors.shape[1])
        weights = example_weights(micro_batch)[:: self.width, None].to(records)
        part = torch.cat([records, weights], dim=1)
        return {
            "contrastive": Coupled(part, self._loss, "rows"),
            "accuracy": Coupled(part.detach(), self._accuracy, "rows", weight=0.0),
        }

    def _loss(self, statistic: Tensor) -> Tensor:
        vectors, weights = self._split(statistic)
        negatives = vectors[:, 2:].flatten(0, 1) if self.width > 2 else None
        losses = contrastive_losses(
            vectors[:, 0],
            vectors[:, 1],
            negatives=negatives,
            scale=self.scale,
            symmetric=self.symmetric,
        )
        return (weights * losses).sum() / weights.sum()

    def _accuracy(self, statistic: Tensor) -> Tensor:
        vectors, weights = self._split(statistic)
        nearest = retrieves_positive(vectors[:, 0], vectors[:, 1])
        return (weights * nearest).sum() / weights.sum()

    def _split(self, statistic: Tensor) -> tuple[Tensor, Tensor]:
        """The vectors [records, width, size] and the weights [records]."""
        return statistic[:, :-1].unflatten(1, (self.width, -1)), statistic[:, -1].detach()
