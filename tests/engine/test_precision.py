"""Sums keep float32 where the products around them are of low precision."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import build, cut, ragged
from torch import Tensor, nn

import samestep
from samestep.engine.terms import Term
from samestep.losses.cross_entropy import logits_cross_entropy

TARGETS = 40
WEIGHTS = torch.rand(TARGETS, generator=torch.Generator().manual_seed(1)) + 0.5


def linear(weights: Tensor) -> Any:
    draw = torch.Generator().manual_seed(0)
    states, head = torch.randn(TARGETS, 8, generator=draw), torch.randn(50, 8, generator=draw)
    targets = torch.arange(TARGETS)
    return samestep.linear_cross_entropy(states, head, targets, target_weights=weights)


def logits(weights: Tensor) -> Any:
    rows = torch.randn(TARGETS, 50, generator=torch.Generator().manual_seed(0))
    return logits_cross_entropy(rows, torch.arange(TARGETS), target_weights=weights)


@pytest.mark.parametrize("cross_entropy", [linear, logits])
def test_weighted_sums_are_float32_under_autocast(cross_entropy: Callable[[Tensor], Any]) -> None:
    """The parts come from the same products, bit for bit: only their sum is in question."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole = cross_entropy(WEIGHTS)
        parts = [cross_entropy(row).loss for row in torch.eye(TARGETS)]
        rounded = torch.stack(parts) @ WEIGHTS
    exact = sum(float(part) * float(weight) for part, weight in zip(parts, WEIGHTS, strict=True))
    assert whole.loss.dtype == torch.float32
    assert float(whole.loss) == pytest.approx(exact, rel=1e-6)
    assert float(rounded) != pytest.approx(exact, rel=1e-6), "autocast rounds products no more"


@pytest.mark.parametrize("normalize", ["token", "sequence"])
def test_a_language_model_inside_autocast(normalize: str) -> None:
    model, loss_fn = build("llama", torch.float32), samestep.CausalLMLoss(normalize=normalize)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = [loss_fn(model, micro) for micro in cut(model, ragged(8), [8], "right")]
    total = terms[0]["nll"].total
    assert total.dtype == torch.float32
    assert total != total.bfloat16().float()


class Scores(nn.Module):
    """One weight; a target's loss is its factor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_totals_by_sequence_are_added_up_in_float32(dtype: torch.dtype) -> None:
    """300 sequences of loss 1: bfloat16 cannot hold 257, float16 not 2049."""
    count = 300 if dtype == torch.bfloat16 else 3001
    micro_batch = {"labels": torch.zeros(count, 2).long()}
    loss, _ = samestep.backward(
        Scores(), [micro_batch], lambda m, b: Term(m.weight.to(dtype).expand(count))
    )
    assert loss == 1


def test_a_total_of_low_precision_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    micro_batch = {"labels": torch.zeros(4, 3).long()}

    def rounded(model: Scores, micro_batch: dict[str, Tensor]) -> dict[str, Term]:
        return {
            "rounded sum": Term(model.weight.bfloat16() * 8 * len(micro_batch["labels"])),
            "wide sum": Term(model.weight * 8 * len(micro_batch["labels"])),
        }

    with caplog.at_level(logging.WARNING, "samestep"):
        for _ in range(2):
            samestep.backward(Scores(), [micro_batch] * 2, rounded)
    (line,) = [record.getMessage() for record in caplog.records if "rounded" in record.message]
    assert "term 'rounded sum' is a sum in bfloat16" in line
    assert "losses.float().sum()" in line
    assert "wide sum" not in caplog.text
