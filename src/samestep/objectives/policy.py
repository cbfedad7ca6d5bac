"""Policy gradients on given rollouts, and cross entropy weighted by the model's own belief."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from samestep.engine.counts import target_weights
from samestep.engine.targets import sequence_ids, shifted_targets, target_positions
from samestep.engine.terms import Term, Unit
from samestep.losses.policy import ClipRange, clipped_losses, dft_losses, kl_estimates
from samestep.models.lm_head import UpToHead
from samestep.objectives.completions import Reference


@dataclass(frozen=True)
class PolicyGradient:
    """A clipped policy gradient; fields: ``advantage`` [sequences].

    Optionally the field ``old_log_p`` [rows, length], the old policy's log likelihood at the place
    of each token; without it the old policy is the new one, so that the ratio is 1 and only its
    gradient counts. Terms in the unit ``normalize``: "policy", "kl" (if there is a reference), and
    the metrics "clipped" (share of targets at the bound), "ratio", "score" (advantage x log
    likelihood: it rises as the policy learns) and "entropy".

    Attributes:
        normalize: Every token weighs the same, every sequence does (GRPO), or a constant divides
            (Dr. GRPO).
        ratio: Of each token, or of each sequence by the mean of its tokens (GSPO,
            arXiv:2507.18071).
        clip: Bounds of the ratio.
        reference: Where the KL is taken to; None: nowhere.
        kl_weight: Weight of the KL.
    """

    normalize: Unit = "token"
    ratio: Literal["token", "sequence"] = "token"
    clip: ClipRange = field(default_factory=ClipRange)
    reference: Reference | None = None
    kl_weight: float = 0.0
    up_to_head: UpToHead = field(default_factory=UpToHead, repr=False, compare=False)

    def __call__(self, model: nn.Module, micro: Mapping[str, Any]) -> dict[str, Term]:
        """Sums over the targets of one micro-batch."""
        positions = target_positions(micro)
        states = self.up_to_head(model, micro, at=positions)
        found = states.likelihoods(shifted_targets(micro), positions)
        log_p = -found.nll
        ids = sequence_ids(micro).flatten()[positions]
        advantages = micro["fields"]["advantage"].to(log_p)
        log_ratio = log_p - self._old(micro, positions, log_p)
        if self.ratio == "sequence":
            log_ratio = _means(log_ratio, ids, len(advantages))[ids]
        losses, clipped = clipped_losses(log_ratio, advantages[ids], clip=self.clip)
        weights = target_weights(micro, self.normalize).flatten()[positions].to(log_p)

        def term(values: Tensor, weight: float = 0.0) -> Term:
            return Term(weights @ values, self.normalize, weight)

        terms = {"policy": term(losses, 1.0)}
        if self.reference is not None:
            reference = self.reference.targets_log_p(self.up_to_head, model, micro)
            terms["kl"] = term(kl_estimates(log_p, reference), self.kl_weight)
        metrics = {"clipped": clipped, "ratio": log_ratio.detach().exp()}
        metrics |= {"score": advantages[ids] * log_p.detach(), "entropy": found.entropy}
        return terms | {name: term(values) for name, values in metrics.items()}

    def _old(self, micro: Mapping[str, Any], positions: Tensor, log_p: Tensor) -> Tensor:
        old = micro["fields"].get("old_log_p")
        if old is None:
            return log_p.detach()
        # A target is predicted one position before its own.
        of_targets: Tensor = old.flatten()[positions + 1]
        return of_targets.to(log_p)


def _means(values: Tensor, ids: Tensor, number: int) -> Tensor:
    zeros = values.new_zeros(number)
    counts = zeros.index_add(0, ids, torch.ones_like(values)).clamp(min=1)
    return zeros.index_add(0, ids, values) / counts


@dataclass(frozen=True)
class DFT:
    """Dynamic fine-tuning; terms in the unit ``normalize``: "dft", metrics "nll", "accuracy".

    Attributes:
        normalize: As for `samestep.CausalLMLoss`.
    """

    normalize: Unit = "token"
    up_to_head: UpToHead = field(default_factory=UpToHead, repr=False, compare=False)

    def __call__(self, model: nn.Module, micro: Mapping[str, Any]) -> dict[str, Term]:
        """Sums over the targets of one micro-batch."""
        positions = target_positions(micro)
        states = self.up_to_head(model, micro, at=positions)
        found = states.likelihoods(shifted_targets(micro), positions)
        weights = target_weights(micro, self.normalize).flatten()[positions].to(found.nll)
        return {
            "dft": Term(weights @ dft_losses(found.nll), self.normalize),
            "nll": Term(weights @ found.nll.detach(), self.normalize, weight=0.0),
            "accuracy": Term(weights @ found.correct, self.normalize, weight=0.0),
        }
