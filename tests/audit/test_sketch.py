"""Random sums of a large gradient: linear, and a difference anywhere shows."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from samestep.audit import gradients
from samestep.audit.check import check
from samestep.audit.gradients import sketch, sketch_fold, unsketch


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_small_gradient_is_kept_as_it_is() -> None:
    weight = noise(3, 4)
    kept = sketch(weight, 1)
    assert torch.equal(kept, weight)
    assert kept.data_ptr() != weight.data_ptr()
    assert torch.equal(unsketch(kept, weight, fold=1), weight)


def test_the_fold_is_that_of_the_trainable_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(10, 10)
    assert sketch_fold(model) == 1
    monkeypatch.setattr(gradients, "MAX_ELEMENTS", 25)
    assert sketch_fold(model) == 5
    model.weight.requires_grad_(False)
    assert sketch_fold(model) == 1


@pytest.mark.parametrize("elements", [1, 6, 7, 64, 1001])
@pytest.mark.parametrize("fold", [2, 7, 100])
def test_sums_are_linear_and_spreading_is_their_adjoint(elements: int, fold: int) -> None:
    one, other = noise(elements), noise(elements, seed=1)
    both = sketch(2 * one - 3 * other, fold)
    assert torch.allclose(both, 2 * sketch(one, fold) - 3 * sketch(other, fold), atol=1e-12)
    direction = noise(len(both), seed=2)
    product = (unsketch(direction, one, fold=fold) * one).sum()
    assert torch.isclose(product, direction @ sketch(one, fold), atol=1e-12)


def test_lengths_and_single_elements_survive() -> None:
    vector = noise(400, 500)
    kept = sketch(vector, 20)
    assert kept.shape == (10_000,)
    assert float(kept.norm() / vector.norm()) == pytest.approx(1, abs=0.03)
    moved = vector.clone()
    moved[17, 23] += 1.0
    assert float((sketch(moved, 20) - kept).norm()) == pytest.approx(1.0)


V = 23


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, 16)
        self.head = nn.Linear(16, V)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids).cumsum(1)))


def collate(rows: list[Tensor]) -> dict[str, Tensor]:
    pad = nn.utils.rnn.pad_sequence
    labels = pad(rows, batch_first=True, padding_value=-100)
    return {"input_ids": pad(rows, batch_first=True), "labels": labels}


def audited(*, by_all: bool) -> Any:
    def step(model: nn.Module, micros: list[Any]) -> float:
        counts = [(micro["labels"][:, 1:] != -100).sum() for micro in micros]
        total = 0.0
        for micro, count in zip(micros, counts, strict=True):
            logits = model(micro["input_ids"])[:, :-1].flatten(0, 1)
            loss = nn.functional.cross_entropy(
                logits, micro["labels"][:, 1:].flatten(), reduction="sum"
            )
            loss = loss / (sum(counts) if by_all else count * len(micros))
            loss.backward()
            total += float(loss)
        return total

    draw = torch.Generator().manual_seed(3)
    rows = [torch.randint(0, V, (n,), generator=draw) for n in (5, 14, 3, 9, 11, 4, 16)]
    return check({"model": Tiny, "examples": rows, "collate": collate, "step": step})


def test_an_audit_of_sums_comes_to_the_same_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "MAX_ELEMENTS", 100)
    sound, wrong = audited(by_all=True), audited(by_all=False)
    assert sound.verdict == "exact", sound
    verdicts = {axis.name: (axis.verdict, axis.cause) for axis in wrong.axes}
    assert verdicts["micro-batch"] == ("inexact", "mean-of-means")
    assert verdicts["order"][0] == verdicts["padding"][0] == "exact"
