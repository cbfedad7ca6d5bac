"""Sums without order of numbers, and the grid for those of gradients."""

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


@pytest.mark.parametrize("packs", [1, 3, 64, 1000, 2**20])
def test_a_grid_that_fits_cannot_overflow(packs: int) -> None:
    largest = 2.0 ** (7 + exact_sum.GROWTH_BITS) * (1 - 2**-24)
    assert exact_sum.fits(7, largest)
    assert not exact_sum.fits(7, largest * 2)
    in_units = math.ceil(largest * 2.0 ** (exact_sum.grid_bits(packs) - 7))
    assert in_units <= 2**exact_sum.ROUNDING_BITS
    assert packs * in_units < 2**63
    least = 2.0 ** (7 - exact_sum.SHRINK_BITS - 1)
    assert exact_sum.fits(7, least)
    assert not exact_sum.fits(7, least * 0.99)
    assert exact_sum.grid_bits(2**10) - exact_sum.SHRINK_BITS >= 24  # float32's own bits
    assert exact_sum.fits(None, 0.0)
    assert not exact_sum.fits(None, 1e-30)
