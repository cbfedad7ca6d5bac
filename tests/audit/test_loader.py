"""The axis of the loader: what deals the rows may not change the step."""

from collections.abc import Iterator
from itertools import cycle
from typing import Any

import pytest
import torch
from kit import Case, Tiny, collate, nll, rows, targets
from knobs_and_loaders import CASES
from torch import distributed
from trainer_subclasses import over_items
from trainer_subclasses import rows as trainer_rows
from trainers import factory
from transformers import Trainer

from samestep.audit.adapters.loaders import recognise
from samestep.audit.check import check

SEED = 5


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.axis == "loader"], ids=lambda case: case.name
)
def test_a_loader_changes_nothing_or_is_named(case: Case) -> None:
    report = check(case.build(SEED), case.axes)
    found = {axis.name: axis.cause for axis in report.axes if axis.verdict == "inexact"}
    assert found == ({"loader": case.cause} if case.cause else {})


def loop(loader: Any, mean: bool = False) -> dict[str, Any]:
    def step(model: Any, micros: list[Any]) -> None:
        for micro in micros:
            loss = nll(model, micro, "mean") / len(micros) if mean else nll(model, micro)
            (loss if mean else loss / targets(micros)).backward()

    base = {"model": Tiny, "examples": rows(SEED), "collate": collate, "step": step}
    return {**base, "loader": loader}


def twice_the_third(examples: list[Any], micro_batch_size: int) -> Iterator[list[Any]]:
    del micro_batch_size
    yield examples[:3]
    yield examples[2:]


def test_which_examples_came_how_often_is_said() -> None:
    axis = check(loop(twice_the_third), ["loader"]).axes[0]
    assert axis.cause == "duplicated-examples"
    assert "example 2 came twice" in axis.evidence


def test_a_loader_without_an_end_is_no_verdict() -> None:
    axis = check(loop(lambda examples, size: cycle([examples])), ["loader"]).axes[0]
    assert axis.verdict == "skipped"
    assert "one pass" in axis.reason


def test_a_fault_of_the_cut_is_not_blamed_on_the_loader() -> None:
    axes = check(loop(lambda rows, size: [rows[:5], rows[5:]], mean=True), ["loader"]).axes
    assert axes[0].verdict == "skipped"
    assert "micro-batch" in axes[0].reason


def test_rows_are_recognised_by_the_fields_that_they_still_have() -> None:
    given = [{"ids": torch.tensor([1]), "text": "a"}, {"ids": torch.tensor([2]), "text": "b"}]
    given.append(given[0])
    assert recognise([{"ids": torch.tensor([2])}, {"ids": torch.tensor([1])}], given) == (1, 0)
    assert recognise([given[0], {"ids": torch.tensor([1])}, {"ids": 3}], given) == (0, 2, None)


class LeavesRepeatsOut(Trainer):
    """Masks the rows that accelerate repeats to give each rank as many."""

    def get_batch_samples(self, iterator: Any, number: int, device: Any) -> Any:
        batches, _ = super().get_batch_samples(iterator, number, device)
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        size = self.args.per_device_train_batch_size
        for at, batch in enumerate(batches):
            first = (at * world + rank) * size
            places = torch.arange(first, first + len(batch["labels"]))
            batch["labels"][places >= len(self.train_dataset)] = -100
        count = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
        return batches, self.accelerator.gather(count).sum()


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", [Trainer, LeavesRepeatsOut])
def test_repeats_of_ranks_are_named_unless_they_are_left_out(kind: type[Trainer]) -> None:
    make = factory(kind=kind, data=trainer_rows(SEED), compute_loss_func=over_items)
    axis = check(make, ["ranks"]).axes[0]
    assert axis.cause == (None if kind is LeavesRepeatsOut else "duplicated-examples")
    assert "as the trainer's loader deals" in axis.reason


def test_examples_that_no_rank_sees_are_named() -> None:
    names = loop(None)
    del names["loader"]

    def shard(indices: list[int], rank: int, world: int) -> list[int]:
        return indices[rank::world][: len(indices) // world]

    axis = check({**names, "wrap": None, "step": reduced, "shard": shard}, ["ranks"]).axes[0]
    assert axis.cause == "dropped-examples"
    assert "no rank sees example" in axis.evidence


def reduced(model: Any, micros: list[Any]) -> None:
    count = torch.tensor(targets(micros))
    distributed.all_reduce(count)
    for micro in micros:
        (nll(model, micro) / count).backward()
    for weight in model.parameters():
        distributed.all_reduce(weight.grad)
