"""The auditor on custom loops: sound ones are exact, each bug is named."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from thorough import THOROUGH
from torch import Tensor, nn
from torch.nn import functional

from samestep.audit.check import assert_same_step, check
from samestep.errors import CheckError

V = 31
SEEDS = [0, 1, 2] if THOROUGH else [0]


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, 16)
        self.hidden = nn.Linear(16, 16)
        self.head = nn.Linear(16, V)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embed(ids)).cumsum(1)))


def collate(rows: list[Tensor]) -> dict[str, Tensor]:
    pad = nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(rows, batch_first=True),
        "labels": pad(rows, batch_first=True, padding_value=-100),
    }


def nll(model: nn.Module, micro: dict[str, Tensor], reduction: str) -> Tensor:
    logits, targets = model(micro["input_ids"])[:, :-1], micro["labels"][:, 1:]
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)


def targets(micros: list[dict[str, Tensor]]) -> int:
    return sum(int((micro["labels"][:, 1:] != -100).sum()) for micro in micros)


def sound(model: nn.Module, micros: list[Any]) -> float:
    total = 0.0
    for micro in micros:
        loss = nll(model, micro, "sum") / targets(micros)
        loss.backward()
        total += loss.item()
    return total


def mean_of_means(model: nn.Module, micros: list[Any]) -> None:
    for micro in micros:
        (nll(model, micro, "mean") / len(micros)).backward()


def unscaled(model: nn.Module, micros: list[Any]) -> None:
    for micro in micros:
        nll(model, micro, "mean").backward()


def example_weighted(model: nn.Module, micros: list[Any]) -> None:
    rows = sum(len(micro["labels"]) for micro in micros)
    for micro in micros:
        (nll(model, micro, "mean") * len(micro["labels"]) / rows).backward()


def last_only(model: nn.Module, micros: list[Any]) -> None:
    for micro in micros:
        model.zero_grad()
        nll(model, micro, "mean").backward()


def clipped(model: nn.Module, micros: list[Any]) -> None:
    for micro in micros:
        (nll(model, micro, "mean") / len(micros)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.2)


def padding_counted(model: nn.Module, micros: list[Any]) -> None:
    for micro in micros:
        (nll(model, micro, "sum") / sum(one["labels"].numel() for one in micros)).backward()


def coupled(model: nn.Module, micros: list[Any]) -> None:
    for micro in micros:
        load = model(micro["input_ids"]).softmax(-1)[micro["labels"] != -100].mean(0)
        (nll(model, micro, "sum") / targets(micros) + load.square().sum() / len(micros)).backward()


def second_term(model: nn.Module, micros: list[Any]) -> None:
    for micro in micros:
        penalty = model(micro["input_ids"])[micro["labels"] != -100].square().mean()
        (nll(model, micro, "sum") / targets(micros) + 0.1 * penalty).backward()


def noisy(model: nn.Module, micros: list[Any]) -> None:
    for micro in micros:
        noise = 1 + 0.1 * torch.randn((), generator=torch.Generator().manual_seed(torch.seed()))
        (noise * nll(model, micro, "sum") / targets(micros)).backward()


def steps_each_time(model: nn.Module, micros: list[Any]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for micro in micros:
        optimizer.zero_grad()
        nll(model, micro, "mean").backward()
        optimizer.step()


def sound_train(model: nn.Module, micros: list[Any]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.zero_grad()
    sound(model, micros)
    optimizer.step()


def sign_descent(model: nn.Module, micros: list[Any]) -> None:
    unscaled(model, micros)
    with torch.no_grad():
        for weight in model.parameters():
            weight -= 0.01 * weight.grad / weight.grad.norm().clamp_min(1e-30)


def its_own_teacher(model: nn.Module, micros: list[Any]) -> None:
    for micro in micros:
        logits = model(micro["input_ids"])
        teacher = logits.detach().softmax(-1)
        functional.kl_div(logits.log_softmax(-1), teacher, reduction="sum").backward()


def subject(loop: Callable[..., Any], *, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randperm(20, generator=generator)[:8] + 3
    rows = [torch.randint(0, V, (int(n),), generator=generator) for n in lengths]
    updates = loop in (steps_each_time, sound_train)
    return {
        "model": Tiny,
        "examples": rows,
        "collate": collate,
        "train" if updates else "step": loop,
    }


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("loop", [sound, sound_train])
def test_sound_loops_are_exact(loop: Callable[..., Any], seed: int) -> None:
    report = check(subject(loop, seed=seed))
    assert report.verdict == "exact", report
    assert_same_step(subject(loop, seed=seed))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("loop", "cause"),
    [
        (mean_of_means, "mean-of-means"),
        (unscaled, "unscaled-sum"),
        (example_weighted, "example-weighted"),
        (last_only, "last-micro-batch-only"),
        (clipped, "clip-per-micro-batch"),
        (padding_counted, "padding-counted"),
        (coupled, "batch-coupled-term"),
        (second_term, "second-term-per-micro-batch"),
        (noisy, "rng"),
        (steps_each_time, "optimizer-step-per-micro-batch"),
    ],
)
def test_bugs_are_named(loop: Callable[..., Any], cause: str, seed: int) -> None:
    report = check(subject(loop, seed=seed))
    found = {axis.name: axis.cause for axis in report.axes if axis.verdict == "inexact"}
    assert found.get("micro-batch") == cause


def test_the_assertion_says_what_to_change() -> None:
    with pytest.raises(AssertionError, match=r"mean-of-means.*divide once"):
        assert_same_step(subject(mean_of_means, seed=0))


def test_an_update_that_hides_the_scale_is_not_passed() -> None:
    names = {**subject(sign_descent, seed=0), "examples": [torch.arange(3, 9)] * 4}
    with pytest.raises(CheckError, match="hides wrong scales"):
        check(names)


def test_a_gradient_of_nothing_but_rounding_is_not_passed() -> None:
    with pytest.raises(CheckError, match="lost in rounding"):
        check(subject(its_own_teacher, seed=0))
