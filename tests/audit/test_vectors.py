"""Gradients as vectors."""

import math

import pytest
import torch

from samestep.audit.gradients import (
    compare_gradients,
    global_norm,
    least_squares,
    linear_combination,
    norms,
    relative_difference,
)
from samestep.audit.subject import Gradient

A = {"w": torch.tensor([3.0, 0.0]).double(), "b": torch.tensor([4.0]).double()}
B = {"w": torch.tensor([0.0, 2.0]).double()}


def test_scale_and_direction_are_told_apart() -> None:
    doubled = compare_gradients(linear_combination([A], [2.0]), A)
    assert (doubled.ratio, doubled.cosine, doubled.relative_difference) == (2.0, 1.0, 1.0)
    assert doubled.perpendicular == 0
    turned = compare_gradients(linear_combination([A, B], [1.0, 1.0]), A)
    assert turned.perpendicular == pytest.approx(2 / 5)
    assert turned.worst[0][0] == "w"
    assert global_norm(A) == 5


def test_what_is_not_finite_is_different() -> None:
    broken = {"w": torch.full((2,), math.nan).double(), "b": A["b"]}
    assert not compare_gradients(broken, A).relative_difference <= 1e9
    assert compare_gradients(broken, A).perpendicular == math.inf


@pytest.mark.parametrize(
    ("gradient", "reference"), [(A, B), (B, A), (A, A), ({}, A), (A, {"w": 0 * A["w"]}), ({}, {})]
)
def test_the_relative_difference_alone_is_that_of_the_comparison(
    gradient: Gradient, reference: Gradient
) -> None:
    if gradient or reference:
        whole = compare_gradients(gradient, reference)
        assert relative_difference(gradient, reference) == whole.relative_difference
    assert norms(gradient) == {name: float(each.norm()) for name, each in gradient.items()}


def test_least_squares_read_the_coefficients_and_what_is_left() -> None:
    found = least_squares(linear_combination([A, B], [0.5, -2.0]), [A, B])
    assert found.coefficients == pytest.approx((0.5, -2.0))
    assert found.residual < 1e-15
    alone = least_squares(linear_combination([A, B], [1.0, 1.0]), [A])
    assert alone.residual == pytest.approx(2 / math.hypot(5, 2))
    assert least_squares(A, [{}]).coefficients == (0.0,)
