"""Policy gradients on rollouts: GRPO, Dr. GRPO, RLOO, GSPO, CISPO, SAPO."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from samestep.engine.targets import sequence_ids, target_positions
from samestep.engine.terms import Counter, Term, Unit
from samestep.losses.likelihood import Extras
from samestep.losses.names import PolicyLoss
from samestep.losses.policy import (
    ClipRange,
    Temperatures,
    capped_losses,
    clipped_losses,
    gated_losses,
    kl_estimates,
)
from samestep.models.lm_head import UpToHead
from samestep.objectives.log_probs import Reference
from samestep.objectives.units import field_at_targets, weights_at_targets


@dataclass(frozen=True)
class PolicyGradient:
    """A policy gradient that is clipped, capped or gated; fields: ``advantage`` [sequences].

    Optionally the field ``old_log_p`` [rows, length], the log-probabilities of the policy that
    sampled, at the place of each token; without it that policy is the trained one, so that the
    ratio is 1 and only its gradient counts. Terms in the unit ``normalize``: "policy", "kl" (if
    there is a reference), and the metrics "clipped" (share of targets at the bound; not of "sapo"),
    "ratio" and "score" (advantage x log-probability: it rises as the policy learns). "entropy", in
    the unit "token" whatever ``normalize`` is, is a metric or, with a weight, a bonus.

    Attributes:
        normalize: Every token weighs the same, every sequence does (GRPO), or a constant divides
            (Dr. GRPO).
        ratio: Of each token, or of each sequence by the mean of its tokens (GSPO,
            arXiv:2507.18071).
        loss: "clipped" (PPO, GRPO), "cispo" (arXiv:2506.13585) or "sapo" (arXiv:2511.20347).
        clip: Bounds of the ratio; of "cispo" the upper one alone.
        temperatures: Of "sapo".
        reference: Where the KL is taken to; None: nowhere.
        kl_weight: Weight of the KL.
        entropy_weight: Weight of the bonus: the mean entropy of a target's distribution, of which
            more is better.
        temperature: What the logits of the policy, and of the reference, are divided by: that of
            sampling.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1))
        >>> micro_batch = {
        ...     "input_ids": torch.tensor([[1, 2, 3], [1, 4, 5]]),
        ...     "labels": torch.tensor([[-100, 2, 3], [-100, 4, 5]]),
        ...     "fields": {"advantage": torch.tensor([1.0, -1.0])},
        ... }
        >>> terms = PolicyGradient("sequence")(model, micro_batch)
        >>> list(terms), terms["ratio"].total.item()
        (['policy', 'clipped', 'ratio', 'score', 'entropy'], 2.0)
    """

    normalize: Unit = "token"
    ratio: Literal["token", "sequence"] = "token"
    _: KW_ONLY
    loss: PolicyLoss = "clipped"
    clip: ClipRange = field(default_factory=ClipRange)
    temperatures: Temperatures = field(default_factory=Temperatures)
    reference: Reference | None = None
    kl_weight: float = 0.0
    entropy_weight: float = 0.0
    temperature: float = 1.0
    up_to_head: UpToHead = field(default_factory=UpToHead, repr=False, compare=False)
    counters: ClassVar[Mapping[str, Counter]] = {}

    def __call__(self, model: nn.Module, micro_batch: Mapping[str, Any]) -> dict[str, Term]:
        """Sums over the targets of one micro-batch."""
        extras = Extras(entropy_graph=self.entropy_weight != 0)
        likelihoods = self.up_to_head.target_likelihoods(
            model, micro_batch, extras=extras, temperature=self.temperature
        )
        log_p = -likelihoods.nll
        ids = sequence_ids(micro_batch).flatten()[target_positions(micro_batch)]
        advantages = micro_batch["fields"]["advantage"].to(log_p)
        log_ratio = log_p - self._old_log_p(micro_batch, log_p)
        if self.ratio == "sequence":
            log_ratio = _sequence_means(log_ratio, ids, sequences=len(advantages))[ids]
        weights = weights_at_targets(micro_batch, self.normalize).to(log_p)

        def term(values: Tensor, weight: float = 0.0) -> Term:
            return Term((weights * values).sum(), self.normalize, weight)

        losses, metrics = self._losses(log_ratio, advantages[ids], log_p)
        terms = {"policy": term(losses, 1.0)}
        if self.reference is not None:
            reference = self.reference.targets_log_p(
                *(model, micro_batch), up_to_head=self.up_to_head, temperature=self.temperature
            )
            terms["kl"] = term(kl_estimates(log_p, reference), self.kl_weight)
        metrics |= {"ratio": log_ratio.detach().exp(), "score": advantages[ids] * log_p.detach()}
        terms |= {name: term(values) for name, values in metrics.items()}
        by_token = weights_at_targets(micro_batch, "token").to(log_p)
        entropy = (by_token * likelihoods.entropy).sum()
        return terms | {"entropy": Term(entropy, "token", -self.entropy_weight)}

    def _losses(
        self, log_ratio: Tensor, advantages: Tensor, log_p: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each target [targets], and metrics that only some losses have."""
        if self.loss == "sapo":
            return gated_losses(log_ratio, advantages, temperatures=self.temperatures), {}
        if self.loss == "cispo":
            losses, capped = capped_losses(log_ratio, advantages, log_p=log_p, high=self.clip.high)
            return losses, {"clipped": capped}
        losses, clipped = clipped_losses(log_ratio, advantages, clip=self.clip)
        return losses, {"clipped": clipped}

    def _old_log_p(self, micro_batch: Mapping[str, Any], log_p: Tensor) -> Tensor:
        """The log-probability of each target under the policy that sampled [targets]."""
        if "old_log_p" not in micro_batch["fields"]:
            return log_p.detach()
        return field_at_targets(micro_batch, "old_log_p").to(log_p)


def _sequence_means(values: Tensor, ids: Tensor, *, sequences: int) -> Tensor:
    """The mean of the values [targets] of each sequence [sequences]; 0 without a target."""
    zeros = values.new_zeros(sequences)
    counts = zeros.index_add(0, ids, torch.ones_like(values)).clamp(min=1)
    return zeros.index_add(0, ids, values) / counts
