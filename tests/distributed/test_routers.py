"""Router losses and biases on two ranks: those of one process with the whole batch."""

import pytest
import torch
from cases import worst
from gloo import on_ranks
from router_work import router_step


@pytest.mark.parametrize("sizes", [[5, 4], [9, 0]], ids=str)
@pytest.mark.parametrize(("family", "bound"), [("qwen3_moe", 1e-12), ("minimax_m2", 1e-7)])
def test_two_ranks(family: str, bound: float, sizes: list[int]) -> None:
    wanted_loss, wanted, wanted_biases = router_step(family, [9])
    for loss, found, biases in on_ranks(2, router_step, family, sizes):
        assert loss == pytest.approx(wanted_loss, rel=bound)
        assert worst(found, wanted) < bound
        assert all(torch.equal(biases[name], bias) for name, bias in wanted_biases.items())
        assert family == "qwen3_moe" or biases
