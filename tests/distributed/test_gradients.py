"""Gradients over real ranks: those of one process on the whole batch."""

from functools import cache
from typing import Any

import pytest
import rank_work
import torch
from cases import build, gradients, plain_objective, ragged, worst
from gloo import on_ranks

import samestep


@cache
def truth(name: str, normalize: Any = "token") -> tuple[float, dict[str, Any]]:
    model = build(name)
    objective = plain_objective(model, ragged(22, weighted=True), normalize=normalize)
    objective.backward()
    return float(objective.detach()), gradients(model)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("deal", ["even", "uneven", "bare", "idle", "idle-right"])
@pytest.mark.parametrize("mode", ["plain", "ddp", "fsdp2"])
@pytest.mark.parametrize("number", [2, 4])
def test_float64(number: int, mode: str, deal: str) -> None:
    """Ragged rows, unequal ranks, a rank without targets, a rank without rows."""
    if (mode, deal) == ("fsdp2", "idle"):
        with pytest.raises(AssertionError, match=r"rank \d has no micro-batch"):
            on_ranks(number, rank_work.gradient, "llama", mode, deal, torch.float64)
        return
    loss, wanted = truth("llama")
    for own, found in on_ranks(number, rank_work.gradient, "llama", mode, deal, torch.float64):
        assert own == pytest.approx(loss, rel=1e-12)
        assert worst(found, wanted) < 1e-12


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
@pytest.mark.parametrize("normalize", ["token", "sequence"])
def test_tied_weights_and_normalisations(name: str, mode: str, normalize: str) -> None:
    loss, wanted = truth(name, normalize)
    work = (rank_work.gradient, name, mode, "uneven", torch.float64, normalize)
    for own, found in on_ranks(2, *work):
        assert own == pytest.approx(loss, rel=1e-12)
        assert worst(found, wanted) < 1e-12


def test_whole_weights_of_shards_are_not_offloaded() -> None:
    """FSDP2 drops and gathers them by itself."""
    _, wanted = truth("llama")
    shapes = {tuple(weight.shape) for weight in build("llama").parameters() if weight.dim() == 2}
    for moved, found in on_ranks(2, rank_work.offloaded_gradient):
        assert worst(found, wanted) < 1e-12
        assert moved
        assert not {*moved} & (shapes | {shape[::-1] for shape in shapes})


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_float32(mode: str) -> None:
    """Against float64: 2e-6, or twice the error of plain float32."""
    _, wanted = truth("llama")
    plain = build("llama").float()
    plain_objective(plain, ragged(22, weighted=True)).backward()
    bound = max(2e-6, 2 * worst(gradients(plain), wanted))
    for _, found in on_ranks(4, rank_work.gradient, "llama", mode, "uneven", torch.float32):
        assert worst(found, wanted) < bound


@pytest.mark.parametrize("mode", ["ddp", "fsdp2-wide"])
def test_bfloat16_adds_up_in_float32_over_ranks(mode: str) -> None:
    low = build("llama").bfloat16()
    micros = rank_work.cut(low, ragged(22, weighted=True), [rank_work.MICRO], "none")
    samestep.backward(low, micros, samestep.CausalLMLoss())
    truth = build("llama").bfloat16().double()
    plain_objective(truth, ragged(22, weighted=True)).backward()
    alone = worst(gradients(low), gradients(truth))
    for _, found in on_ranks(4, rank_work.gradient, "llama", mode, "even", torch.bfloat16):
        assert worst(found, gradients(truth)) < 1.5 * alone


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_a_step_that_counts_on_its_own_rank_alone_is_caught(mode: str) -> None:
    """The deliberately wrong version: mean over the rank, then mean over the ranks."""
    _, wanted = truth("llama")
    for _, found in on_ranks(2, rank_work.rank_local_gradient, mode, "uneven"):
        assert worst(found, wanted) > 1e-2


def test_a_step_reduces_each_weight_once() -> None:
    for sent, weights in on_ranks(2, rank_work.reduced_numbers):
        assert sent == weights
