"""Learning a teacher's distributions instead of single tokens."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from samestep.engine.counts import target_weights
from samestep.engine.targets import shifted_targets, target_positions
from samestep.engine.terms import Term, Unit
from samestep.losses.distillation import Divergence, divergences, top_k_divergences
from samestep.models.lm_head import States, UpToHead


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
        positions = target_positions(micro)
        own = self.up_to_head(model, micro, at=positions)
        with torch.no_grad():
            other = self.up_to_head(self.teacher, micro, at=positions)
        losses = divergences(
            own.states.flatten(0, 1).index_select(0, positions),
            other.states.flatten(0, 1).index_select(0, positions),
            student_logits=own.logits,
            teacher_logits=other.logits,
            kind=self.kind,
            temperature=self.temperature,
        )
        share = (1 - self.nll_weight) * self.temperature**2
        return _terms(own, micro, losses, self.normalize, (share, self.nll_weight))


@dataclass(frozen=True)
class TopKDistillation:
    """Divergence from what a teacher said before: its k likeliest tokens at every target.

    Terms as of `Distillation`. The fields of a micro-batch are ``top_ids`` and ``top_logps``
    [rows, length, k], at the place of the token that they are predictions of.

    Attributes:
        kind: Which divergence.
        nll_weight: Weight of "nll"; "divergence" has the rest of 1.
        normalize: As for `samestep.CausalLMLoss`.
    """

    kind: Divergence = "forward_kl"
    nll_weight: float = 0.0
    normalize: Unit = "token"
    up_to_head: UpToHead = field(default_factory=UpToHead, repr=False, compare=False)

    def __call__(self, model: nn.Module, micro: Mapping[str, Any]) -> dict[str, Term]:
        """Sums over the targets of one micro-batch."""
        positions = target_positions(micro)
        own = self.up_to_head(model, micro, at=positions)
        # A target is predicted one position before its own.
        top_ids, top_logps = (
            micro["fields"][name].flatten(0, 1)[positions + 1] for name in ("top_ids", "top_logps")
        )
        losses = top_k_divergences(
            own.states.flatten(0, 1).index_select(0, positions),
            top_ids=top_ids.long(),
            top_logps=top_logps,
            student_logits=own.logits,
            kind=self.kind,
        )
        shares = (1 - self.nll_weight, self.nll_weight)
        return _terms(own, micro, losses, self.normalize, shares)


def _terms(
    own: States,
    micro: Mapping[str, Any],
    losses: Tensor,
    normalize: Unit,
    shares: tuple[float, float],
) -> dict[str, Term]:
    """The sums of divergences [targets], and of cross entropy beside them, with their weights."""
    weights, positions = target_weights(micro, normalize), target_positions(micro)
    sums = own.cross_entropy(shifted_targets(micro), target_weights=weights, positions=positions)
    divergence = weights.flatten()[positions].to(losses) @ losses
    return {
        "divergence": Term(divergence, normalize, shares[0]),
        "nll": Term(sums.loss, normalize, shares[1]),
        "accuracy": Term(sums.correct, normalize, weight=0.0),
    }
