"""Losses on the routers of a mixture of experts, beside any loss that runs the model."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from samestep.engine.collectives import all_gather_object, all_reduce_sum, rank
from samestep.engine.counts import targets_per_sequence
from samestep.engine.device_copy import data_of
from samestep.engine.targets import positions_where, sequence_ids, sequence_spans
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
from samestep.models.routers import Routing, record_routing, router_biases


@dataclass(frozen=True)
class _RoutedTokens:
    """The tokens of a micro-batch that count, those of sequences with a target; never padding.

    Attributes:
        positions: In the flattened rows [tokens].
        sequence: The sequence of each [tokens].
        weight: The weight of each, its example's [tokens], float64.
        sequence_weights: The weight of each sequence [sequences], float64; 0 without a target.
    """

    positions: Tensor
    sequence: Tensor
    weight: Tensor
    sequence_weights: Tensor

    @classmethod
    def of(cls, micro_batch: Mapping[str, Any]) -> "_RoutedTokens":
        """Those of a micro-batch of `samestep.data.collate.collate_examples`."""
        data = data_of(micro_batch)
        number = int(_is_routed(data)[0].sum())  # a GPU is asked for it only without the data
        mask, ids, weights = _is_routed(micro_batch)
        positions = positions_where(mask, number)
        sequence = ids.flatten()[positions]
        return cls(positions, sequence, weights[sequence], weights)


def _is_routed(micro_batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens count [rows, length], the sequence of each, and the weights of the sequences."""
    targets, weights = targets_per_sequence(micro_batch)
    weights = weights * (targets > 0)
    ids = sequence_ids(micro_batch)
    is_token = torch.zeros_like(ids, dtype=torch.bool)
    for row, span in sequence_spans(micro_batch):
        is_token[row, span] = True
    return is_token & (weights[ids] > 0), ids, weights


ROUTER_COUNTERS: dict[str, Counter] = {
    "routed token": lambda micro_batch: float(_RoutedTokens.of(micro_batch).weight.sum())
}
"""Of `RouterLosses` with a z-loss. A token of an example of weight w counts w times."""


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

    def observe(self, micro_batch: Mapping[str, Any], routings: Mapping[str, Routing]) -> None:
        """Add a micro-batch's choices to the loads; one that runs again does not count again.

        Args:
            micro_batch: A micro-batch of `samestep.data.collate.collate_examples`.
            routings: What the routers decided, by name.
        """
        tokens, loads = _RoutedTokens.of(micro_batch), []
        for routing in routings.values():
            sequences, experts = len(tokens.sequence_weights), routing.logits.shape[1]
            empty = tokens.sequence_weights.new_zeros(sequences, experts)
            choices = routing.choices.detach()[tokens.positions]
            loads.append(
                count_choices(choices, tokens.sequence, weights=tokens.weight, zeros=empty)
            )
        by_example = torch.stack(loads, dim=1)  # [sequences, routers, experts]
        self._loads |= dict(zip(micro_batch["example_ids"].tolist(), by_example, strict=True))

    @torch.no_grad()
    def after_step(self, model: nn.Module, taken: bool) -> None:
        """Move the biases, on every rank the same way, and start counting anew.

        Args:
            model: The model; its biases are changed in place.
            taken: Whether the weights moved; if not, the biases stay too.
        """
        biases = list(router_biases(model).values())
        own = torch.zeros(len(biases), len(biases[0]), dtype=torch.float64, device=biases[0].device)
        # A rank without work may have run an example of another one, for FSDP2's sake.
        by_rank = all_gather_object(sorted(self._loads))
        counted = {example for examples in by_rank[: rank()] for example in examples}
        for example in sorted(self._loads.keys() - counted):
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
    and needs `samestep.TwoPass`; by "sequence" it is a sum over sequences. The sources are those of
    `samestep.losses.router`.

    Attributes:
        loss_fn: Runs the model.
        balance: Where loads are to be equal: over the "window" (the effective batch), within each
            "sequence", or None.
        balance_weight: Weight of the term.
        z_weight: Weight of the z-loss; 0 leaves it out.
        bias: Moves biases after the step, or None.

    Examples:
        >>> from samestep import CausalLMLoss, TwoPass
        >>> losses = RouterLosses(CausalLMLoss(), "window", balance_weight=0.01, z_weight=0.001)
        >>> loss, counters = TwoPass(losses), losses.counters
        >>> list(counters)
        ['routed token']
    """

    loss_fn: LossFn
    balance: Literal["window", "sequence"] | None = None
    _: KW_ONLY
    balance_weight: float = 0.001
    z_weight: float = 0.0
    bias: RouterBias | None = None

    @property
    def counters(self) -> Mapping[str, Counter]:
        """Those of ``loss_fn``, and "routed token" for the z-loss."""
        counters: Mapping[str, Counter] = getattr(self.loss_fn, "counters", {})
        return {**counters, **ROUTER_COUNTERS} if self.z_weight else counters

    def __call__(
        self, model: nn.Module, micro_batch: Mapping[str, Any]
    ) -> dict[str, Term | Coupled]:
        """The loss's terms and those of the routers.

        Raises:
            ConfigError: A router does not see every token of the micro-batch once.
        """
        with record_routing(model) as routings:
            terms = dict(named_terms(self.loss_fn(model, micro_batch)))
        _check_every_token_routed(routings, tokens=micro_batch["input_ids"].numel())
        if self.bias is not None and torch.is_grad_enabled():
            self.bias.observe(micro_batch, routings)
        tokens = _RoutedTokens.of(micro_batch)
        if self.balance is not None:
            terms["router_balance"] = self._balance(list(routings.values()), tokens)
        if self.z_weight:
            totals = [
                z_loss_sum(routing.logits[tokens.positions], tokens.weight)
                for routing in routings.values()
            ]
            total = torch.stack(totals).sum() / len(routings)
            terms["router_z"] = Term(total, "routed token", self.z_weight)
        return terms

    def _balance(self, routings: list[Routing], tokens: _RoutedTokens) -> Term | Coupled:
        by_router = [
            (_expert_probabilities(routing)[tokens.positions], routing.choices[tokens.positions])
            for routing in routings
        ]
        if self.balance == "window":
            top_k = routings[0].choices.shape[1]
            part = torch.stack([load_statistic(p, c, weights=tokens.weight) for p, c in by_router])
            return Coupled(part, lambda s: batch_balance(s, top_k), weight=self.balance_weight)
        sequences = len(tokens.sequence_weights)
        values = torch.stack(
            [
                sequence_balance(p, c, sequence_ids=tokens.sequence, num_sequences=sequences)
                for p, c in by_router
            ]
        )
        total = (values.mean(0) * tokens.sequence_weights.to(values)).sum()
        return Term(total, "sequence", self.balance_weight)


def _expert_probabilities(routing: Routing) -> Tensor:
    """Each token's probability of each expert [tokens, experts], with a graph."""
    shares = routing_probabilities(routing.logits, routing.scores, routing.choices)
    if shares is None:
        raise ConfigError(
            "router_loss: this model's routers neither take the softmax of their logits nor divide "
            "sigmoids by their sum, so the loss is not defined for them"
        )
    return shares


def _check_every_token_routed(routings: Mapping[str, Routing], *, tokens: int) -> None:
    """Every router must have seen the micro-batch's tokens, all of them, in order."""
    seen = {name: len(routing.logits) for name, routing in routings.items()}
    wrong = {name: number for name, number in seen.items() if number != tokens}
    if not routings or wrong:
        name, number = next(iter(wrong.items()), ("of a model without routers", 0))
        raise ConfigError(
            f"router losses: the router {name} saw {number} tokens of a micro-batch of {tokens}: "
            "they serve models whose routers all see every token"
        )
