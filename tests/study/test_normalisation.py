"""The wrong normalisations are the bugs that they are named after, and nothing else is wrong."""

import pytest
import torch
from cases import build, cut, gradients, plain_objective, ragged, worst
from torch import Tensor

import samestep
from samestep.data.examples import Example
from samestep.study.normalisation import COUNTERS, apply_normalisation
from samestep.study.spec import Normalisation

EXAMPLES = [example for example in ragged(8) if (example.labels[1:] != -100).any()]


def arm_gradient(normalisation: Normalisation, micro: int) -> tuple[dict[str, Tensor], float]:
    model = build("llama")
    loss = apply_normalisation(samestep.CausalLMLoss(), normalisation)
    micros = cut(model, EXAMPLES, [micro], "none")
    _, terms = samestep.backward(model, micros, loss, counters=COUNTERS)
    return gradients(model), terms["nll"]


def plain_gradient(parts: list[list[Example]], *, whole: bool) -> dict[str, Tensor]:
    model = build("llama")
    objectives = [plain_objective(model, part) for part in parts]
    weights = [
        sum(int((example.labels[1:] != -100).sum()) for example in part)
        if whole
        else 1 / len(parts)
        for part in parts
    ]
    sum(weight * one for weight, one in zip(weights, objectives, strict=True)).backward()
    return gradients(model)


def test_mean_of_means_averages_the_means_of_the_micro_batches() -> None:
    found, _ = arm_gradient("mean-of-means", 2)
    parts = [EXAMPLES[at : at + 2] for at in range(0, len(EXAMPLES), 2)]
    assert worst(found, plain_gradient(parts, whole=False)) < 1e-12
    assert worst(found, arm_gradient("exact", 2)[0]) > 0.05


def test_sum_never_divides() -> None:
    found, _ = arm_gradient("sum", 2)
    assert worst(found, plain_gradient([EXAMPLES], whole=True)) < 1e-12


def test_exact_is_the_mean_over_all_targets() -> None:
    found, _ = arm_gradient("exact", 1)
    assert worst(found, plain_gradient([EXAMPLES], whole=False)) < 1e-12


@pytest.mark.parametrize("normalisation", ["mean-of-means", "sum"])
def test_every_arm_reports_the_exact_token_loss(normalisation: Normalisation) -> None:
    with torch.no_grad():
        exact = float(plain_objective(build("llama"), EXAMPLES))
    assert arm_gradient(normalisation, 1)[1] == pytest.approx(exact, rel=1e-12)


def test_a_micro_batch_without_targets_does_not_end_in_nan() -> None:
    model = build("llama")
    empty = Example(torch.tensor([5, 6]), torch.tensor([-100, -100]))
    micros = cut(model, [*EXAMPLES[:1], empty], [1], "none")
    loss = apply_normalisation(samestep.CausalLMLoss(), "mean-of-means")
    samestep.backward(model, micros, loss, counters=COUNTERS)
    assert all(one.isfinite().all() for one in gradients(model).values())
