"""Do runs with other memory knobs leave the same weights? In float32, judged against float64."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

FACTOR = 8.0
"""How much further apart two splits in float32 may be than one of them is from float64: each is off
by about as much as the other, and the largest of few weights varies."""

Train: TypeAlias = Callable[[str, Mapping[str, Any]], dict[str, Tensor]]
"""Trains in a precision with knobs from the same start, and gives the weights at the end."""


def worst_weight(found: dict[str, Tensor], right: dict[str, Tensor], *, floor: float) -> float:
    """The largest relative difference of a weight.

    A weight that the loss does not depend on (a bias inside a softmax), or one that started from
    zero and has hardly moved, holds rounding alone: no norm counts as less than the floor.
    """
    assert found.keys() == right.keys()
    return max(
        float((found[name].double() - weight.double()).norm() / weight.double().norm().clamp(floor))
        for name, weight in right.items()
    )


def check_same_weights(
    train: Train, knobs: Sequence[Mapping[str, Any]], *, precision: str, floor: float, bound: float
) -> None:
    """Assert that no knob changes the weights, by more than a bound or measured rounding.

    Args:
        train: As `Train` says.
        knobs: Settings that may not change the weights.
        precision: "float64", or "float32", whose error is measured.
        floor: As in `worst_weight`.
        bound: For float64, where all that rounds has room.
    """
    plain = train(precision, {})
    if precision != "float64":
        bound = FACTOR * worst_weight(plain, train("float64", {}), floor=floor)
        assert 0 < bound < 1e-4, "float32 itself is off by so much that a fault could hide"
    for knob in knobs:
        difference = worst_weight(train(precision, knob), plain, floor=floor)
        assert difference <= bound, (knob, difference, bound)
