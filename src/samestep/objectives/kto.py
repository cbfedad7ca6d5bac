"""KTO: completions that are good or bad by themselves, held by the KL over the whole batch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from samestep.engine.terms import Counter, Coupled, Term
from samestep.losses.preference import unpaired_loss
from samestep.models.lm_head import UpToHead
from samestep.objectives.classification import example_weights
from samestep.objectives.completions import Reference, completions
from samestep.utils.modules import eval_mode

KTO_COUNTERS: dict[str, Counter] = {
    "desirable": lambda micro: float(example_weights(micro)[micro["fields"]["label"]].sum()),
    "undesirable": lambda micro: float(example_weights(micro)[~micro["fields"]["label"]].sum()),
}


@dataclass(frozen=True)
class KTO:
    """Kahneman-Tversky optimisation, arXiv:2402.01306 eq. 8.

    The reference point z = max(0, mean of log p - log p_reference over mismatched prompts and
    completions) is one number for the whole effective batch, without a gradient; so the loss is
    coupled. Micro-batches hold the examples themselves, their labels (field ``label``
    [sequences], bool), and as ``mismatched`` a second micro-batch, of each example's prompt with
    another's completion.

    Terms: "kto" (coupled), and the metrics "kl" (z), "reward_desirable" and "reward_undesirable"
    (beta times the log ratio), by example of the kind.

    Attributes:
        reference: Where log ratios are taken to; None: from the fields "ref_logps" and
            "ref_mismatched_logps".
        beta: Strength of the reference.
        desirable_weight: Of desirable examples.
        undesirable_weight: Of the others.
    """

    reference: Reference | None
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    up_to_head: UpToHead = field(default_factory=UpToHead, repr=False, compare=False)

    def __call__(self, model: nn.Module, micro: Mapping[str, Any]) -> dict[str, Term | Coupled]:
        """The part of one micro-batch."""
        log_p = completions(self.up_to_head, model, micro).log_p
        with torch.no_grad(), eval_mode(model):
            elsewhere = completions(self.up_to_head, model, micro["mismatched"]).log_p
        references = self.reference_log_p(model, micro)
        ratio = log_p - references["ref_logps"].to(log_p)
        apart = elsewhere - references["ref_mismatched_logps"].to(log_p)
        label = micro["fields"]["label"]
        weights = example_weights(micro).to(log_p)
        part = torch.stack([ratio, apart, label.to(log_p), weights], dim=1)
        rewards = self.beta * weights * ratio.detach()
        return {
            "kto": Coupled(part, self._loss, "rows"),
            "kl": Coupled(part.detach(), reference_point, "rows", weight=0.0),
            "reward_desirable": Term((rewards * label).sum(), "desirable", weight=0.0),
            "reward_undesirable": Term((rewards * ~label).sum(), "undesirable", weight=0.0),
        }

    def reference_log_p(self, model: nn.Module, micro: Mapping[str, Any]) -> dict[str, Tensor]:
        """The reference's log likelihood of both kinds of sequences [sequences]."""
        if self.reference is None:
            return micro["fields"]  # type: ignore[no-any-return]
        return {
            "ref_logps": self.reference.log_p(self.up_to_head, model, micro),
            "ref_mismatched_logps": self.reference.log_p(
                self.up_to_head, model, micro["mismatched"]
            ),
        }

    def _loss(self, examples: Tensor) -> Tensor:
        ratio, _, label, weights = examples.unbind(dim=1)
        losses = unpaired_loss(
            ratio,
            label.bool(),
            reference_point=reference_point(examples.detach()),
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )
        return (weights * losses).sum() / weights.sum()


def reference_point(examples: Tensor) -> Tensor:
    """Z of examples [examples, 4]: the mean of their second column by their fourth, at least 0."""
    _, apart, _, weights = examples.unbind(dim=1)
    return ((weights * apart).sum() / weights.sum()).clamp(min=0)
