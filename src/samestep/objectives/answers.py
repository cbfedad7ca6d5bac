"""Extractive question answering: where in a sequence the answer starts and ends."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from samestep.lm_head import model_inputs
from samestep.objectives.classification import example_weights
from samestep.targets import spans
from samestep.terms import Term


@dataclass(frozen=True)
class QuestionAnswering:
    """Cross entropy of the answer's two ends; fields: ``start``, ``end`` [sequences], int64.

    The softmax goes over the tokens of the sequence alone. (transformers lets it go over padding
    too, so that its loss changes with the length of the neighbours.) Terms in the unit "example":
    "cross_entropy", the mean of both ends', and the metric "exact" (both ends are right).
    """

    def __call__(self, model: nn.Module, micro: Mapping[str, Any]) -> dict[str, Term]:
        """Sums over the sequences of one micro-batch."""
        ends = end_logits(model, micro)
        ends = ends if ends.dtype == torch.float64 else ends.float()
        wanted = torch.stack([micro["fields"]["start"], micro["fields"]["end"]], dim=1)
        losses, exact = [], []
        for (row, span), places in zip(spans(micro), wanted, strict=True):
            scores = ends[row, span].t()
            found = scores.log_softmax(dim=1).gather(1, places[:, None])
            losses.append(-found.sum() / 2)
            exact.append((scores.argmax(dim=1) == places).all())
        weights = example_weights(micro).to(ends)
        right = (weights * torch.stack(exact)).sum()
        return {
            "cross_entropy": Term((weights * torch.stack(losses)).sum(), "example"),
            "exact": Term(right, "example", weight=0.0),
        }


def end_logits(model: nn.Module, micro: Mapping[str, Any]) -> Tensor:
    """The scores of each token as start and as end [rows, length, 2]."""
    outputs = model(**model_inputs(micro))
    return torch.stack([outputs.start_logits, outputs.end_logits], dim=-1)
