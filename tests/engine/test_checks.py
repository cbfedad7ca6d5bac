"""Calls of the step that would train nothing or something else: refused, beside a sound twin."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import samestep
from samestep.engine.terms import Term
from samestep.errors import ConfigError, DataError, SamestepError, StepError

ROWS = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 4.0], [2.0, 2.0]])


def total(model: nn.Module, micro_batch: dict[str, Tensor]) -> Term:
    return Term(model(micro_batch["x"]).square().sum(), "example")


def micro_batches(size: int = 2) -> list[dict[str, Tensor]]:
    return [{"x": x, "labels": torch.zeros(len(x)).long()} for x in ROWS.split(size)]


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(2, 1)


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1)


WAYS: dict[str, Callable[..., Any]] = {
    "step": lambda model, batch, loss_fn: samestep.step(model, sgd(model), batch, loss_fn),
    "backward": samestep.backward,
    "evaluate": samestep.evaluate,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (micro_batches()[0], ConfigError, r"one mapping \(of 'x', 'labels'\).*\[micro_batch\]"),
        (ROWS, ConfigError, r"one tensor \(4, 2\)"),
        ("rows.jsonl", ConfigError, "'rows.jsonl' \\(str\\): pass a list"),
        (None, ConfigError, "NoneType"),
        (7, ConfigError, "int"),
        ([], DataError, "no micro-batch"),
        (iter(()), DataError, "no micro-batch"),
        ([{"x": ROWS}, micro_batches()[0]], StepError, "micro-batch 1 has 'labels', unlike"),
        ([{"x": ROWS, "labels": [0, 0, 0, 0]}], StepError, "'labels' of micro-batch 0 are list"),
        ([{"x": ROWS, "labels": None}], StepError, "are NoneType"),
    ],
)
def test_what_is_no_batch_is_refused(
    way: str, wrong: Any, error: type[SamestepError], message: str
) -> None:
    model = linear()
    before = model.weight.detach().clone()
    if way == "evaluate" and isinstance(wrong, list) and len(wrong) == 2:
        pytest.skip("an evaluation holds one micro-batch at a time: it counts each as it comes")
    with pytest.raises(error, match=message):
        WAYS[way](model, wrong, total)
    assert torch.equal(model.weight.detach(), before)
    assert model.weight.grad is None


def test_a_used_up_generator_is_named() -> None:
    model, once = linear(), (micro_batch for micro_batch in micro_batches())
    samestep.step(model, sgd(model), once, total)
    with pytest.raises(DataError, match="a generator that gave nothing: it is used up"):
        samestep.step(model, sgd(model), once, total)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lost", ["key", "attribute"])
def test_no_labels_and_no_counters_say_what_to_pass(way: str, lost: str) -> None:
    def reads(model: nn.Module, micro_batch: Any) -> Term:
        labels = micro_batch["labels"] if lost == "key" else micro_batch.get("labels")
        return Term(model(micro_batch["x"])[labels.ne(-100)].sum())

    with pytest.raises(StepError, match=r"nothing was counted.*a mapping of 'x'.*counters="):
        WAYS[way](linear(), [{"x": ROWS}], reads)


def test_a_fault_of_the_loss_itself_is_shown_as_it_is() -> None:
    with pytest.raises(KeyError, match="speling"):
        samestep.backward(linear(), micro_batches(), lambda m, micro: Term(micro["speling"]))


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda m, b: Term(total(m, b).total.detach(), "example"), "'loss' has no graph"),
        (
            lambda m, b: {"nll": total(m, b), "kl": Term(b["x"].exp().sum(), "example", 0.1)},
            "term 'kl' has no graph",
        ),
        (
            lambda m, b: {"nll": Term(b["x"].clone().requires_grad_().exp().sum(), "example")},
            "term 'nll' depends on none of the 2 weights",
        ),
        (lambda m, b: Term(total(m, b).total, "example", weight=0.0), "every term.*weight 0"),
        (lambda m, b: None, "returned NoneType.*lack a return"),
        (lambda m, b: total(m, b).total.item(), "returned float"),
        (lambda m, b: {}, "returned an empty mapping"),
    ],
)
def test_a_loss_that_nothing_learns_from_is_refused(loss_fn: Any, message: str) -> None:
    model = linear()
    before = model.weight.detach().clone()
    with pytest.raises(StepError, match=message):
        samestep.step(model, sgd(model), micro_batches(), loss_fn)
    assert torch.equal(model.weight.detach(), before)
    assert model.weight.grad is None


def test_frozen_weights_are_refused_and_partly_frozen_ones_are_not() -> None:
    model = nn.Sequential(linear(), nn.Identity())
    optimizer = sgd(model)
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="no weight of Sequential trains: all 2 are frozen"):
        samestep.backward(model, micro_batches(), total)
    with pytest.raises(ConfigError, match="none of the 2 weights that the optimizer holds"):
        samestep.step(model, optimizer, micro_batches(), total)
    model[0].bias.requires_grad_(True)
    assert samestep.step(model, optimizer, micro_batches(), total).grad_norm > 0


def test_a_detached_metric_and_a_term_without_graph_where_it_is_zero_are_sound() -> None:
    def sound(model: nn.Module, micro_batch: dict[str, Tensor]) -> dict[str, Term]:
        first = bool((micro_batch["x"][0] == ROWS[0]).all())
        extra = model.bias.sum() if first else torch.zeros(())
        return {
            "squares": total(model, micro_batch),
            "rows": Term(torch.tensor(float(len(micro_batch["x"]))), "example", weight=0.0),
            "only in one": Term(extra, "example"),
            "nowhere": Term(torch.zeros(()), "example"),
        }

    _, terms = samestep.backward(linear(), micro_batches(), sound)
    assert terms["rows"] == 1
    assert terms["nowhere"] == 0
