import os
from pathlib import Path

import pytest
import torch
from torch import nn

from samestep.errors import ConfigError
from samestep.train.optim import build_optimizer, learning_rate, load_schedule, set_learning_rate
from samestep.train.settings.base import finalize
from samestep.train.settings.language import CausalLMSettings


def config(**changes: object) -> CausalLMSettings:
    return finalize(
        CausalLMSettings.model_validate({"model": "m", "data": "d", "out": "o", **changes})
    )


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 3, 0.25])
def test_the_rate_rises_to_its_peak_then_never_rises(schedule: str, warmup: float) -> None:
    settings = config(schedule=schedule, warmup=warmup, lr=0.5)
    rates = [learning_rate(step, total=12, settings=settings) for step in range(12)]
    first = {0: 0, 3: 3, 0.25: 3}[warmup]
    assert rates[first] == 0.5
    assert rates[:first] == sorted(rates[:first])
    assert rates[first:] == sorted(rates[first:], reverse=True)
    assert min(rates) > 0


def test_linear_and_cosine_end_at_zero() -> None:
    for schedule in ("linear", "cosine"):
        settings = config(schedule=schedule, lr=1.0)
        assert learning_rate(10, total=10, settings=settings) == pytest.approx(0.0)
        assert learning_rate(5, total=10, settings=settings) == pytest.approx(0.5)


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


OWN = """
import torch

class Half(torch.optim.SGD):
    pass

def from_settings(groups, settings):
    return torch.optim.SGD(groups, lr=settings.lr, momentum=0.5)

def nothing(groups, settings):
    return None

def picky(groups, settings):
    raise ValueError("no groups please")

def falls(progress):
    return 1 - progress / 2

def grows_wild(progress):
    return 1 / progress

def negative(progress):
    return -1.0

number = 3
model = torch.nn.Linear
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(OWN, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["own:Half", "own:from_settings", "torch.optim:NAdam"])
def test_an_optimizer_of_ones_own(own: Path, name: str) -> None:
    name = name.replace("own", str(own))
    optimizer = build_optimizer(nn.Linear(3, 3), config(optimizer=name, weight_decay=0.1, lr=0.5))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own:Hlaf", "optimizer: .*has no 'Hlaf'; did you mean 'Half'?.*it has: .*Half"),
        ("own:number", "own.py:number is a int, not a subclass of torch.optim.Optimizer"),
        ("own:model", "own.py:model is the class Linear, not a subclass"),
        ("own:nothing", "returned a NoneType, not a torch.optim.Optimizer"),
        ("own:picky", "could not be built: ValueError: no groups please"),
        ("none.py:X", "optimizer: there is no file none.py"),
        ("torch.optim:AdmaW", "did you mean 'AdamW'"),
        ("no_such_package.x:X", "there is no module 'no_such_package.x'"),
        ("own:", "must be file.py:name or package.module:name"),
    ],
)
def test_what_is_no_optimizer_is_refused(own: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_optimizer(nn.Linear(3, 3), config(optimizer=name.replace("own", str(own))))


def test_a_schedule_of_ones_own(own: Path) -> None:
    settings = config(schedule=f"{own}:falls", lr=1.0, warmup=2)
    rates = [learning_rate(step, total=12, settings=settings) for step in range(12)]
    assert rates[2] == 1.0
    assert rates[7] == 0.75


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("grows_wild", "fails at progress 0.0: ZeroDivisionError"),
        ("negative", "gives -1.0 at progress 0.0, not a finite factor, at least 0"),
        ("number", "is a int, not a function of progress"),
        ("fals", "did you mean 'falls'"),
    ],
)
def test_what_is_no_schedule_is_refused(own: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_schedule(f"{own}:{name}")


def test_a_file_is_read_again_after_it_has_changed(own: Path) -> None:
    assert load_schedule(f"{own}:falls")(1.0) == 0.5
    own.write_text("def falls(progress):\n    return 0.25\n", encoding="utf-8")
    os.utime(own, ns=(1, 1))
    assert load_schedule(f"{own}:falls")(1.0) == 0.25
