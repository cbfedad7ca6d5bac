"""Sums of gradients on a grid of integers, and their digests."""

import gc
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from samestep.engine import exact_sum, fold, grid_sum
from samestep.engine.grid_sum import GridSum


def added(parts: list[Tensor], shift: int | None) -> GridSum:
    total = GridSum(shift)
    for part in parts:
        total.add(part.clone())  # the first one's place is taken for the result
    return total


def largest_of(*values: float) -> float:
    return float(added([torch.tensor(values)], None).largest())


@given(
    st.lists(st.floats(-1, 1, width=32), min_size=6, max_size=6),
    st.integers(-140, 100),
    st.permutations(range(6)),
    st.integers(1, 6),
)
def test_gradients_on_a_grid_add_up_in_any_order(
    values: list[float], power: int, order: list[int], number: int
) -> None:
    """Of an even and an odd number of gradients; each is rounded once."""
    parts = [(torch.tensor([value, 0.3 * value]).double() * 2.0**power).float() for value in values]
    parts = parts[:number]
    exponent = exact_sum.exponent_of(float(added(parts, None).largest()))
    if exponent is None:
        return
    shift = exact_sum.grid_bits(number) - exponent
    total = added(parts, shift).integers()
    in_order = [parts[at] for at in order if at < number]
    assert torch.equal(total, added(in_order, shift).integers())
    for element, found in enumerate(total.tolist()):
        exact = sum(Fraction(float(part[element])) for part in parts)
        assert abs(found - exact * Fraction(2) ** shift) <= number / 2  # half a unit a part


@pytest.mark.parametrize("shift", [-120, -3, 0, 40, 127, 140])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_each_element_is_rounded_to_the_nearest_even(shift: int, number: int) -> None:
    """Halves too, of both signs, in all three ways of adding."""
    units = torch.randn(64, dtype=torch.float64) * 2.0 ** min(30, 120 + shift)
    halves = torch.arange(-32, 32, dtype=torch.float64) + 0.5
    values = (torch.cat([units, halves]) * 2.0**-shift).float()
    wanted = [round(Fraction(value) * Fraction(2) ** shift) for value in values.tolist()]
    found = added([values] * number, shift).integers()
    assert found.tolist() == [number * each for each in wanted]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("numel", [0, 1, 2 * fold.LANES + 5, 9 * fold.LANES])
def test_the_way_back_and_the_digest_are_those_of_the_integers(
    dtype: torch.dtype, number: int, numel: int
) -> None:
    """Whether they were kept as they came, added up, or made for other ranks."""
    torch.manual_seed(0)
    parts = [torch.randn(numel, dtype=torch.float64).to(dtype) for _ in range(number)]
    gradient, lanes = added(parts, 30).finish()
    whole = added(parts, 30)
    integers = whole.integers().clone()
    again, lanes_again = whole.finish()
    assert torch.equal(gradient, again)
    assert torch.equal(lanes, lanes_again)
    assert torch.equal(gradient, (integers.double() * 2.0**-30).float())
    assert gradient.dtype == torch.float32
    at_once = torch.zeros(min(numel, fold.LANES), dtype=torch.int64)
    assert fold._add_rows_at_once(at_once, integers, 0) == math.ceil(numel / fold.LANES)
    in_rows = torch.zeros_like(at_once)
    fold.add_rows_(in_rows, integers, 0)
    assert torch.equal(at_once, in_rows)


@pytest.mark.parametrize("shift", [-130, -3, 0, 40, 127, 150])
def test_what_leaves_the_grid_is_rounded_to_float32(shift: int) -> None:
    total = (torch.randn(4096).double() * 2.0**50).to(torch.int64)
    exact = [Fraction(value) / Fraction(2) ** shift for value in total.tolist()]
    left = torch.empty(4096)
    grid_sum._from_grid(left, total, shift)
    limit = Fraction(2) ** -24
    assert all(
        abs(Fraction(one) - other) <= limit * abs(other) or abs(other) < Fraction(2) ** -126
        for one, other in zip(left.tolist(), exact, strict=True)
        if math.isfinite(one)
    )


def digest(integers: Tensor) -> str:
    folded = fold.Fold(integers.numel(), integers.device)
    for piece in integers.split(2 * fold.LANES):
        folded.add(piece)
    return fold.digest_of_lanes(folded.lanes(), "title")


@given(st.integers(0, 3 * fold.LANES + 8), st.integers(0, 62))
def test_no_change_of_a_bit_is_lost(at: int, bit: int) -> None:
    integers = torch.arange(3 * fold.LANES + 9)
    before = digest(integers)
    integers[at] ^= 1 << bit
    assert digest(integers) != before


def test_the_digest_tells_places_apart() -> None:
    """Rows, lanes and neighbours that change places, and opposite changes in one lane."""
    integers = torch.arange(3 * fold.LANES)
    found = {digest(integers)}
    for one, other in ((0, 1), (0, fold.LANES), (5, fold.LANES + 7), (0, fold.LANES_LEFT)):
        changed = integers.clone()
        changed[[one, other]] = integers[[other, one]]
        found.add(digest(changed))
        changed = integers.clone()
        changed[one] += 2
        changed[other] -= 2
        found.add(digest(changed))
    assert len(found) == 9


def test_magnitudes_are_exact_and_say_what_is_not_finite() -> None:
    assert largest_of(1.0, -3.5) == 3.5
    assert largest_of(1.0, math.nan) == math.inf
    assert largest_of(1.0, -math.inf) == math.inf
    assert largest_of() == 0.0
    found: Any = added([torch.tensor([1.0]), torch.tensor([-4.0]), torch.tensor([2.0])], 3)
    assert float(found.largest()) == 4.0
    assert float(grid_sum.zero_sum(torch.Size([2]), None, torch.device("cpu")).largest()) == 0.0


def test_nothing_is_kept_of_a_gradient_that_was_added() -> None:
    """Tensors that stay between the large ones make a step take more memory with every pack."""

    def tensors_after(adds: int) -> int:
        for _ in range(adds):
            total.add(torch.randn(300_000))
        return sum(type(each) is torch.Tensor for each in gc.get_objects())

    total = GridSum(shift=40)
    assert tensors_after(9) == tensors_after(3)
