import math

import numpy as np
import pytest
from cases import build, cut, ragged
from torch import nn

import samestep
from samestep.engine.counts import count_units
from samestep.study.results import NoiseSums
from samestep.study.statistics import (
    estimate_signal_and_variance,
    gradient_noise_scale,
    record_micro_batch_norms,
)

DIMENSIONS, TARGETS = 40, [3, 50, 7, 120, 1, 19]


def simulate(
    draws: int, *, spread: float, targets: list[int]
) -> tuple[list[tuple[float, float]], float, float]:
    """Estimates from made-up gradients, the true squared norm, and the true trace."""
    draw = np.random.default_rng(0)
    true = draw.normal(size=DIMENSIONS)
    found = []
    total = sum(targets)
    for _ in range(draws):
        sums = [
            number * true + spread * math.sqrt(number) * draw.normal(size=DIMENSIONS)
            for number in targets
        ]
        squares = [float(one @ one) / total**2 for one in sums]
        norm = float(np.linalg.norm(np.sum(sums, axis=0))) / total
        found.append(estimate_signal_and_variance(squares, targets, norm=norm))
    return found, float(true @ true), spread**2 * DIMENSIONS


def test_the_estimates_are_unbiased_for_unequal_counts() -> None:
    found, signal, trace = simulate(4000, spread=3.0, targets=TARGETS)
    for estimate, wanted in ((0, signal), (1, trace)):
        values = [one[estimate] for one in found]
        error = float(np.std(values)) / math.sqrt(len(values))
        assert abs(float(np.mean(values)) - wanted) < 4 * error
        assert error < 0.05 * wanted  # so that a bias would be seen
    # As if all micro-batches had the mean number of targets: wrong by far.
    mean = sum(TARGETS) / len(TARGETS)
    naive, total = [], sum(TARGETS)
    draw = np.random.default_rng(1)
    true = np.ones(DIMENSIONS)
    for _ in range(500):
        sums = [n * true + 3 * math.sqrt(n) * draw.normal(size=DIMENSIONS) for n in TARGETS]
        squares = [float(one @ one) / total**2 for one in sums]
        norm = float(np.linalg.norm(np.sum(sums, axis=0))) / total
        naive.append(estimate_signal_and_variance(squares, [mean] * len(TARGETS), norm=norm)[0])
    assert abs(float(np.mean(naive)) / DIMENSIONS - 1) > 0.1


def test_equal_counts_give_the_formulas_of_the_paper() -> None:
    squares, norm, number, times = [0.02, 0.03, 0.025, 0.04], 0.25, 16, 4
    small, big = number, number * times
    # McCandlish et al., A.1, with |G_small|^2 the mean over the micro-batches' own means.
    small_square = sum(square * times**2 for square in squares) / times
    signal = (big * norm**2 - small * small_square) / (big - small)
    trace = (small_square - norm**2) / (1 / small - 1 / big)
    assert estimate_signal_and_variance(squares, [number] * times, norm=norm) == pytest.approx(
        (signal, trace)
    )


def test_the_norms_are_those_of_the_micro_batches_own_gradients() -> None:
    # GPT-2: a shared weight, and no norm that transformers computes in float32 whatever the dtype.
    model = build("gpt2")
    micros = cut(model, ragged(6), [1, 2], "none")
    total = count_units(micros)["token"]
    loss = samestep.CausalLMLoss()
    with record_micro_batch_norms(model) as norms:
        samestep.backward(model, micros, norms.wrap_loss(loss), check_sums=False)
    for micro, square in zip(micros, norms.squares(), strict=True):
        samestep.backward(model, [micro], loss)
        share = count_units([micro])["token"] / total
        assert square == pytest.approx((_norm(model) * share) ** 2, rel=1e-10, abs=1e-30)


def _norm(model: nn.Module) -> float:
    return float(
        sum((weight.grad**2).sum() for weight in model.parameters() if weight.grad is not None)
        ** 0.5
    )


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    held = 0
    for trial in range(200):
        draw = np.random.default_rng(trial)
        run = NoiseSums(
            signal=(2 + draw.normal(size=40)).tolist(),
            variance=(10 + 3 * draw.normal(size=40)).tolist(),
        )
        scale = gradient_noise_scale([run])
        assert scale is not None
        held += scale.low <= 5 <= scale.high
    assert 180 <= held <= 199


def test_without_a_signal_there_is_no_upper_bound() -> None:
    run = NoiseSums(signal=[1.0, -1.0, 0.5, -0.2], variance=[5.0, 6.0, 5.5, 5.2])
    scale = gradient_noise_scale([run])
    assert scale is not None
    assert math.isinf(scale.high)
    nothing = gradient_noise_scale([NoiseSums(signal=[-1.0] * 4, variance=[5.0] * 4)])
    assert nothing is not None
    assert math.isnan(nothing.value)
    assert gradient_noise_scale([NoiseSums(signal=[1.0], variance=[5.0])]) is None
