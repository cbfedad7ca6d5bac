"""Errors that a run goes on after do not keep the tensors of what has failed.

Otherwise whoever tries less in the place where one was caught has less memory than before.
"""

import gc
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import samestep

BATCH = [{"x": torch.ones(4, 3), "labels": torch.zeros(4).long()}]


@pytest.fixture(autouse=True)
def by_counting_references() -> Iterator[None]:
    """Freed at once, not by a later search for cycles."""
    gc.disable()
    yield
    gc.enable()


class Loss:
    """Runs out of memory in its forward, or in its backward, as long as it is told to."""

    def __init__(self, where: str) -> None:
        self.fails_in = where
        self.held: list[weakref.ref[Tensor]] = []

    def __call__(self, model: nn.Module, micro_batch: Any) -> samestep.Term:
        states = model(micro_batch["x"])
        self.held.append(weakref.ref(states))
        total = states.square().sum()  # keeps the states for the backward
        if self.fails_in == "forward":
            _fail()
        if self.fails_in == "backward":
            total.register_hook(_fail)
        return samestep.Term(total, "example")


def _fail(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def runs(model: nn.Module) -> dict[str, Callable[[Loss], Any]]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return {
        "step": partial(samestep.step, model, optimizer, BATCH, check_sums=False),
        "backward": partial(samestep.backward, model, BATCH, check_sums=False),
        "evaluate": partial(samestep.evaluate, model, BATCH, check_sums=False),
    }


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("step", "forward"),
        ("step", "backward"),
        ("backward", "forward"),
        ("backward", "backward"),
        ("evaluate", "forward"),
    ],
)
def test_the_handler_has_the_memory_of_the_failed_attempt(name: str, where: str) -> None:
    run, loss = runs(nn.Linear(3, 3))[name], Loss(where)
    try:
        run(loss)
    except samestep.OutOfMemoryError as error:
        held = [tensor() for tensor in loss.held]
        assert held == [None]
        assert "Tried to allocate 2 GiB" in str(error)
        loss.fails_in = ""
        run(loss)  # while the error is being handled, as a loop of one's own may do
    else:
        raise AssertionError("it has not failed")


@pytest.mark.parametrize("name", ["step", "backward"])
def test_gradients_that_are_not_finite_are_gone_too(name: str) -> None:
    """Who looks for the rows that are at fault makes gradients of its own."""
    model = nn.Linear(3, 3).bfloat16()  # whose gradients are summed in float32, beside the weights
    run, sums = runs(model)[name], list[weakref.ref[Tensor]]()

    def loss(model: nn.Module, micro_batch: Any) -> samestep.Term:
        total = model(micro_batch["x"].bfloat16()).float().square().sum()
        return samestep.Term(total / 0, "example")

    make_sum = Tensor.float

    def noted(tensor: Tensor) -> Tensor:
        found = make_sum(tensor)
        sums.append(weakref.ref(found))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", noted)
        try:
            run(loss)
        except samestep.NotFiniteError as error:
            assert len(sums) > len(list(model.parameters()))
            assert [one() for one in sums] == [None] * len(sums)
            assert "term 'loss' is inf" in str(error)
        else:
            raise AssertionError("it has not failed")
