"""Examples that a batch leaves out: by what they are beside others, by place, by themselves."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, distributed, nn

from samestep.audit.check import check

ROWS = 8


def images() -> list[Tensor]:
    draw = torch.Generator().manual_seed(5)
    return [torch.randn(2, 4, 4, generator=draw) for _ in range(ROWS)]


def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(48, 2))


def losses(network: nn.Module, micro: Tensor) -> Tensor:
    return (network(micro) - micro.mean((1, 2, 3))[:, None]).square().sum(1)


def hardest_half(network: nn.Module, micros: list[Tensor]) -> None:
    for micro in micros:
        own = losses(network, micro)
        (own.topk((len(own) + 1) // 2).values.sum() / ROWS).backward()


def first_five(network: nn.Module, micros: list[Tensor]) -> None:
    """What does not fit a batch is lost."""
    for micro in micros:
        (losses(network, micro[:5]).sum() / ROWS).backward()


def hard_by_themselves(network: nn.Module, micros: list[Tensor]) -> None:
    for micro in micros:
        own = losses(network, micro)
        (own[own.detach() > 0.3].sum() / ROWS).backward()


@pytest.mark.parametrize(
    ("step", "cause"),
    [
        (hardest_half, "batch-coupled-term"),
        (first_five, "dropped-examples"),
        (hard_by_themselves, None),
    ],
)
def test_why_examples_are_left_out(step: Callable[..., Any], cause: str | None) -> None:
    subject = {"model": model, "examples": images(), "collate": torch.stack, "step": step}
    assert check(subject, axes=["micro-batch"]).axes[0].cause == cause


def prepared(network: nn.Module, micros: list[Tensor]) -> None:
    """A loop of accelerate's, which finds the ranks by itself."""
    accelerator = Accelerator(gradient_accumulation_steps=len(micros))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    ready, optimizer = accelerator.prepare(network, optimizer)
    number = accelerator.reduce(torch.tensor(float(sum(map(len, micros)))), "sum")
    assert accelerator.num_processes == distributed.get_world_size()
    for micro in micros:
        with accelerator.accumulate(ready):
            loss = losses(ready, micro).sum() / number
            accelerator.backward(loss * len(micros) * accelerator.num_processes)
            optimizer.step()
            optimizer.zero_grad()


def test_accelerate_finds_the_ranks_of_an_audit() -> None:
    subject = {"model": model, "examples": images(), "collate": torch.stack, "train": prepared}
    report = check({**subject, "wrap": None}, axes=["micro-batch", "ranks"])
    assert [axis.verdict for axis in report.axes] == ["exact", "exact"]
