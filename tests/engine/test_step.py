"""The step by itself, on a model small enough to write its gradient down."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import samestep
from samestep.engine.terms import Term
from samestep.errors import ConfigError, NotFiniteError, StepError

I = -100  # noqa: E741


class Scores(nn.Module):
    """One weight a class; the loss of a target is minus its weight."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(10, dtype=dtype))


def loss_fn(model: Scores, micro_batch: dict[str, Tensor]) -> Term:
    targets = micro_batch["labels"][:, 1:]
    return Term(-model.weight[targets[targets != I]].sum())


def batch(*rows: list[int]) -> dict[str, Tensor]:
    width = max(map(len, rows))
    return {"labels": torch.tensor([row + [I] * (width - len(row)) for row in rows])}


MICRO_BATCHES = [batch([0, 1, 2]), batch([0, 3]), batch([0, 1, 4], [0, 1])]


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=1.0)


def test_the_report_and_the_update() -> None:
    model = Scores()
    report = samestep.step(model, sgd(model), iter(MICRO_BATCHES), loss_fn, max_grad_norm=0.1)
    counts = torch.tensor([0, 3, 1, 1, 1, 0, 0, 0, 0, 0], dtype=torch.float64)
    gradient = -counts / 6
    assert report.loss == pytest.approx(-(3 * 1 + 2 + 3 + 4) / 6, rel=1e-15)
    assert report.terms == {"loss": report.loss}
    assert report.counts == {"token": 6.0, "sequence": 4.0, "example": 4.0}
    assert report.grad_norm == pytest.approx(float(gradient.norm()), rel=1e-15)
    assert (report.micro_batches, report.skipped, report.tokens) == (3, None, 0)
    assert report.seconds > 0
    clipped = gradient * 0.1 / (gradient.norm() + 1e-6)
    torch.testing.assert_close(model.weight.detach(), torch.arange(10.0).double() - clipped)
    assert model.weight.grad is None


def test_terms_of_different_units_and_metrics() -> None:
    model = Scores()

    def several(model: Scores, micro_batch: dict[str, Tensor]) -> dict[str, Term]:
        return {
            "nll": loss_fn(model, micro_batch),
            "ridge": Term(model.weight[9] * len(micro_batch["labels"]), "row", weight=0.5),
            "rows": Term(torch.tensor(float(len(micro_batch["labels"]))), "token", weight=0.0),
        }

    rows = {"row": lambda micro_batch: len(micro_batch["labels"])}
    loss, terms = samestep.backward(model, MICRO_BATCHES, several, counters=rows)
    assert terms == {"nll": pytest.approx(-2.0), "ridge": 9.0, "rows": pytest.approx(4 / 6)}
    assert loss == pytest.approx(-2.0 + 0.5 * 9)
    assert float(model.weight.grad[9]) == pytest.approx(0.5)


def test_gradients_left_from_before_do_not_count() -> None:
    model = Scores()
    model.weight.grad = torch.full_like(model.weight, 7.0)
    samestep.backward(model, MICRO_BATCHES, loss_fn)
    assert float(model.weight.grad.sum()) == pytest.approx(-1)


def test_a_batch_without_targets_is_skipped_and_said() -> None:
    model = Scores()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.5)
    before = model.weight.detach().clone()
    report = samestep.step(model, optimizer, [batch([1, I, I])] * 2, loss_fn)
    assert (report.skipped, report.loss, report.grad_norm) == ("no targets", 0.0, 0.0)
    assert torch.equal(model.weight.detach(), before)
    assert not optimizer.state


def test_a_micro_batch_without_targets_adds_nothing() -> None:
    one, other = Scores(), Scores()
    samestep.backward(one, MICRO_BATCHES, loss_fn)
    samestep.backward(other, [batch([1, I]), *MICRO_BATCHES, batch([1])], loss_fn)
    assert torch.equal(one.weight.grad, other.weight.grad)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda model, micro_batch: Term(model.weight.sum(), "pair"), "term 'loss'.*'pair'"),
        (lambda model, micro_batch: model.weight.sum(), "returned Tensor"),
        (
            lambda model, micro_batch: {"a": Term(model.weight.sum() * torch.nan)},
            "term 'a' is nan in micro-batch 0",
        ),
        (
            lambda model, micro_batch: Term(
                loss_fn(model, micro_batch).total, weight=float(len(micro_batch["labels"]))
            ),
            "term 'loss' was",
        ),
        (
            lambda model, micro_batch: Term((model.weight * 0).sqrt().sum()),
            "its gradient is not, in w",
        ),
    ],
)
def test_errors_name_the_term_and_leave_no_trace(bad: Any, message: str) -> None:
    model = Scores()
    before = model.weight.detach().clone()
    with pytest.raises(StepError, match=message):
        samestep.step(model, sgd(model), MICRO_BATCHES, bad)
    assert torch.equal(model.weight.detach(), before)
    assert model.weight.grad is None


def test_a_total_over_a_unit_of_which_there_is_none_is_refused() -> None:
    model = Scores()
    with pytest.raises(StepError, match="of which 0"):
        samestep.backward(
            model,
            MICRO_BATCHES,
            lambda model, micro_batch: {
                "a": loss_fn(model, micro_batch),
                "b": Term(model.weight[1], "pair"),
            },
            counters={"pair": lambda _: 0},
        )


def test_a_scaler_changes_nothing_but_its_own_scale() -> None:
    one, other = Scores(torch.float32), Scores(torch.float32)
    samestep.step(one, sgd(one), MICRO_BATCHES, loss_fn, max_grad_norm=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # enabled scalers exist for accelerators only before 2.x
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    report = samestep.step(
        other, sgd(other), MICRO_BATCHES, loss_fn, max_grad_norm=0.1, scaler=scaler
    )
    torch.testing.assert_close(one.weight, other.weight)
    assert report.skipped is None


def test_a_scaler_that_overflows_skips_the_step() -> None:
    model = Scores(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=3e38)
    before = model.weight.detach().clone()
    report = samestep.step(
        model,
        sgd(model),
        MICRO_BATCHES,
        lambda m, x: Term(loss_fn(m, x).total * 1e4),
        scaler=scaler,
    )
    assert report.skipped == "overflow"
    assert torch.equal(model.weight.detach(), before)
    assert scaler.get_scale() < 3e38


def test_a_scaler_over_low_precision_weights_is_refused() -> None:
    model = Scores(torch.float16)
    with pytest.raises(ConfigError, match="low precision"):
        samestep.step(model, sgd(model), MICRO_BATCHES, loss_fn, scaler=torch.amp.GradScaler("cpu"))


def test_an_optimizer_over_other_weights_is_refused() -> None:
    model = Scores()
    optimizer = torch.optim.SGD([model.weight, nn.Parameter(torch.ones(3))], lr=1.0)
    with pytest.raises(ConfigError, match=r"1 weights that are not the model's.*\(3,\)"):
        samestep.step(model, optimizer, MICRO_BATCHES, loss_fn)


def test_a_norm_that_overflows_over_finite_elements_is_named() -> None:
    model = Scores(torch.float32)

    def huge(model: Scores, micro_batch: dict[str, Tensor]) -> Term:
        return Term(loss_fn(model, micro_batch).total * 1e30)

    with pytest.raises(NotFiniteError, match=r"every element .* is finite, but .*in weight"):
        samestep.step(model, sgd(model), MICRO_BATCHES, huge)
    assert torch.equal(model.weight.detach(), torch.arange(10.0))
    assert model.weight.grad is None
