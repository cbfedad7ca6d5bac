"""Two ranks of a loop of accelerate are one, with rows that a rank repeats left out."""

import pytest
from gloo import on_ranks
from window_rank_work import window_gradients


@pytest.mark.parametrize("rows", [8, 7, 5])
def test_two_ranks_are_one(rows: int) -> None:
    """With 7 rows the last rank repeats one, with 5 its last micro-batch holds repeats alone."""
    whole = window_gradients(rows, 2, 4)
    for found in on_ranks(2, window_gradients, rows, 2, 2):
        assert found == [pytest.approx(one, rel=1e-12) for one in whole]


def test_two_ranks_are_not_one_without_it() -> None:
    whole = window_gradients(7, 2, 4)
    for found in on_ranks(2, window_gradients, 7, 2, 2, apply=False):
        assert found != [pytest.approx(one, rel=1e-3) for one in whole]
