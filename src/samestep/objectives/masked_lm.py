"""Masked language modelling, and the targets of decoders that have their own."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from samestep.engine.targets import IGNORE
from samestep.engine.terms import Counter, Term
from samestep.models.lm_head import UpToHead
from samestep.objectives.classification import example_weights, token_weights


@dataclass(frozen=True)
class MaskedLM:
    """Cross entropy of masked tokens; fields: ``classes`` [rows, length], what they were.

    Terms in the unit "token" (masked tokens): "nll", and the metric "accuracy".
    """

    up_to_head: UpToHead = field(default_factory=UpToHead, repr=False, compare=False)

    def __call__(self, model: nn.Module, micro: Mapping[str, Any]) -> dict[str, Term]:
        """Sums over the masked tokens of one micro-batch."""
        states = self.up_to_head(model, micro)
        sums = states.cross_entropy(micro["fields"]["classes"], target_weights=token_weights(micro))
        return {"nll": Term(sums.loss), "accuracy": Term(sums.correct, weight=0.0)}


def decoder_weights(micro: Mapping[str, Any]) -> Tensor:
    """The weight of each target of a decoder [sequences, length], float64."""
    targets: Tensor = micro["fields"]["targets"] != IGNORE
    return example_weights(micro)[:, None] * targets


DECODER_COUNTERS: dict[str, Counter] = {
    "token": lambda micro: float(decoder_weights(micro).sum()),
    "example": lambda micro: float(example_weights(micro).sum()),
}


@dataclass(frozen=True)
class Seq2Seq:
    """Cross entropy of a decoder's tokens; fields: ``targets`` [sequences, length].

    Terms in the unit "token": "nll" (with smoothing "regularised_nll", and "nll" a metric), and
    the metric "accuracy".

    Attributes:
        label_smoothing: Share of the target probability that is spread over the vocabulary.
    """

    label_smoothing: float = 0.0
    up_to_head: UpToHead = field(default_factory=UpToHead, repr=False, compare=False)

    def __call__(self, model: Any, micro: Mapping[str, Any]) -> dict[str, Term]:
        """Sums over the decoder's tokens of one micro-batch."""
        targets = micro["fields"]["targets"]
        shifted = model.prepare_decoder_input_ids_from_labels(labels=targets)
        states = self.up_to_head(model, micro, decoder_input_ids=shifted)
        sums = states.cross_entropy(
            targets, target_weights=decoder_weights(micro), label_smoothing=self.label_smoothing
        )
        terms = {"nll": Term(sums.loss), "accuracy": Term(sums.correct, weight=0.0)}
        if self.label_smoothing:
            terms = {"regularised_nll": terms["nll"], "nll": Term(sums.nll, weight=0.0)} | {
                "accuracy": terms["accuracy"]
            }
        return terms
