"""Sentence embeddings: contrastive over the whole effective batch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from samestep.engine.targets import sequence_spans
from samestep.engine.terms import Coupled
from samestep.losses.per_example import contrastive_losses, retrieves_positive
from samestep.objectives.classification import (
    backbone_states,
    example_weights,
    last_positions,
    without_wrapper,
)

Pooling = Literal["mean", "last", "first"]


def embeddings(model: nn.Module, micro: Mapping[str, Any], pooling: Pooling) -> Tensor:
    """One vector a sequence [sequences, width]: the mean of its tokens', its last's or its first's.

    Args:
        model: A model of transformers without a head.
        micro: A micro-batch of `samestep.data.collate.collate_examples`, or ``input_ids`` alone.
        pooling: Which.
    """
    states = backbone_states(without_wrapper(model), micro)
    if pooling == "last":
        return states.flatten(0, 1)[last_positions(micro)]
    places = sequence_spans(micro)
    if pooling == "first":
        return torch.stack([states[row, span.start] for row, span in places])
    return torch.stack([states[row, span].mean(dim=0) for row, span in places])


@dataclass(frozen=True)
class Embedding:
    """InfoNCE with the whole effective batch as negatives; coupled.

    A record is an anchor, its positive, and any number of negatives, side by side. Terms:
    "contrastive", and the metric "accuracy" (an anchor's most similar positive is its own).

    Attributes:
        width: Sequences a record.
        pooling: How a sequence becomes one vector.
        scale: Inverse temperature.
        symmetric: Whether positives look for their anchors too.
    """

    width: int = 2
    pooling: Pooling = "mean"
    scale: float = 20.0
    symmetric: bool = False

    def __call__(self, model: nn.Module, micro: Mapping[str, Any]) -> dict[str, Coupled]:
        """The part of one micro-batch."""
        vectors = embeddings(model, micro, self.pooling)
        records = vectors.view(-1, self.width * vectors.shape[1])
        weights = example_weights(micro)[:: self.width, None].to(records)
        part = torch.cat([records, weights], dim=1)
        return {
            "contrastive": Coupled(part, self._loss, "rows"),
            "accuracy": Coupled(part.detach(), self._accuracy, "rows", weight=0.0),
        }

    def _loss(self, rows: Tensor) -> Tensor:
        sides, weights = self._apart(rows)
        negatives = sides[:, 2:].flatten(0, 1) if self.width > 2 else None
        losses = contrastive_losses(
            sides[:, 0],
            sides[:, 1],
            negatives=negatives,
            scale=self.scale,
            symmetric=self.symmetric,
        )
        return (weights * losses).sum() / weights.sum()

    def _accuracy(self, rows: Tensor) -> Tensor:
        sides, weights = self._apart(rows)
        return (weights * retrieves_positive(sides[:, 0], sides[:, 1])).sum() / weights.sum()

    def _apart(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return rows[:, :-1].unflatten(1, (self.width, -1)), rows[:, -1].detach()
