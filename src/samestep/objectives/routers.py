"""Losses on the routers of a mixture of experts, beside any loss that runs the model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from samestep.engine.collectives import all_gather_object, all_reduce_sum, rank
from samestep.engine.counts import targets_per_sequence
from samestep.engine.targets import sequence_ids, sequence_spans
from samestep.engine.terms import Counter, Coupled, LossFn, Term, named_terms
from samestep.errors import ConfigError
from samestep.losses.router import (
    batch_balance,
    count_choices,
    load_statistic,
    routing_probabilities,
    sequence_balance,
    z_loss_sum,
)
from samestep.models.routers import Routing, overheard, router_biases


@dataclass(frozen=True)
class Tokens:
    """The tokens of a micro-batch that count, those of sequences with a target; never padding.

    Attributes:
        at: Their positions in the flattened rows [tokens].
        sequence: The sequence of each [tokens].
        weight: The weight of each, its example's [tokens], float64.
        by_sequence: The weight of each sequence [sequences], float64; 0 without a target.
    """

    at: Tensor
    sequence: Tensor
    weight: Tensor
    by_sequence: Tensor

    @classmethod
    def of(cls, micro: Mapping[str, Any]) -> "Tokens":
        """Those of a micro-batch of `samestep.data.collate.collate_examples`."""
        targets, weights = targets_per_sequence(micro)
        weights = weights * (targets > 0)
        ids = sequence_ids(micro)
        real = torch.zeros_like(ids, dtype=torch.bool)
        for row, span in sequence_spans(micro):
            real[row, span] = True
        at = (real & (weights[ids] > 0)).flatten().nonzero().squeeze(1)
        sequence = ids.flatten()[at]
        return cls(at, sequence, weights[sequence], weights)


COUNTERS: dict[str, Counter] = {"routed token": lambda micro: float(Tokens.of(micro).weight.sum())}
"""Counters of the units of this module."""


class RouterBias:
    """Balance without a loss: after each step the bias of an expert moves against its load.

    b += rate x sign(mean load - load), as in DeepSeek-V3 (arXiv:2408.15664, arXiv:2412.19437); a
    load is how often an expert was chosen in the whole effective batch, on all ranks.

    Args:
        rate: How far a bias moves in a step.
    """

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._loads: dict[int, Tensor] = {}

    def observe(self, micro: Mapping[str, Any], routings: Mapping[str, Routing]) -> None:
        """Take note of a micro-batch's choices; one that runs again does not count again."""
        tokens, loads = Tokens.of(micro), []
        for routing in routings.values():
            empty = tokens.by_sequence.new_zeros(len(tokens.by_sequence), routing.logits.shape[1])
            chosen = routing.choices.detach()[tokens.at]
            loads.append(count_choices(chosen, tokens.sequence, weights=tokens.weight, zeros=empty))
        by_example = torch.stack(loads, dim=1)  # [sequences, routers, experts]
        self._loads |= dict(zip(micro["example_ids"].tolist(), by_example, strict=True))

    @torch.no_grad()
    def after_step(self, model: nn.Module, taken: bool) -> None:
        """Move the biases, on every rank the same way; only forget, if the step was not taken."""
        biases = list(router_biases(model).values())
        own = torch.zeros(len(biases), len(biases[0]), dtype=torch.float64, device=biases[0].device)
        # A rank without work may have run an example of another one, for FSDP2's sake.
        seen = {
            example for ids in all_gather_object(sorted(self._loads))[: rank()] for example in ids
        }
        for example in sorted(self._loads.keys() - seen):
            own += self._loads[example]
        self._loads = {}
        for bias, load in zip(biases, all_reduce_sum(own), strict=True):
            if taken:
                bias += (self.rate * (load.mean() - load).sign()).to(bias)


@dataclass(frozen=True)
class RouterLosses:
    """A loss, with terms on the routers of its forward beside it.

    Adds the terms "router_balance" and "router_z" (unit: routed token), each the mean over the
    routers. By "window" the balance is that of the whole effective batch, so it couples the batch
    and needs `samestep.TwoPass`; by "sequence" it is a sum over sequences.

    Attributes:
        loss_fn: Runs the model.
        balance: Where loads are to be equal: over the "window" (the effective batch), within each
            "sequence", or None.
        balance_weight: Weight of the term.
        z_weight: Weight of the z-loss; 0 leaves it out.
        bias: Moves biases after the step, or None.
    """

    loss_fn: LossFn
    balance: Literal["window", "sequence"] | None = None
    balance_weight: float = 0.001
    z_weight: float = 0.0
    bias: RouterBias | None = None

    def __call__(self, model: nn.Module, micro: Mapping[str, Any]) -> dict[str, Term | Coupled]:
        """The loss's terms and those of the routers.

        Raises:
            ConfigError: A router does not see every token of the micro-batch once.
        """
        with overheard(model) as routings:
            terms = dict(named_terms(self.loss_fn(model, micro)))
        _check(routings, micro["input_ids"].numel())
        if self.bias is not None and torch.is_grad_enabled():
            self.bias.observe(micro, routings)
        tokens, number = Tokens.of(micro), len(routings)
        if self.balance is not None:
            terms["router_balance"] = self._balance(list(routings.values()), tokens)
        if self.z_weight:
            totals = [z_loss_sum(one.logits[tokens.at], tokens.weight) for one in routings.values()]
            total = torch.stack(totals).sum() / number
            terms["router_z"] = Term(total, "routed token", self.z_weight)
        return terms

    def _balance(self, routings: list[Routing], tokens: Tokens) -> Term | Coupled:
        shares = [_shares(one)[tokens.at] for one in routings]
        choices = [one.choices[tokens.at] for one in routings]
        top_k = choices[0].shape[1]
        both = list(zip(shares, choices, strict=True))
        if self.balance == "window":
            part = torch.stack([load_statistic(s, c, weights=tokens.weight) for s, c in both])
            return Coupled(part, lambda s: batch_balance(s, top_k), weight=self.balance_weight)
        number = len(tokens.by_sequence)
        values = torch.stack(
            [
                sequence_balance(s, c, sequence_ids=tokens.sequence, num_sequences=number)
                for s, c in both
            ]
        )
        total = (values.mean(0) * tokens.by_sequence.to(values)).sum()
        return Term(total, "sequence", self.balance_weight)


def _shares(routing: Routing) -> Tensor:
    shares = routing_probabilities(routing.logits, routing.scores, routing.choices)
    if shares is None:
        raise ConfigError(
            "router_loss: this model's routers neither take the softmax of their logits nor divide "
            "sigmoids by their sum, so the loss is not defined for them"
        )
    return shares


def _check(routings: Mapping[str, Routing], tokens: int) -> None:
    """Every router must have seen the micro-batch's tokens, all of them, in order."""
    wrong = {n: len(one.logits) for n, one in routings.items() if len(one.logits) != tokens}
    if not routings or wrong:
        name, seen = next(iter(wrong.items()), ("of a model without routers", 0))
        raise ConfigError(
            f"router losses: the router {name} saw {seen} tokens of a micro-batch of {tokens}: "
            "they serve models whose routers all see every token"
        )
