"""Mixtures of experts: terms of the routers beside any loss."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from samestep.coupled import Coupled
from samestep.errors import ConfigError
from samestep.losses.router import (
    load_balance,
    load_statistic,
    router_scores,
    router_z_losses,
    sequence_load_balance,
)
from samestep.objectives.classification import example_weights
from samestep.ranks import sum_over_ranks
from samestep.targets import sequence_ids
from samestep.terms import Counter, LossFn, Term, named_terms


@dataclass(frozen=True)
class Routing:
    """What one router did with the tokens of a micro-batch: logits, weights, chosen experts."""

    logits: Tensor
    weights: Tensor
    chosen: Tensor


def routers_of(model: nn.Module) -> list[nn.Module]:
    """The routers of a model of transformers, in order of depth.

    Raises:
        ConfigError: It has none.
    """
    found = [module for module in model.modules() if type(module).__name__.endswith("Router")]
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no router: leave the settings of routers out, they are "
            "for mixtures of experts"
        )
    return found


@contextmanager
def watched(model: nn.Module) -> Iterator[list[Routing]]:
    """Collects what the routers do in the forwards inside the block."""
    seen: list[Routing] = []

    def keep(_: nn.Module, __: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        seen.append(Routing(*output))

    hooks = [router.register_forward_hook(keep) for router in routers_of(model)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def token_weights(micro: Mapping[str, Any]) -> Tensor:
    """The weight of each input token [rows x length], float64; 0 for padding."""
    weights = example_weights(micro)[sequence_ids(micro)]
    mask = micro.get("attention_mask")
    return (weights if mask is None else weights * mask).flatten()


ROUTER_COUNTERS: dict[str, Counter] = {
    "input token": lambda micro: float(token_weights(micro).sum()),
    "input sequence": lambda micro: float(example_weights(micro).sum()),
}
"""Routers see every token of every sequence, targets or not."""


@dataclass(frozen=True)
class WithRouters:
    """A loss with terms of the routers beside it.

    Terms: "load_balance" ("window": coupled over the effective batch; "sequence": unit "input
    sequence", the mean over layers) and "router_z" (unit "input token", the mean over layers).

    Attributes:
        loss_fn: The loss; it runs the model once.
        balance: Which load balance; None leaves it out.
        balance_weight: Its weight.
        z_weight: Weight of the z-loss; 0 leaves it out.
        bias: Balances by bias, without a loss; None: not.
    """

    loss_fn: LossFn
    balance: Literal["window", "sequence"] | None = None
    balance_weight: float = 0.001
    z_weight: float = 0.0
    bias: "BiasBalance | None" = None

    def __call__(self, model: nn.Module, micro: Mapping[str, Any]) -> dict[str, Term | Coupled]:
        """The loss's own terms and those of the routers."""
        with watched(model) as routings:
            terms = dict(named_terms(self.loss_fn(model, micro)))
        weights = token_weights(micro)
        if self.balance is not None:
            terms["load_balance"] = self._balance(routings, micro, weights)
        if self.z_weight:
            sums = [weights.to(z) @ z for z in (router_z_losses(r.logits) for r in routings)]
            terms["router_z"] = Term(torch.stack(sums).mean(), "input token", self.z_weight)
        if self.bias is not None and model.training and torch.is_grad_enabled():
            self.bias.count(routings, weights)
        return terms

    def _balance(
        self, routings: list[Routing], micro: Mapping[str, Any], weights: Tensor
    ) -> Term | Coupled:
        scores = [router_scores(one.logits, one.weights, one.chosen) for one in routings]
        if self.balance == "window":
            parts = [
                load_statistic(score, one.chosen, weights)
                for score, one in zip(scores, routings, strict=True)
            ]
            return Coupled(torch.stack(parts), load_balance, "sum", self.balance_weight)
        by_sequence = example_weights(micro)
        ids = sequence_ids(micro).flatten()
        losses = [
            sequence_load_balance(score, one.chosen, ids, len(by_sequence), weights > 0)
            for score, one in zip(scores, routings, strict=True)
        ]
        mean = torch.stack(losses).mean(dim=0)
        return Term((by_sequence.to(mean) * mean).sum(), "input sequence", self.balance_weight)


@dataclass
class BiasBalance:
    """Load balance without a loss: the routers' biases follow the loads, arXiv:2408.15664.

    After each step the bias of every expert moves by ``rate`` towards balance: up if it was chosen
    less often than the mean over the whole effective batch, else down.

    Attributes:
        rate: The size of a move.
    """

    rate: float
    _loads: list[Tensor] = field(default_factory=list, repr=False)

    def count(self, routings: list[Routing], weights: Tensor) -> None:
        """Count the loads of one micro-batch."""
        found = [load_statistic(r.logits.detach(), r.chosen, weights) for r in routings]
        loads = torch.stack([one[: (len(one) - 1) // 2].double() for one in found])
        self._loads = [loads + sum(self._loads)] if self._loads else [loads]

    def forget(self) -> None:
        """Start counting anew: the last attempt at a step was not taken."""
        self._loads.clear()

    @torch.no_grad()
    def after_step(self, model: nn.Module) -> None:
        """Move the biases by what was counted since the last step, on all ranks."""
        biases = router_biases(model)
        own = self._loads.pop() if self._loads else torch.zeros_like(torch.stack(biases).double())
        for bias, load in zip(biases, sum_over_ranks(own), strict=True):
            bias += self.rate * (load.mean() - load).sign().to(bias)


def router_biases(model: nn.Module) -> list[Tensor]:
    """The biases that routers add to their scores to choose experts, in order of depth.

    Raises:
        ConfigError: The model's routers have none.
    """
    found = [
        buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")
    ]
    if not found:
        raise ConfigError(
            f"{type(model).__name__}'s routers have no bias to balance by (DeepSeek-V3 and "
            "MiniMax-M2 have): use the loss instead"
        )
    return found
