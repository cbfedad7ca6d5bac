"""Whole steps, evaluations and coupled terms over real ranks."""

from typing import Any

import pytest
import rank_work
import torch
from cases import build, cut, ragged, worst
from gloo import on_ranks

import samestep
from samestep.engine import collectives


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
@pytest.mark.parametrize("number", [2, 4])
def test_weights_and_reports_after_three_steps(number: int, mode: str) -> None:
    (reports, wanted), *_ = rank_alone(rank_work.three_steps, "plain", torch.float64)
    for found_reports, found in on_ranks(number, rank_work.three_steps, mode, torch.float64):
        for one, other in zip(found_reports, reports, strict=True):
            assert one[:2] == pytest.approx(other[:2], rel=1e-12)
            assert one[2:] == other[2:]
        assert worst(found, wanted) < 1e-11  # Adam divides by the root of what is nearly 0


def rank_alone(work: Any, *arguments: Any) -> list[Any]:
    assert collectives.world_size() == 1
    return [work(*arguments)]


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
@pytest.mark.parametrize("deal", ["even", "uneven", "bare"])
def test_an_evaluation_is_that_of_everything(mode: str, deal: str) -> None:
    model = build("llama")
    micros = cut(model, ragged(22, weighted=True), [22], "none")
    wanted = samestep.evaluate(model, micros, samestep.CausalLMLoss())
    for loss, terms, counts, tokens in on_ranks(2, rank_work.evaluation, mode, deal):
        assert loss == pytest.approx(wanted.loss, rel=1e-12)
        assert terms["accuracy"] == pytest.approx(wanted.terms["accuracy"], rel=1e-12)
        assert counts == pytest.approx(wanted.counts, rel=1e-12)
        assert tokens >= wanted.tokens


@pytest.mark.parametrize(
    ("mode", "sizes"),
    [
        ("plain", [[5, 3], [4]]),
        ("ddp", [[], [2, 2, 8]]),
        ("ddp", [[1, 2], [], [4], [5]]),
        ("fsdp2", [[2], [3, 1, 6]]),
        ("fsdp2", [[2, 2], [1], [3, 3], [1]]),
    ],
    ids=str,
)
def test_coupled_terms_couple_all_ranks(mode: str, sizes: list[list[int]]) -> None:
    (wanted_loss, _, wanted), *_ = rank_alone(rank_work.coupled_gradient, "plain", [[12]])
    for loss, evaluated, found in on_ranks(len(sizes), rank_work.coupled_gradient, mode, sizes):
        assert loss == pytest.approx(wanted_loss, rel=1e-12)
        assert evaluated == pytest.approx(wanted_loss, rel=1e-12)
        assert worst(found, wanted) < 1e-12
