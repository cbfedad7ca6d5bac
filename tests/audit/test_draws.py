"""Generators of a loop's own, made and seeded in the step: no seed of the audit reaches them."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from kit import Tiny, collate, nll, rows, targets
from torch import Tensor, nn

from samestep.audit.check import check

Draw = Callable[[torch.Size], Tensor]


def of_torch() -> Draw:
    own = torch.Generator().manual_seed(3)
    return lambda shape: torch.rand(shape, generator=own)


def of_numpy() -> Draw:
    own = np.random.default_rng(3)
    return lambda shape: torch.from_numpy(own.random(tuple(shape)))


def of_numpy_before() -> Draw:
    own = np.random.RandomState(3)
    return lambda shape: torch.from_numpy(own.uniform(size=tuple(shape)))


def of_python() -> Draw:
    own = random.Random(3)
    return lambda shape: torch.tensor(
        [[own.random() for _ in range(shape[1])] for _ in range(shape[0])]
    )


def found(step: Callable[..., Any]) -> dict[str, Any]:
    subject = {"model": Tiny, "examples": rows(3), "collate": collate, "step": step}
    return {axis.name: axis.cause for axis in check(subject, ["micro-batch", "padding"]).axes}


@pytest.mark.parametrize("make", [of_torch, of_numpy, of_numpy_before, of_python])
def test_what_they_draw_for_each_micro_batch_is_seen(make: Callable[[], Draw]) -> None:
    def step(model: nn.Module, micros: list[Any]) -> None:
        draw, total = make(), targets(micros)
        for micro in micros:
            kept = draw(micro["labels"].shape) > 0.2
            labels = micro["labels"].masked_fill(~kept, -100)
            (nll(model, {**micro, "labels": labels}) / total).backward()

    assert found(step) == {"micro-batch": "rng", "padding": "rng"}


def test_what_belongs_to_the_example_is_not_taken_for_it() -> None:
    """A mean of means, with noise whose seed is the example's own."""

    def step(model: nn.Module, micros: list[Any]) -> None:
        for micro in micros:
            labels = micro["labels"].clone()
            for row in labels:
                length = int((row != -100).sum())
                own = np.random.default_rng(int(row[:length].sum()))
                row[:length][torch.from_numpy(own.random(length) < 0.2)] = -100
            own_micro = {**micro, "labels": labels}
            (nll(model, own_micro) / targets([own_micro]) / len(micros)).backward()

    assert found(step) == {"micro-batch": "mean-of-means", "padding": None}
