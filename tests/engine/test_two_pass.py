"""Batch-coupled terms: exact under any split, and refused where they cannot be."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import samestep
from samestep import Coupled, StepError, Term, TwoPass

N, D = 12, 5


def model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)


def data(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(
        dtype
    )


def spread(s: Tensor) -> Tensor:
    """A function of summed moments: not a sum over examples."""
    n, one, two = s[0], s[1:5], s[5:9]
    return ((two / n - (one / n).square()).sum()).log()


def contrast(s: Tensor) -> Tensor:
    """In-batch negatives: every row against all others. The order of rows does not matter."""
    return (s @ s.t()).fill_diagonal_(-torch.inf).logsumexp(1).mean()


def loss(net: nn.Module, micro_batch: dict[str, Tensor]) -> dict[str, Term | Coupled]:
    out = net(micro_batch["x"])
    count = out.new_tensor([len(out)])
    moments = torch.cat([count, out.sum(0), out.square().sum(0)])
    return {
        "square": Term(out.square().sum(), "row", 0.3),
        "spread": Coupled(moments, spread, weight=0.7),
        "contrast": Coupled(out, contrast, gather="rows", weight=-1.3),
        "metric": Coupled(out, lambda s: s.max(), gather="rows", weight=0),
    }


COUNTERS = {"row": lambda micro_batch: len(micro_batch["x"])}
SPLITS = [[12], [1] * 12, [5, 0, 4, 3], [2] * 6]


def truth(net: nn.Module, x: Tensor) -> tuple[float, list[Tensor]]:
    out = net(x)
    moments = torch.cat([out.new_tensor([len(out)]), out.sum(0), out.square().sum(0)])
    objective = 0.3 * out.square().sum() / N + 0.7 * spread(moments) - 1.3 * contrast(out)
    return float(objective.detach()), list(torch.autograd.grad(objective, list(net.parameters())))


def cut(x: Tensor, sizes: list[int]) -> list[dict[str, Tensor]]:
    return [{"x": part} for part in x.split(sizes)]


def worst(net: nn.Module, expected: list[Tensor]) -> float:
    pairs = zip(net.parameters(), expected, strict=True)
    return max(float((w.grad.double() - g.double()).norm() / g.double().norm()) for w, g in pairs)


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_value_and_gradient_are_those_of_the_whole_batch(
    sizes: list[int], dtype: torch.dtype, bound: float
) -> None:
    net = model(dtype)
    value, expected = truth(model(), data())
    actual, terms = samestep.backward(
        net, cut(data(dtype), sizes), TwoPass(loss), counters=COUNTERS
    )
    assert actual == pytest.approx(value, rel=bound)
    assert worst(net, expected) < bound
    assert terms["metric"] == pytest.approx(model()(data()).max().item(), rel=bound)


def test_the_order_of_examples_changes_nothing() -> None:
    net = model()
    _, expected = truth(net, data())
    micro_batches = cut(data()[torch.randperm(N)], [7, 5])
    samestep.backward(net, micro_batches, TwoPass(loss), counters=COUNTERS)
    assert worst(net, expected) < 1e-12


@pytest.mark.parametrize("kind", ["per micro-batch", "without the rest's slope"])
def test_the_test_catches_wrong_ways(kind: str) -> None:
    net = model()
    _, expected = truth(net, data())

    def per_micro_batch(net: nn.Module, micro_batch: dict[str, Tensor]) -> dict[str, Term]:
        terms = loss(net, micro_batch)
        share = len(micro_batch["x"]) / N
        return {
            name: Term(share * term.value(term.part), samestep.constant(1), term.weight)
            if isinstance(term, Coupled)
            else term
            for name, term in terms.items()
        }

    def detached_rest(net: nn.Module, micro_batch: dict[str, Tensor]) -> Any:
        """Gathers the others' rows, but gives gradient only to its own as one side."""
        out, others = net(micro_batch["x"]), net(data()).detach()
        scores = out @ others.t()
        scores = scores.masked_fill(torch.isclose(scores, out.square().sum(1)[:, None]), -torch.inf)
        return {
            **per_micro_batch(net, micro_batch),
            "contrast": Term(scores.logsumexp(1).sum(), "row"),
        }

    wrong = per_micro_batch if kind == "per micro-batch" else detached_rest
    wrong_cut = cut(data(), [5, 4, 3])
    samestep.backward(net, wrong_cut, wrong, counters=COUNTERS, check_sums=False)
    assert worst(net, expected) > 1e-3


def test_evaluation_takes_one_pass_and_needs_no_declaration() -> None:
    net, calls = model(), []

    def counted(net: nn.Module, micro_batch: dict[str, Tensor]) -> Any:
        calls.append(len(micro_batch["x"]))
        return loss(net, micro_batch)

    value, _ = truth(net, data())
    for sizes in ([12], [5, 4, 3]):
        report = samestep.evaluate(
            net, iter(cut(data(), sizes)), counted, counters=COUNTERS, check_sums=False
        )
        assert report.loss == pytest.approx(value, rel=1e-12)
    assert calls == [12, 5, 4, 3]


def test_a_loss_of_coupled_terms_alone_trains_and_evaluates() -> None:
    net = model()

    def alone(net: nn.Module, micro_batch: dict[str, Tensor]) -> Coupled:
        return Coupled(net(micro_batch["x"]), contrast, gather="rows")

    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    reports = [samestep.step(net, optimizer, cut(data(), [5, 7]), TwoPass(alone)) for _ in range(3)]
    assert reports[-1].loss < reports[0].loss
    assert samestep.evaluate(net, cut(data(), [3] * 4), alone).loss < reports[-1].loss


def test_an_undeclared_loss_is_refused() -> None:
    with pytest.raises(StepError, match=r"'spread' couples .*samestep\.TwoPass"):
        samestep.backward(model(), cut(data(), [6, 6]), loss, counters=COUNTERS)


def test_randomness_between_the_passes_is_refused() -> None:
    net = nn.Sequential(model(), nn.Dropout(0.5))
    with pytest.raises(StepError, match="'spread': the second pass gave another statistic"):
        samestep.backward(net, cut(data(), [6, 6]), TwoPass(loss), counters=COUNTERS)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda out: Coupled(out, lambda s: s, gather="rows"), "must be one number"),
        (lambda out: Coupled(out.sum(), lambda s: (s - s) / 0), "is nan over the whole batch"),
        (lambda out: {"a" if len(out) == 6 else "b": Coupled(out.sum(), torch.sin)}, "the same"),
        (lambda out: {}, "returned an empty mapping"),
    ],
)
def test_what_has_no_value_is_refused(wrong: Callable[[Tensor], Any], message: str) -> None:
    net = model()
    with pytest.raises(StepError, match=message):
        samestep.backward(net, cut(data(), [6, 5, 1]), TwoPass(lambda m, b: wrong(m(b["x"]))))
    assert all(weight.grad is None for weight in net.parameters())


@pytest.mark.parametrize(
    "arguments",
    [
        {"part": 3.0},
        {"part": torch.tensor([1])},
        {"part": torch.zeros(()), "gather": "rows"},
        {"part": torch.zeros(2), "gather": "mean"},
        {"part": torch.zeros(2), "weight": float("nan")},
    ],
    ids=str,
)
def test_wrong_kinds_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(samestep.ConfigError):
        Coupled(**{"value": torch.sum, **arguments})
