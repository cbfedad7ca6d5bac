"""Preference objectives over pairs: DPO and its family, SimPO, CPO, ORPO."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from samestep.engine.terms import Counter, Coupled, Term
from samestep.errors import ConfigError
from samestep.losses.preference import (
    LogRatios,
    odds_ratio_loss,
    pair_loss,
    reference_free_loss,
    sorted_loss,
)
from samestep.models.lm_head import UpToHead
from samestep.objectives.completions import Completions, Reference, completions

LENGTH_NORMALISED = ("ipo",)
"""Losses whose ratios are means over tokens by definition."""


def pair_weights(micro: Mapping[str, Any]) -> Tensor:
    """The weight of each pair [pairs], float64."""
    weights: Tensor | None = micro.get("example_weights")
    if weights is None:
        pairs = len(micro["example_ids"]) // 2
        return torch.ones(pairs, dtype=torch.float64, device=micro["input_ids"].device)
    return weights[::2]


PAIR_COUNTERS: dict[str, Counter] = {
    "pair": lambda micro: float(pair_weights(micro).sum()),
    "chosen token": lambda micro: float(_chosen_tokens(micro)),
}
"""Counters of the units of this module. A pair of weight w counts w times."""


def _chosen_tokens(micro: Mapping[str, Any]) -> Tensor:
    from samestep.engine.counts import targets_per_sequence

    targets, weights = targets_per_sequence(micro)
    return (targets * weights)[::2].sum()


@dataclass(frozen=True)
class Pairs:
    """Both sides of a micro-batch's pairs."""

    chosen: Tensor
    rejected: Tensor

    @classmethod
    def of(cls, sequences: Tensor) -> "Pairs":
        """Split [2 x pairs], chosen and rejected in turn."""
        return cls(sequences[::2], sequences[1::2])

    @property
    def margin(self) -> Tensor:
        """Chosen minus rejected [pairs]."""
        return self.chosen - self.rejected


@dataclass(frozen=True)
class DPO:
    """Direct preference optimisation with any mixture of losses.

    Terms: one for each loss ("sigmoid", ...) in the unit "pair" ("sft": "chosen token"; "aot"
    couples the batch), and the metrics "margin", "accuracy", "reward_chosen", "reward_rejected"
    (beta times the log ratios), "token_accuracy".

    Attributes:
        losses: Weight of each loss: those of `samestep.losses.preference.PairLoss`, "aot" and
            "sft".
        reference: Where log ratios are taken to; None: from the fields "ref_chosen_logps" and
            "ref_rejected_logps" of the micro-batch.
        beta: Strength of the reference.
        label_smoothing: Share of labels that are taken to be wrong.
        length_normalize: Divide log likelihoods by the number of targets ("ipo" always does).
        tau: Temperature of "discopop".
    """

    losses: Mapping[str, float]
    reference: Reference | None
    beta: float = 0.1
    label_smoothing: float = 0.0
    length_normalize: bool = False
    tau: float = 0.05
    up_to_head: UpToHead = field(default_factory=UpToHead, repr=False, compare=False)

    @property
    def coupled(self) -> bool:
        """Whether it needs `samestep.TwoPass`."""
        return "aot" in self.losses

    def __call__(self, model: nn.Module, micro: Mapping[str, Any]) -> dict[str, Term | Coupled]:
        """Sums over the pairs of one micro-batch of `samestep.data.collate.collate_records`."""
        if self.coupled and micro.get("example_weights") is not None:
            raise ConfigError(
                "aot compares sorted margins, where a pair's weight has no meaning: leave the "
                "weights of the rows out, or choose another loss"
            )
        policy = completions(self.up_to_head, model, micro)
        reference = self.reference_log_p(model, micro).to(policy.log_p)
        weights = pair_weights(micro).to(policy.log_p)
        terms: dict[str, Term | Coupled] = {}
        for kind, weight in self.losses.items():
            terms[kind] = self._term(kind, weight, policy, reference, weights)
        ratios = Pairs.of((policy.log_p - reference).detach())
        right = (ratios.margin > 0).to(weights)
        metrics = {
            "margin": self.beta * ratios.margin,
            "accuracy": right,
            "reward_chosen": self.beta * ratios.chosen,
            "reward_rejected": self.beta * ratios.rejected,
        }
        for name, values in metrics.items():
            terms[name] = Term((weights * values).sum(), "pair", weight=0.0)
        chosen_correct = (weights * Pairs.of(policy.correct).chosen).sum()
        terms["token_accuracy"] = Term(chosen_correct, "chosen token", weight=0.0)
        return terms

    def reference_log_p(self, model: nn.Module, micro: Mapping[str, Any]) -> Tensor:
        """The reference's log likelihood of each sequence [2 x pairs]."""
        if self.reference is not None:
            return self.reference.log_p(self.up_to_head, model, micro)
        fields = micro["fields"]
        both = [fields["ref_chosen_logps"], fields["ref_rejected_logps"]]
        return torch.stack(both, dim=1).flatten()

    def _term(
        self, kind: str, weight: float, policy: Completions, reference: Tensor, weights: Tensor
    ) -> Term | Coupled:
        if kind == "sft":
            total = -(weights * Pairs.of(policy.log_p).chosen).sum()
            return Term(total, "chosen token", weight)
        ones = torch.ones_like(policy.targets)
        normalize = self.length_normalize or kind in LENGTH_NORMALISED
        length = (policy.targets if normalize else ones).to(policy.log_p)
        if kind == "aot":
            margins = [Pairs.of(p / length).margin for p in (policy.log_p, reference)]
            return Coupled(torch.stack(margins, dim=1), self._sorted, "rows", weight)
        ratios = Pairs.of((policy.log_p - reference) / length)
        losses = pair_loss(
            kind,  # type: ignore[arg-type]
            LogRatios(ratios.chosen, ratios.rejected),
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            tau=self.tau,
        )
        return Term((weights * losses).sum(), "pair", weight)

    def _sorted(self, margins: Tensor) -> Tensor:
        losses = sorted_loss(
            margins[:, 0], margins[:, 1], beta=self.beta, label_smoothing=self.label_smoothing
        )
        return losses.mean()


@dataclass(frozen=True)
class ReferenceFree:
    """SimPO, CPO and ORPO: preference without a reference, with a likelihood term beside it.

    Terms: "preference" in the unit "pair", "nll" of the chosen completions in the unit "chosen
    token", and the metrics "margin" (of log likelihoods, of means for SimPO and ORPO), "accuracy",
    "token_accuracy".

    Attributes:
        kind: "simpo" (means over tokens), "cpo" (sums) or "orpo" (odds of means).
        beta: Scale of the margin; for "orpo" the weight of the odds ratio.
        loss: "sigmoid", "hinge" or "ipo", for "simpo" and "cpo".
        gamma: Target margin of "simpo", in the units of beta times the margin.
        nll_weight: Weight of the likelihood term.
        label_smoothing: Share of labels that are taken to be wrong.
    """

    kind: Literal["simpo", "cpo", "orpo"]
    beta: float
    loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    gamma: float = 0.0
    nll_weight: float = 0.0
    label_smoothing: float = 0.0
    up_to_head: UpToHead = field(default_factory=UpToHead, repr=False, compare=False)

    def __call__(self, model: nn.Module, micro: Mapping[str, Any]) -> dict[str, Term]:
        """Sums over the pairs of one micro-batch of `samestep.data.collate.collate_records`."""
        policy = completions(self.up_to_head, model, micro)
        weights = pair_weights(micro).to(policy.log_p)
        means = policy.log_p / policy.targets.to(policy.log_p)
        pairs = Pairs.of(policy.log_p if self.kind == "cpo" else means)
        if self.kind == "orpo":
            losses, weight = odds_ratio_loss(pairs.chosen, pairs.rejected), self.beta
        else:
            weight = 1.0
            losses = reference_free_loss(
                self.loss,
                pairs.margin,
                beta=self.beta,
                gamma=self.gamma,
                label_smoothing=self.label_smoothing,
            )
        nll = -(weights * Pairs.of(policy.log_p).chosen).sum()
        margin = pairs.margin.detach()
        correct = Pairs.of(policy.correct).chosen
        return {
            "preference": Term((weights * losses).sum(), "pair", weight),
            "nll": Term(nll, "chosen token", self.nll_weight),
            "margin": Term((weights * margin).sum(), "pair", weight=0.0),
            "accuracy": Term((weights * (margin > 0)).sum(), "pair", weight=0.0),
            "token_accuracy": Term((weights * correct).sum(), "chosen token", weight=0.0),
        }
