"""Every loss declares how its units are counted."""

import inspect
import pkgutil
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import pytest
import torch

from samestep import objectives
from samestep.objectives.classification import Classification
from samestep.objectives.language import CausalLMLoss
from samestep.objectives.routers import RouterLosses
from samestep.objectives.units import PAIR_COUNTERS, example_weights, field_at_targets

MODULES = [
    f"{objectives.__name__}.{module.name}" for module in pkgutil.iter_modules(objectives.__path__)
]


def losses() -> list[Any]:
    """Every class of the package that is called with a model and a micro-batch."""
    return [
        kind
        for module in MODULES
        for _, kind in inspect.getmembers(import_module(module), inspect.isclass)
        if kind.__module__ == module
        and list(inspect.signature(kind.__call__).parameters) == ["self", "model", "micro_batch"]
    ]


def test_the_losses_are_found() -> None:
    assert {CausalLMLoss, Classification, RouterLosses} < set(losses())


@pytest.mark.parametrize("kind", losses())
def test_every_loss_has_counters(kind: Any) -> None:
    if kind is RouterLosses:  # it adds to those of the loss inside
        return
    assert isinstance(kind.counters, Mapping)
    assert all(callable(counter) for counter in kind.counters.values())


def test_router_losses_count_what_is_inside_too() -> None:
    inside = Classification()
    assert set(RouterLosses(inside, "window").counters) == {"example"}
    assert set(RouterLosses(inside, z_weight=0.1).counters) == {"example", "routed token"}
    assert set(RouterLosses(lambda *_: {}, z_weight=0.1).counters) == {"routed token"}


def test_weights_multiply_counts() -> None:
    micro_batch = {
        "input_ids": torch.tensor([[1, 2, 3], [1, 4, 5]]),
        "labels": torch.tensor([[-100, 2, 3], [-100, -100, 5]]),
        "example_ids": torch.tensor([0, 1]),
        "fields": {"scores": torch.tensor([[0.0, 0.2, 0.3], [0.0, 0.4, 0.5]])},
    }
    assert example_weights(micro_batch).tolist() == [1, 1]
    micro_batch["example_weights"] = torch.tensor([3.0, 3.0]).double()
    counts = {unit: counter(micro_batch) for unit, counter in PAIR_COUNTERS.items()}
    assert counts == {"pair": 3, "chosen token": 6}
    assert field_at_targets(micro_batch, "scores").tolist() == pytest.approx([0.2, 0.3, 0.5])
