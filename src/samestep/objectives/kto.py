"""KTO: completions that are good or bad by themselves, held by the KL over the whole batch."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from samestep.engine.modes import eval_mode
from samestep.engine.terms import Counter, Coupled, Term
from samestep.losses.preference import unpaired_loss
from samestep.models.lm_head import UpToHead
from samestep.objectives.log_probs import Reference, sequence_log_probs
from samestep.objectives.units import example_weights

KTO_COUNTERS: dict[str, Counter] = {
    "desirable": lambda micro_batch: float(
        example_weights(micro_batch)[micro_batch["fields"]["label"]].sum()
    ),
    "undesirable": lambda micro_batch: float(
        example_weights(micro_batch)[~micro_batch["fields"]["label"]].sum()
    ),
}
"""Of `KTO`: examples by their label. An example of weight w counts w times."""


@dataclass(frozen=True)
class KTO:
    """Kahneman-Tversky optimisation, arXiv:2402.01306 eq. 8; coupled.

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
        undesirable_weight: Of undesirable examples.
    """

    reference: Reference | None
    beta: float = 0.1
    _: KW_ONLY
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    up_to_head: UpToHead = field(default_factory=UpToHead, repr=False, compare=False)
    counters: ClassVar[Mapping[str, Counter]] = KTO_COUNTERS

    def __call__(
        self, model: nn.Module, micro_batch: Mapping[str, Any]
    ) -> dict[str, Term | Coupled]:
        """This micro-batch's part of the statistic, and its sums."""
        log_p = sequence_log_probs(model, micro_batch, up_to_head=self.up_to_head).log_p
        with torch.no_grad(), eval_mode(model):
            mismatched = sequence_log_probs(
                model, micro_batch["mismatched"], up_to_head=self.up_to_head
            )
        references = self.reference_log_p(model, micro_batch)
        ratios = log_p - references["ref_logps"].to(log_p)
        mismatched_ratios = mismatched.log_p - references["ref_mismatched_logps"].to(log_p)
        label = micro_batch["fields"]["label"]
        weights = example_weights(micro_batch).to(log_p)
        part = torch.stack([ratios, mismatched_ratios, label.to(log_p), weights], dim=1)
        rewards = self.beta * weights * ratios.detach()
        return {
            "kto": Coupled(part, self._loss, "rows"),
            "kl": Coupled(part.detach(), _reference_point, "rows", weight=0.0),
            "reward_desirable": Term((rewards * label).sum(), "desirable", weight=0.0),
            "reward_undesirable": Term((rewards * ~label).sum(), "undesirable", weight=0.0),
        }

    def reference_log_p(
        self, model: nn.Module, micro_batch: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """The reference's log-probabilities of the examples and of the mismatched sequences.

        Args:
            model: The model that trains.
            micro_batch: As for a call.

        Returns:
            "ref_logps" and "ref_mismatched_logps" [sequences], without a graph.
        """
        if self.reference is None:
            return micro_batch["fields"]  # type: ignore[no-any-return]
        micro_batches = {
            "ref_logps": micro_batch,
            "ref_mismatched_logps": micro_batch["mismatched"],
        }
        return {
            name: self.reference.log_p(model, sequences, up_to_head=self.up_to_head)
            for name, sequences in micro_batches.items()
        }

    def _loss(self, statistic: Tensor) -> Tensor:
        """The mean loss of all examples [examples, 4]."""
        ratios, _, label, weights = statistic.unbind(dim=1)
        losses = unpaired_loss(
            ratios,
            label.bool(),
            reference_point=_reference_point(statistic.detach()),
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )
        return (weights * losses).sum() / weights.sum()


def _reference_point(statistic: Tensor) -> Tensor:
    """Z of all examples [examples, 4]: their mean mismatched log ratio, at least 0; 0-d."""
    _, mismatched_ratios, _, weights = statistic.unbind(dim=1)
    return ((weights * mismatched_ratios).sum() / weights.sum()).clamp(min=0)
