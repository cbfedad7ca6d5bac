"""Learning a teacher's distributions instead of single tokens."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from samestep.lm_head import UpToHead
from samestep.losses.distillation import Divergence, divergences
from samestep.targets import IGNORE, shifted_targets
from samestep.terms import Term, Unit, target_weights


@dataclass(frozen=True)
class Distillation:
    """Divergence from a teacher at every target, and cross entropy beside it.

    Terms in the unit ``normalize``: "divergence", "nll", and the metric "accuracy".

    Attributes:
        teacher: A frozen language model with the student's vocabulary.
        kind: Which divergence.
        temperature: Of both distributions; "divergence" is weighed by its square, so that its
            gradient keeps its size.
        nll_weight: Weight of "nll"; "divergence" has the rest of 1.
        normalize: As for `samestep.CausalLMLoss`.
    """

    teacher: nn.Module = field(repr=False)
    kind: Divergence = "forward_kl"
    temperature: float = 1.0
    nll_weight: float = 0.0
    normalize: Unit = "token"
    up_to_head: UpToHead = field(default_factory=UpToHead, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.teacher.eval().requires_grad_(False)

    def __call__(self, model: nn.Module, micro: Mapping[str, Any]) -> dict[str, Term]:
        """Sums over the targets of one micro-batch."""
        targets = shifted_targets(micro)
        chosen = targets != IGNORE
        own = self.up_to_head(model, micro)
        with torch.no_grad():
            other = self.up_to_head(self.teacher, micro)
        losses = divergences(
            own.states[chosen],
            other.states[chosen],
            student_logits=own.logits,
            teacher_logits=other.logits,
            kind=self.kind,
            temperature=self.temperature,
        )
        weights = target_weights(micro, self.normalize)
        sums = own.cross_entropy(targets, target_weights=weights)
        share = (1 - self.nll_weight) * self.temperature**2
        return {
            "divergence": Term(_dot(weights[chosen], losses), self.normalize, share),
            "nll": Term(sums.loss, self.normalize, self.nll_weight),
            "accuracy": Term(sums.correct, self.normalize, weight=0.0),
        }


def _dot(weights: Tensor, losses: Tensor) -> Tensor:
    return weights.to(losses) @ losses
