"""Evaluations on two ranks: what they say is what one process says, or why not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from trainers import factory
from transformers import Trainer

from samestep.audit.axes.axis import AxisResult
from samestep.audit.check import check

SIZES = (3, 1, 4, 2, 6, 2, 5, 3)


def model() -> nn.Module:
    return nn.Linear(3, 1)


def examples() -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, generator=draw) for size in SIZES]


def step(model: nn.Module, micro_batches: list[Tensor]) -> None:
    count = torch.tensor(float(sum(map(len, micro_batches))))
    distributed.all_reduce(count)
    for micro_batch in micro_batches:
        (model(micro_batch).square().sum() / count).backward()
    for weight in model.parameters():
        distributed.all_reduce(weight.grad)


def sums(model: nn.Module, batches: list[Tensor]) -> Tensor:
    with torch.no_grad():
        total = torch.stack([model(batch).square().sum() for batch in batches]).sum()
    return torch.stack([total, total.new_tensor(float(sum(map(len, batches))))])


def over_all(model: nn.Module, batches: list[Tensor]) -> float:
    held = sums(model, batches)
    distributed.all_reduce(held)
    return float(held[0] / held[1])


def mean_of_ranks(model: nn.Module, batches: list[Tensor]) -> float:
    held = sums(model, batches)
    mean = held[0] / held[1]
    distributed.all_reduce(mean)
    return float(mean / distributed.get_world_size())


def of_the_first(model: nn.Module, batches: list[Tensor]) -> float:
    held = sums(model, batches)
    distributed.broadcast(held, 0)
    return float(held[0] / held[1])


def added_up(model: nn.Module, batches: list[Tensor]) -> float:
    held = sums(model, batches)
    mean = held[0] / held[1]
    distributed.all_reduce(mean)
    return float(mean)


def judged(subject: Any) -> AxisResult:
    return check(subject, ["evaluation-ranks"]).axes[0]


@pytest.mark.parametrize(
    ("evaluate", "cause"),
    [
        (over_all, None),
        (mean_of_ranks, "eval-mean-of-means"),
        (of_the_first, "dropped-examples"),
        (added_up, "world-scaled"),
    ],
)
def test_what_ranks_say_is_what_one_process_says(
    evaluate: Callable[..., float], cause: str | None
) -> None:
    loop = {"model": model, "examples": examples(), "collate": torch.cat, "step": step}
    axis = judged({**loop, "evaluate": evaluate})
    assert (axis.verdict, axis.cause) == ("exact" if cause is None else "inexact", cause)


def test_an_evaluation_that_reduces_nothing_is_skipped_with_that_reason() -> None:
    loop = {"model": model, "examples": examples(), "collate": torch.cat, "step": step}
    alone = judged({**loop, "evaluate": lambda model, batches: float(sums(model, batches)[0])})
    assert alone.verdict == "skipped"
    assert "calls nothing of torch.distributed" in alone.reason


class Counts(Trainer):
    """An evaluation that divides the sum over all rows by their targets; repeats count, or not."""

    repeats = False

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        held = []
        for batch in self.get_eval_dataloader():
            with torch.no_grad():
                logits = self.model(**batch).logits[:, :-1].transpose(1, 2)
            labels = batch["labels"][:, 1:]
            losses = nn.functional.cross_entropy(logits, labels, reduction="none").sum(1)
            of_rows = torch.stack([losses, (labels != -100).sum(1)], 1)
            gather = (
                self.accelerator.gather if self.repeats else self.accelerator.gather_for_metrics
            )
            held.append(gather(of_rows))
        total, number = torch.cat(held).sum(0)
        return {"eval_loss": float(total / number)}


class CountsRepeats(Counts):
    repeats = True


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    ("kind", "cause"),
    [(Counts, None), (CountsRepeats, "duplicated-examples"), (Trainer, "eval-mean-of-means")],
)
def test_trainers_evaluate_on_their_own_loader_s_shares(
    kind: type[Trainer], cause: str | None
) -> None:
    axis = judged(factory(kind=kind))
    assert (axis.verdict, axis.cause) == ("exact" if cause is None else "inexact", cause)
