"""Runs of bit-equal steps on ranks that are threads: any ranks, dealing, order, and restarts."""

import copy
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from thread_ranks import thread_ranks
from torch import nn

import samestep
from samestep.engine.exact_sum import digest_of

STEPS = 2
PACKS = 4


@dataclass(frozen=True)
class Draw:
    """Where and how each step of a run is taken; none of it may change a bit.

    Attributes:
        ranks: Of each step; another number than that of the step before is a restart.
        seed: Of the dealing of packs to ranks, their order, and the order of sums.
        restarts: Before which steps the run ends and goes on from its checkpoint.
        work: What a killed attempt had done of the step before the restart: 0 nothing, 1 a step
            that was not saved.
    """

    ranks: Sequence[int] = (1,) * STEPS
    seed: int = 0
    restarts: frozenset[int] = frozenset()
    lost: int = 0


@dataclass
class State:
    """What a checkpoint holds."""

    model: dict[str, Any]
    optimizer: dict[str, Any]
    bitwise: dict[str, Any]


@dataclass
class Trace:
    """What a run left, to be compared as a whole."""

    steps: list[Any] = field(default_factory=list)
    weights: dict[str, str] = field(default_factory=dict)
    moments: list[str] = field(default_factory=list)


class TwoLayers(nn.Module):
    """Rows of ragged length to one number each; the second weight is tied."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.inner = nn.Linear(6, 6)
        self.low = nn.Linear(6, 3, bias=False, dtype=torch.bfloat16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.inner(self.embed(ids)).tanh()
        low = self.low(hidden.to(self.low.weight.dtype)).float()
        return (hidden @ self.embed.weight.T).float() + low.sum(-1, keepdim=True)


def packs(step: int, *, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """The canonical packs of a step: ragged, weights that no float adds up exactly, some all 0."""
    generator = torch.Generator().manual_seed(1000 * seed + step)
    found = []
    for _ in range(PACKS):
        rows = int(torch.randint(1, 5, (), generator=generator))
        length = int(torch.randint(3, 9, (), generator=generator))
        ids = torch.randint(0, 11, (rows, length), generator=generator)
        scale = (0.0, 1.0, 10.0, 100.0)[int(torch.randint(0, 4, (), generator=generator))]
        weights = torch.rand(rows, generator=generator) * scale
        found.append({"input_ids": ids, "labels": ids, "example_weights": weights})
    return found


def plain_loss(model: nn.Module, pack: dict[str, torch.Tensor]) -> dict[str, samestep.Term]:
    logits = model(pack["input_ids"])[:, :-1]
    losses = nn.functional.cross_entropy(
        logits.transpose(1, 2), pack["labels"][:, 1:], reduction="none"
    )
    correct = (logits.argmax(-1) == pack["labels"][:, 1:]).float().sum(1)
    return {
        "nll": samestep.Term(losses.sum(1), unit="token"),
        "accuracy": samestep.Term(correct, unit="token", weight=0.0),
    }


def coupled_loss(model: nn.Module, pack: dict[str, torch.Tensor]) -> dict[str, Any]:
    """With the spread of the outputs over the batch ("rows"), and a "sum" beside it."""
    outputs = model(pack["input_ids"]).mean(1)
    return {
        **plain_loss(model, pack),
        "spread": samestep.Coupled(outputs, lambda rows: rows.std(0).sum(), "rows"),
        "load": samestep.Coupled(outputs.sum(0), lambda total: total.square().mean(), "sum", 0.01),
    }


coupled = samestep.TwoPass(coupled_loss)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.03)


def deal(parts: Sequence[Any], ranks: int, draw: random.Random) -> list[list[Any]]:
    """Each part to any rank, in any order; ranks may get none."""
    dealt: list[list[Any]] = [[] for _ in range(ranks)]
    for part in draw.sample(list(parts), len(parts)):
        dealt[draw.randrange(ranks)].append(part)
    return dealt


def run(draw: Draw, *, loss_fn: Any = plain_loss, data: int = 0) -> Trace:
    """Take `STEPS` steps as drawn; every rank must end with the same."""
    torch.manual_seed(data)
    model = TwoLayers()
    state = State(model.state_dict(), {}, {})
    trace, chance = Trace(), random.Random(draw.seed)
    steps = list(range(STEPS))
    parts = [step for step in steps if step == 0 or step in draw.restarts] + [STEPS]
    for start, end in itertools.pairwise(parts):
        if draw.lost:
            _segment(state, [start], draw, chance, loss_fn, data)
        state, reports = _segment(state, range(start, end), draw, chance, loss_fn, data)
        trace.steps += reports
    trace.weights = {name: digest_of(value) for name, value in state.model.items()}
    trace.moments = [
        digest_of(torch.as_tensor(value))
        for moments in state.optimizer["state"].values()
        for value in moments.values()
    ]
    return trace


def _segment(
    state: State,
    steps: Sequence[int],
    draw: Draw,
    chance: random.Random,
    loss_fn: Any,
    data: int,
) -> tuple[State, list[Any]]:
    """Some steps of one process each rank, from a checkpoint to the next."""
    ranks = draw.ranks[steps[0]]
    dealt = [deal(packs(step, seed=data), ranks, chance) for step in steps]

    def work(rank: int) -> tuple[State, list[Any]]:
        model = TwoLayers()
        model.load_state_dict(state.model)
        optimizer, bitwise = optimizer_of(model), samestep.Bitwise()
        if state.optimizer:
            optimizer.load_state_dict(copy.deepcopy(state.optimizer))
            bitwise.load_state_dict(state.bitwise)
        reports = []
        for own in dealt:
            report = samestep.step(
                model,
                optimizer,
                own[rank],
                loss_fn,
                max_grad_norm=0.5,
                check_sums=False,
                bitwise=bitwise,
            )
            evaluation = samestep.evaluate(
                model, own[rank], loss_fn, check_sums=False, bitwise=True
            )
            numbers = (report.loss, report.grad_norm, report.terms, report.counts)
            reports.append([*numbers, evaluation.loss, evaluation.terms, bitwise.digests])
        end = State(
            copy.deepcopy(model.state_dict()),
            copy.deepcopy(optimizer.state_dict()),
            bitwise.state_dict(),
        )
        return end, reports

    with thread_ranks(ranks, seed=draw.seed) as world:
        results = world.run(work)
    for end, reports in results[1:]:
        assert reports == results[0][1], "ranks part"
        for name, value in end.model.items():
            assert torch.equal(value, results[0][0].model[name]), f"ranks part in {name}"
    return results[0]
