"""Objectives over two ranks: the same value, terms and gradient as in one process."""

import pytest
import torch
from cases import worst
from gloo import on_ranks
from rank_objectives import KINDS, biases_after_a_step, gradient_of


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_are_one(kind: str) -> None:
    loss, terms, wanted = gradient_of(kind)
    bound = 1e-6 if kind in ("window", "sequence") else 1e-12  # float32 routers
    for found_loss, found_terms, found in on_ranks(2, gradient_of, kind):
        assert found_loss == pytest.approx(loss, rel=bound)
        assert found_terms == pytest.approx(terms, rel=1e-6)
        assert worst(found, wanted) < bound


def test_biases_follow_the_loads_of_all_ranks() -> None:
    wanted = biases_after_a_step()
    assert any(bool(one.any()) for one in wanted)
    for found in on_ranks(2, biases_after_a_step):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
