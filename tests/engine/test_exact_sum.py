"""Sums without order: of numbers, and of gradients on a grid of integers."""

import math
import random
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import samestep
from samestep.engine import exact_sum
from samestep.engine.counts import add_counts, count_parts, join_counts

NUMBERS = st.lists(st.floats(-1e30, 1e30), max_size=20)


@given(NUMBERS, st.randoms(use_true_random=False), st.integers(1, 4))
def test_a_sum_of_numbers_is_rounded_once_whatever_the_parts(
    numbers: list[float], draw: random.Random, ranks: int
) -> None:
    wanted = float(sum(map(Fraction, numbers)))
    draw.shuffle(numbers)
    parts = [exact_sum.exact_parts(numbers[rank::ranks]) for rank in range(ranks)]
    assert exact_sum.rounded_sum(part for each in parts for part in each) == wanted


def test_what_is_not_finite_stays_so() -> None:
    assert exact_sum.rounded_sum(exact_sum.exact_parts([1.0, math.inf])) == math.inf
    assert math.isnan(exact_sum.rounded_sum(exact_sum.exact_parts([math.inf, -math.inf])))


@given(st.permutations(range(7)), st.integers(1, 4))
def test_counts_and_losses_have_the_same_bits_in_any_order(order: list[int], ranks: int) -> None:
    """Weights of 0.1 add up otherwise in another order, if they are added as floats."""
    batches = [{"labels": torch.ones(2), "example_weights": torch.rand(2) / 3} for _ in range(7)]
    dealt = [[batches[at] for at in order[rank::ranks]] for rank in range(ranks)]
    counts = add_counts([join_counts([count_parts([b]) for b in own]) for own in dealt])
    assert counts == add_counts([count_parts(batches)])

    def loss_fn(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> samestep.Term:
        return samestep.Term((batch["example_weights"].double()).sum(), unit="example")

    reports = [
        samestep.evaluate(torch.nn.Identity(), [batches[at] for at in each], loss_fn)
        for each in (order, range(7))
    ]
    assert reports[0].loss == reports[1].loss


@given(
    st.lists(st.floats(-1, 1, width=32), min_size=6, max_size=6),
    st.integers(-140, 100),
    st.permutations(range(6)),
)
def test_gradients_on_a_grid_add_up_in_any_order(
    values: list[float], power: int, order: list[int]
) -> None:
    parts = [(torch.tensor([value, 0.3 * value]).double() * 2.0**power).float() for value in values]
    largest = max(float(exact_sum.largest_magnitude(part)) for part in parts)
    exponent = exact_sum.exponent_of(largest)
    if exponent is None:
        return
    shift = exact_sum.grid_bits(len(parts)) - exponent
    totals = [torch.zeros(2, dtype=torch.int64) for _ in range(2)]
    for at in range(6):
        exact_sum.add_rounded_(totals[0], parts[at], shift)
        exact_sum.add_rounded_(totals[1], parts[order[at]], shift)
    assert torch.equal(*totals)
    for element, total in enumerate(totals[0].tolist()):
        exact = sum(Fraction(float(part[element])) for part in parts)
        assert abs(total - exact * Fraction(2) ** shift) <= len(parts) / 2  # half a unit a part


@pytest.mark.parametrize("shift", [-130, -126, -3, 0, 40, 127, 150])
def test_both_ways_of_rounding_are_the_same(shift: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 where it multiplies exactly, else float64: the integers are those of fractions."""
    values = (torch.randn(4096).double() * 2.0 ** min(30 - shift, 100)).float()
    found = torch.zeros(4096, dtype=torch.int64)
    exact_sum.add_rounded_(found, values, shift)
    wanted = [round(Fraction(value) * Fraction(2) ** shift) for value in values.tolist()]
    assert found.tolist() == wanted
    monkeypatch.setattr(exact_sum, "_FLOAT32_SHIFTS", range(0))
    again = torch.zeros_like(found)
    exact_sum.add_rounded_(again, values, shift)
    assert torch.equal(found, again)


@pytest.mark.parametrize("shift", [-130, -3, 0, 40, 127, 150])
def test_what_leaves_the_grid_is_rounded_to_float32(shift: int) -> None:
    total = (torch.randn(4096).double() * 2.0**50).to(torch.int64)
    exact = [Fraction(value) / Fraction(2) ** shift for value in total.tolist()]
    found = exact_sum.from_grid(total, shift).tolist()
    limit = Fraction(2) ** -24
    assert all(
        abs(Fraction(one) - other) <= limit * abs(other) or abs(other) < Fraction(2) ** -126
        for one, other in zip(found, exact, strict=True)
        if math.isfinite(one)
    )


@pytest.mark.parametrize("packs", [1, 3, 64, 1000, 2**20])
def test_a_grid_that_fits_cannot_overflow(packs: int) -> None:
    largest = 2.0 ** (7 + exact_sum.GROWTH_BITS) * (1 - 2**-24)
    assert exact_sum.fits(7, largest)
    assert not exact_sum.fits(7, largest * 2)
    in_units = math.ceil(largest * 2.0 ** (exact_sum.grid_bits(packs) - 7))
    assert packs * in_units < 2**63
    least = 2.0 ** (7 - exact_sum.SHRINK_BITS - 1)
    assert exact_sum.fits(7, least)
    assert not exact_sum.fits(7, least * 0.99)
    assert exact_sum.grid_bits(2**10) - exact_sum.SHRINK_BITS >= 24  # float32's own bits
    assert exact_sum.fits(None, 0.0)
    assert not exact_sum.fits(None, 1e-30)


def test_magnitudes_are_exact_and_say_what_is_not_finite() -> None:
    assert float(exact_sum.largest_magnitude(torch.tensor([1.0, -3.5]))) == 3.5
    assert float(exact_sum.largest_magnitude(torch.tensor([1.0, math.nan]))) == math.inf
    assert float(exact_sum.largest_magnitude(torch.zeros(0))) == 0.0
