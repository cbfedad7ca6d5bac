"""Preferences over pairs: DPO and its family, SimPO, CPO, ORPO, and reward models."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from samestep.engine.terms import Counter, Coupled, Term
from samestep.errors import ConfigError
from samestep.losses.logits import at_least_float32
from samestep.losses.names import MEANS_OVER_TOKENS, FDivergence, SortedLoss
from samestep.losses.preference import (
    LogRatios,
    divergence_scores,
    odds_ratio_loss,
    pair_loss,
    reference_free_loss,
    reward_loss,
    sorted_loss,
)
from samestep.models.lm_head import UpToHead
from samestep.models.outputs import sequence_logits
from samestep.objectives.log_probs import (
    Reference,
    SequenceLogProbs,
    sequence_log_probs,
    shared_length_weights,
)
from samestep.objectives.units import PAIR_COUNTERS, pair_weights


@dataclass(frozen=True)
class DPO:
    """Direct preference optimisation with any mixture of losses.

    Terms: one for each loss ("sigmoid", ...) in the unit "pair" ("sft": "chosen token"; "aot" and
    "aot_unpaired" couple the batch), and the metrics "margin", "accuracy", "reward_chosen",
    "reward_rejected" (beta times the log ratios), "token_accuracy", and "pair_weight" where pairs
    are weighed.

    Attributes:
        losses: Weight of each loss: those of `samestep.losses.names.DPOLoss`.
        reference: Where log ratios are taken to; None: from the fields "ref_chosen_logps" and
            "ref_rejected_logps" of the micro-batch.
        beta: Strength of the reference.
        label_smoothing: Share of labels that are taken to be wrong.
        length_normalize: Divide log-probabilities by the number of targets ("ipo" and
            "sigmoid_norm" always do).
        tau: Temperature of "discopop".
        divergence: What holds the policy near to the reference, see
            `samestep.losses.preference.divergence_scores`.
        divergence_coefficient: Of "alpha_divergence".
        tail_weight: LD-DPO's alpha: the weight of targets beyond the number that both sides have,
            in the log-probabilities of both models (`shared_length_weights`).
        on_policy_weights: WPO, arXiv:2406.11827: a pair weighs the product of its sides' chances
            exp(mean over targets of log p - log sum p²), without a gradient. "sft" does not.

    Examples:
        >>> import copy
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1))
        >>> micro_batch = {  # one pair: the chosen completion, then the rejected one
        ...     "input_ids": torch.tensor([[1, 2, 3], [1, 4, 5]]),
        ...     "labels": torch.tensor([[-100, 2, 3], [-100, 4, 5]]),
        ...     "example_ids": torch.tensor([0, 1]),
        ... }
        >>> loss = DPO({"sigmoid": 1.0}, Reference(copy.deepcopy(model)), beta=0.1)
        >>> terms = loss(model, micro_batch)
        >>> round(terms["sigmoid"].total.item(), 4)  # log 2, until the model has moved
        0.6931
        >>> {unit: counter(micro_batch) for unit, counter in DPO.counters.items()}
        {'pair': 1.0, 'chosen token': 2.0}
    """

    losses: Mapping[str, float]
    reference: Reference | None
    _: KW_ONLY
    beta: float = 0.1
    label_smoothing: float = 0.0
    length_normalize: bool = False
    tau: float = 0.05
    divergence: FDivergence = "reverse_kl"
    divergence_coefficient: float = 0.5
    tail_weight: float = 1.0
    on_policy_weights: bool = False
    up_to_head: UpToHead = field(default_factory=UpToHead, repr=False, compare=False)
    counters: ClassVar[Mapping[str, Counter]] = PAIR_COUNTERS

    @property
    def coupled(self) -> bool:
        """Whether it needs `samestep.TwoPass`."""
        return not self.losses.keys().isdisjoint(get_args(SortedLoss))

    def __call__(
        self, model: nn.Module, micro_batch: Mapping[str, Any]
    ) -> dict[str, Term | Coupled]:
        """Sums over the pairs of one micro-batch of `samestep.data.collate.collate_records`.

        Raises:
            ConfigError: "aot" or "aot_unpaired" is among the losses, and the examples have weights.
        """
        if self.coupled and micro_batch.get("example_weights") is not None:
            raise ConfigError(
                "aot compares sorted margins, aot_unpaired sorted ratios: a pair's weight has no "
                "meaning there. Leave the weights of the rows out, or choose another loss"
            )
        policy = sequence_log_probs(
            model,
            micro_batch,
            up_to_head=self.up_to_head,
            weights=self._target_weights(micro_batch),
            collision=self.on_policy_weights,
        )
        reference = self.reference_log_p(model, micro_batch).to(policy.log_p)
        weights = pair_weights(micro_batch).to(policy.log_p)
        metrics: dict[str, Tensor] = {}
        of_losses = weights
        if self.on_policy_weights:
            chances = (policy.on_policy / policy.targets.to(policy.on_policy)).exp()
            metrics["pair_weight"] = _chosen(chances) * _rejected(chances)
            of_losses = weights * metrics["pair_weight"]
        terms: dict[str, Term | Coupled] = {}
        for kind, weight in self.losses.items():
            if kind == "sft":
                total = -(weights * _chosen(policy.log_p)).sum()
                terms[kind] = Term(total, "chosen token", weight)
            else:
                terms[kind] = self._term(kind, weight, policy, reference, weights=of_losses)
        ratios = (policy.weighted_log_p - reference).detach()
        margins = _margins(ratios)
        metrics |= {
            "margin": self.beta * margins,
            "accuracy": (margins > 0).to(weights),
            "reward_chosen": self.beta * _chosen(ratios),
            "reward_rejected": self.beta * _rejected(ratios),
        }
        correct = (weights * _chosen(policy.correct)).sum()
        return {
            **terms,
            **_pair_metrics(metrics, weights),
            "token_accuracy": Term(correct, "chosen token", weight=0.0),
        }

    def reference_log_p(self, model: nn.Module, micro_batch: Mapping[str, Any]) -> Tensor:
        """The reference's log-probability of each sequence.

        Args:
            model: The model that trains.
            micro_batch: As for a call.

        Returns:
            [2 x pairs], chosen and rejected in turn, without a graph.
        """
        if self.reference is not None:
            weights = self._target_weights(micro_batch)
            return self.reference.log_p(
                model, micro_batch, up_to_head=self.up_to_head, weights=weights
            )
        fields = micro_batch["fields"]
        both = [fields["ref_chosen_logps"], fields["ref_rejected_logps"]]
        return torch.stack(both, dim=1).flatten()

    def _target_weights(self, micro_batch: Mapping[str, Any]) -> Tensor | None:
        return (
            None if self.tail_weight == 1 else shared_length_weights(micro_batch, self.tail_weight)
        )

    def _term(
        self,
        kind: str,
        weight: float,
        policy: SequenceLogProbs,
        reference: Tensor,
        *,
        weights: Tensor,
    ) -> Term | Coupled:
        """One of the losses; ``weights`` [pairs] are the pairs', ``weight`` the term's."""
        ones = torch.ones_like(policy.targets)
        normalize = self.length_normalize or kind in MEANS_OVER_TOKENS
        length = (policy.targets if normalize else ones).to(policy.log_p)
        log_p = policy.weighted_log_p
        if kind == "aot":
            margins = [_margins(each / length) for each in (log_p, reference)]
            return Coupled(torch.stack(margins, dim=1), self._sorted_loss, "rows", weight)
        ratios = log_p - reference
        if kind == "aot_unpaired":
            # The two columns [pairs, 2] are the chosen and the rejected.
            return Coupled((ratios / length).view(-1, 2), self._sorted_loss, "rows", weight)
        ratios = divergence_scores(ratios, self.divergence, coefficient=self.divergence_coefficient)
        ratios = ratios / length
        losses = pair_loss(
            kind,  # type: ignore[arg-type]
            LogRatios(_chosen(ratios), _rejected(ratios)),
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            tau=self.tau,
        )
        return Term((weights * losses).sum(), "pair", weight)

    def _sorted_loss(self, columns: Tensor) -> Tensor:
        """The mean loss between two columns [pairs, 2], each sorted by itself."""
        losses = sorted_loss(
            columns[:, 0], columns[:, 1], beta=self.beta, label_smoothing=self.label_smoothing
        )
        return losses.mean()


@dataclass(frozen=True)
class ReferenceFree:
    """SimPO, CPO and ORPO: preference without a reference, with a likelihood term beside it.

    Terms: "preference" in the unit "pair", "nll" of the chosen completions in the unit "chosen
    token", and the metrics "margin" (of log-probabilities, of means for SimPO and ORPO),
    "accuracy", "token_accuracy". The sources are those of `samestep.losses.preference`.

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
    _: KW_ONLY
    loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    gamma: float = 0.0
    nll_weight: float = 0.0
    label_smoothing: float = 0.0
    up_to_head: UpToHead = field(default_factory=UpToHead, repr=False, compare=False)
    counters: ClassVar[Mapping[str, Counter]] = PAIR_COUNTERS

    def __call__(self, model: nn.Module, micro_batch: Mapping[str, Any]) -> dict[str, Term]:
        """Sums over the pairs of one micro-batch of `samestep.data.collate.collate_records`."""
        policy = sequence_log_probs(model, micro_batch, up_to_head=self.up_to_head)
        weights = pair_weights(micro_batch).to(policy.log_p)
        means = policy.log_p / policy.targets.to(policy.log_p)
        scores = policy.log_p if self.kind == "cpo" else means
        margins = _margins(scores)
        if self.kind == "orpo":
            losses, weight = odds_ratio_loss(_chosen(scores), _rejected(scores)), self.beta
        else:
            weight = 1.0
            losses = reference_free_loss(
                self.loss,
                margins,
                beta=self.beta,
                gamma=self.gamma,
                label_smoothing=self.label_smoothing,
            )
        nll = -(weights * _chosen(policy.log_p)).sum()
        correct = (weights * _chosen(policy.correct)).sum()
        metrics = {"margin": margins, "accuracy": margins > 0}
        return {
            "preference": Term((weights * losses).sum(), "pair", weight),
            "nll": Term(nll, "chosen token", self.nll_weight),
            **_pair_metrics(metrics, weights),
            "token_accuracy": Term(correct, "chosen token", weight=0.0),
        }


@dataclass(frozen=True)
class Reward:
    """Reward modelling over pairs (Bradley-Terry); fields: optionally ``margin`` [pairs].

    Terms in the unit "pair": "bradley_terry", "centring" ((reward_w + reward_l)²), and the metrics
    "accuracy", "margin", "reward_chosen", "reward_rejected".

    Attributes:
        center_rewards: Weight of "centring" (arXiv:2312.09244); 0 leaves it out.
    """

    center_rewards: float = 0.0
    counters: ClassVar[Mapping[str, Counter]] = PAIR_COUNTERS

    def __call__(self, model: nn.Module, micro_batch: Mapping[str, Any]) -> dict[str, Term]:
        """Sums over the pairs of one micro-batch of `samestep.data.collate.collate_records`."""
        rewards = at_least_float32(sequence_logits(model, micro_batch).squeeze(1))
        chosen, rejected = _chosen(rewards), _rejected(rewards)
        weights = pair_weights(micro_batch).to(rewards)
        margin = micro_batch.get("fields", {}).get("margin")
        margin = None if margin is None else margin.to(rewards)
        losses = reward_loss(chosen, rejected, margin=margin)
        terms = {"bradley_terry": Term((weights * losses).sum(), "pair")}
        if self.center_rewards:
            total = (weights * (chosen + rejected).square()).sum()
            terms["centring"] = Term(total, "pair", self.center_rewards)
        metrics = {
            "accuracy": (chosen > rejected).to(rewards),
            "margin": chosen - rejected,
            "reward_chosen": chosen,
            "reward_rejected": rejected,
        }
        return terms | _pair_metrics(metrics, weights)


def _chosen(values: Tensor) -> Tensor:
    """Those of the chosen sequences: [2 x pairs] to [pairs]."""
    return values[::2]


def _rejected(values: Tensor) -> Tensor:
    """Those of the rejected sequences: [2 x pairs] to [pairs]."""
    return values[1::2]


def _margins(values: Tensor) -> Tensor:
    """Chosen minus rejected: [2 x pairs] to [pairs]."""
    return _chosen(values) - _rejected(values)


def _pair_metrics(metrics: Mapping[str, Tensor], weights: Tensor) -> dict[str, Term]:
    """Metrics [pairs] as weighted sums, without a graph."""
    return {
        name: Term((weights * values.detach()).sum(), "pair", weight=0.0)
        for name, values in metrics.items()
    }
