import pytest
import torch
from torch import nn

from samestep.train.checked import checked
from samestep.train.objectives.causal_lm import CausalLMConfig
from samestep.train.optim import build_optimizer, learning_rate, set_learning_rate


def config(**changes: object) -> CausalLMConfig:
    return checked(
        CausalLMConfig.model_validate({"model": "m", "data": "d", "out": "o", **changes})
    )


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 3, 0.25])
def test_the_rate_rises_to_its_peak_then_never_rises(schedule: str, warmup: float) -> None:
    settings = config(schedule=schedule, warmup=warmup, lr=0.5)
    rates = [learning_rate(step, total=12, config=settings) for step in range(12)]
    first = {0: 0, 3: 3, 0.25: 3}[warmup]
    assert rates[first] == 0.5
    assert rates[:first] == sorted(rates[:first])
    assert rates[first:] == sorted(rates[first:], reverse=True)
    assert min(rates) > 0


def test_linear_and_cosine_end_at_zero() -> None:
    for schedule in ("linear", "cosine"):
        settings = config(schedule=schedule, lr=1.0)
        assert learning_rate(10, total=10, config=settings) == pytest.approx(0.0)
        assert learning_rate(5, total=10, config=settings) == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor"])
def test_optimizers_update_what_trains_and_decay_matrices_only(name: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].weight.requires_grad_(False)
    optimizer = build_optimizer(model, config(optimizer=name, weight_decay=0.1, lr=0.1))
    decays = {
        id(weight): group["weight_decay"]
        for group in optimizer.param_groups
        for weight in group["params"]
    }
    assert id(model[0].weight) not in decays
    assert decays[id(model[1].weight)] == 0.1
    assert decays[id(model[1].bias)] == 0.0
    before = model[1].weight.detach().clone()
    set_learning_rate(optimizer, 0.01)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(before, model[1].weight)
    assert {group["lr"] for group in optimizer.param_groups} == {0.01}
