"""Evaluation by the algebra of the step; with real models see tests/invariance."""

import pytest
import torch
from torch import Tensor, nn

import samestep
from samestep.engine.terms import Term
from samestep.errors import DataError


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(10.0))
        self.dropout = nn.Dropout(0.5)


def loss_fn(model: Half, micro_batch: dict[str, Tensor]) -> dict[str, Term]:
    targets = micro_batch["labels"][:, 1:]
    chosen = targets[targets != -100]
    return {
        "nll": Term(model.dropout(model.weight)[chosen].sum()),
        "high": Term((chosen > 4).sum().double(), weight=0.0),
    }


ROWS = [torch.arange(2 + n) for n in (0, 7, 1, 3, 0, 5)]


def micro_batches(size: int) -> list[dict[str, Tensor]]:
    pad = nn.utils.rnn.pad_sequence
    return [
        {"labels": pad(ROWS[at : at + size], batch_first=True, padding_value=-100)}
        for at in range(0, len(ROWS), size)
    ]


@pytest.mark.parametrize("size", [1, 2, 4, 6])
def test_the_batch_size_changes_nothing(size: int) -> None:
    report = samestep.evaluate(Half(), iter(micro_batches(size)), loss_fn)
    targets = torch.cat([row[1:] for row in ROWS])
    assert report.loss == pytest.approx(float(targets.double().mean()), rel=1e-7)
    assert report.terms["high"] == pytest.approx(float((targets > 4).double().mean()), rel=1e-12)
    assert report.counts == {"token": 22.0, "sequence": 6.0, "example": 6.0}
    assert report.micro_batches == -(-6 // size)


def test_a_mean_of_batch_means_would_be_caught() -> None:
    means = [samestep.evaluate(Half(), [one], loss_fn).loss for one in micro_batches(2)]
    whole = samestep.evaluate(Half(), micro_batches(2), loss_fn).loss
    assert abs(sum(means) / len(means) - whole) > 0.1


def test_every_module_gets_its_own_mode_back_also_after_an_error() -> None:
    model = Half()
    model.dropout.eval()
    samestep.evaluate(model, micro_batches(2), loss_fn)
    assert model.training
    assert not model.dropout.training
    with pytest.raises(ZeroDivisionError):
        samestep.evaluate(model, micro_batches(2), lambda *_: 1 / 0)
    assert model.training
    assert not model.dropout.training


def test_nothing_to_evaluate_is_an_error() -> None:
    with pytest.raises(DataError, match="no micro-batch"):
        samestep.evaluate(Half(), [], loss_fn)


def test_no_gradient_is_made() -> None:
    model = Half()
    samestep.evaluate(model, micro_batches(3), loss_fn)
    assert model.weight.grad is None
