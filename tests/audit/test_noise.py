"""The measured noise follows the coarsest type, and only that."""

import pytest
import torch
from torch import Tensor, nn

from samestep.audit.adapters.loop import LoopFunctions, LoopSubject
from samestep.audit.experiments import Experiments
from samestep.audit.gradients import (
    FloatDtypeRecorder,
    compare_gradients,
    noise_estimate,
    perturbations,
)
from samestep.audit.splits import candidate_splits


def test_what_is_smooth_does_not_tremble_and_noise_is_measured() -> None:
    points = torch.linspace(0, 1e-3, 4, dtype=torch.float64)
    smooth = [{"w": torch.full((100,), 1 + float(p) + float(p) ** 2)} for p in points]
    assert noise_estimate(smooth) < 1e-7  # float32 numbers
    draw = torch.Generator().manual_seed(0)
    noise = [{"w": 1 + 1e-3 * torch.randn(10_000, generator=draw)} for _ in points]
    assert noise_estimate(noise) == pytest.approx(1e-3, rel=0.05)


def test_a_line_has_equal_steps() -> None:
    one, two, three = perturbations({"w": torch.zeros(5)}, 1e-3)
    assert torch.allclose(two["w"], 2 * one["w"])
    assert torch.allclose(three["w"], 3 * one["w"])


def test_types_are_seen_where_gradients_are_recorded() -> None:
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    with FloatDtypeRecorder() as seen:
        (weight * 2).sum().backward()
        with torch.no_grad():
            weight.float()
    assert seen.coarsest() == torch.finfo(torch.float64).eps
    with FloatDtypeRecorder() as seen:
        (weight.bfloat16() * 2).sum().backward()
    assert seen.coarsest() == torch.finfo(torch.bfloat16).eps


class Narrow(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.body = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.body.weight.to(self.dtype)
        return torch.tanh((x.to(self.dtype) @ weight.T).to(x.dtype) + self.body.bias)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_floor_is_the_rounding_inside_the_model(dtype: torch.dtype) -> None:
    def step(model: nn.Module, micros: list[Tensor]) -> None:
        for micro in micros:
            (model(micro).square().sum() / sum(map(len, micros))).backward()

    draw = torch.Generator().manual_seed(0)
    names = {
        "model": lambda: Narrow(dtype),
        "examples": [torch.randn(6, generator=draw) for _ in range(8)],
        "collate": torch.stack,
        "step": step,
    }
    experiments = Experiments.start(LoopSubject(LoopFunctions.of(names), name="narrow"))
    eps = torch.finfo(dtype).eps
    assert eps / 50 < experiments.noise_floor < 5 * eps
    whole = experiments.run(experiments.whole_batch).gradient
    for split in candidate_splits(8, uniform=False):
        seen = compare_gradients(experiments.run(split).gradient, whole).relative_difference
        assert seen < experiments.tolerance
