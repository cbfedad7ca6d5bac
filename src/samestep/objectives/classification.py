"""Classes and values of sequences, classes of tokens, answers as spans, sentence embeddings."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from samestep.engine.targets import sequence_spans
from samestep.engine.terms import Counter, Coupled, Term
from samestep.losses.logits import at_least_float32
from samestep.losses.per_example import (
    class_losses,
    contrastive_losses,
    is_correct,
    retrieves_positive,
    squared_errors,
)
from samestep.models.outputs import (
    Pooling,
    run_model,
    sequence_embeddings,
    sequence_logits,
    span_logits,
)
from samestep.objectives.units import (
    EXAMPLE_COUNTERS,
    LABELLED_TOKEN_COUNTERS,
    example_weights,
    labelled_token_weights,
)


@dataclass(frozen=True)
class Classification:
    """Cross entropy over the classes of sequences; fields: ``class`` [sequences], int64.

    Terms in the unit "example": "cross_entropy", and the metric "accuracy".

    Attributes:
        label_smoothing: Share of the target probability that is spread over the classes.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForSequenceClassification
        >>> sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
        >>> config = LlamaConfig(**sizes, num_attention_heads=1, num_labels=3)
        >>> micro_batch = {
        ...     "input_ids": torch.tensor([[1, 2], [3, 4]]),
        ...     "example_ids": torch.tensor([0, 1]),
        ...     "fields": {"class": torch.tensor([0, 2])},
        ... }
        >>> terms = Classification()(LlamaForSequenceClassification(config), micro_batch)
        >>> {name: (term.unit, term.weight) for name, term in terms.items()}
        {'cross_entropy': ('example', 1.0), 'accuracy': ('example', 0.0)}
        >>> Classification.counters["example"](micro_batch)
        2.0
    """

    label_smoothing: float = 0.0
    counters: ClassVar[Mapping[str, Counter]] = EXAMPLE_COUNTERS

    def __call__(self, model: nn.Module, micro_batch: Mapping[str, Any]) -> dict[str, Term]:
        """Sums over the sequences of one micro-batch."""
        logits, classes = sequence_logits(model, micro_batch), micro_batch["fields"]["class"]
        losses = class_losses(logits, classes, label_smoothing=self.label_smoothing)
        weights = example_weights(micro_batch).to(losses)
        return {
            "cross_entropy": Term((weights * losses).sum(), "example"),
            "accuracy": Term((weights * is_correct(logits, classes)).sum(), "example", weight=0.0),
        }


@dataclass(frozen=True)
class Regression:
    """Squared error of one value a sequence; fields: ``value`` [sequences], float64.

    Terms in the unit "example": "squared_error", and the metric "absolute_error".
    """

    counters: ClassVar[Mapping[str, Counter]] = EXAMPLE_COUNTERS

    def __call__(self, model: nn.Module, micro_batch: Mapping[str, Any]) -> dict[str, Term]:
        """Sums over the sequences of one micro-batch."""
        predicted = sequence_logits(model, micro_batch)
        values = micro_batch["fields"]["value"][:, None]
        losses = squared_errors(predicted, values)
        weights = example_weights(micro_batch).to(losses)
        absolute = (predicted.detach() - values.to(predicted)).abs().squeeze(1)
        return {
            "squared_error": Term((weights * losses).sum(), "example"),
            "absolute_error": Term((weights * absolute).sum(), "example", weight=0.0),
        }


@dataclass(frozen=True)
class TokenClassification:
    """Cross entropy over the classes of tokens; fields: ``classes`` [rows, length], int64.

    Terms in the unit "token" (labelled tokens): "cross_entropy", and the metric "accuracy".
    """

    counters: ClassVar[Mapping[str, Counter]] = LABELLED_TOKEN_COUNTERS

    def __call__(self, model: nn.Module, micro_batch: Mapping[str, Any]) -> dict[str, Term]:
        """Sums over the labelled tokens of one micro-batch."""
        logits = run_model(model, micro_batch).logits
        classes = micro_batch["fields"]["classes"]
        losses = class_losses(logits, classes)
        weights = labelled_token_weights(micro_batch).to(losses)
        return {
            "cross_entropy": Term((weights * losses).sum(), "token"),
            "accuracy": Term((weights * is_correct(logits, classes)).sum(), "token", weight=0.0),
        }


@dataclass(frozen=True)
class QuestionAnswering:
    """Cross entropy of an answer's start and end; fields: ``start``, ``end`` [sequences], int64.

    The softmax goes over the tokens of the sequence alone. (transformers lets it go over padding
    too, so that its loss changes with the length of the neighbours.) Terms in the unit "example":
    "cross_entropy", the mean of both, and the metric "exact" (both are right).
    """

    counters: ClassVar[Mapping[str, Counter]] = EXAMPLE_COUNTERS

    def __call__(self, model: nn.Module, micro_batch: Mapping[str, Any]) -> dict[str, Term]:
        """Sums over the sequences of one micro-batch."""
        logits = at_least_float32(span_logits(model, micro_batch))
        fields = micro_batch["fields"]
        answers = torch.stack([fields["start"], fields["end"]], dim=1)
        losses, exact = [], []
        for (row, span), answer in zip(sequence_spans(micro_batch), answers, strict=True):
            scores = logits[row, span].t()  # [2, length]
            log_probs = scores.log_softmax(dim=1).gather(1, answer[:, None])
            losses.append(-log_probs.sum() / 2)
            exact.append((scores.argmax(dim=1) == answer).all())
        weights = example_weights(micro_batch).to(logits)
        return {
            "cross_entropy": Term((weights * torch.stack(losses)).sum(), "example"),
            "exact": Term((weights * torch.stack(exact)).sum(), "example", weight=0.0),
        }


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
