"""Confidence intervals from few numbers, and the gradient noise scale."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from samestep.engine.terms import LossFn, LossResult, MicroBatch
from samestep.study.results import NoiseSums, Results, Run
from samestep.study.spec import split_sizes

_T975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""97.5 % quantiles of Student's t for 1 to 30 degrees of freedom (any statistics handbook)."""


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % confidence interval.

    Attributes:
        value: The estimate.
        low: Lower end.
        high: Upper end; may be infinite.
    """

    value: float
    low: float
    high: float


def _t_quantile(degrees: int) -> float:
    """The 97.5 % quantile for so many degrees of freedom; beyond 30 that of 30, which is wider."""
    return _T975[min(degrees, len(_T975)) - 1]


def mean_interval(values: Sequence[float]) -> Estimate:
    """The mean with Student's interval.

    Args:
        values: At least two, independent.

    Returns:
        The mean and its interval.
    """
    mean = float(np.mean(values))
    half = _t_quantile(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half)


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """A ratio of two positive means with Fieller's interval, which knows when it is unbounded.

    Fieller, "Some problems in interval estimation", J. R. Stat. Soc. B 16 (1954): all ratios r for
    which mean(numerator) - r mean(denominator) cannot be distinguished from zero.

    Args:
        numerators: At least two, independent.
        denominators: As many, each belonging to the numerator at its place.

    Returns:
        The ratio, cut off at 0 below. (nan, 0, inf) where the denominator is not above zero.
    """
    x, y = float(np.mean(numerators)), float(np.mean(denominators))
    if y <= 0:
        return Estimate(math.nan, 0.0, math.inf)
    covariance = np.cov(numerators, denominators) / len(numerators)
    xx, xy, yy = float(covariance[0, 0]), float(covariance[0, 1]), float(covariance[1, 1])
    t2 = _t_quantile(len(numerators) - 1) ** 2
    # (x - r y)^2 = t2 (xx - 2 r xy + r^2 yy), solved for r.
    a, b, c = y * y - t2 * yy, x * y - t2 * xy, x * x - t2 * xx
    root = b * b - a * c
    if root < 0:
        return Estimate(x / y, 0.0, math.inf)
    if a <= 0:  # open above; below it ends where the two sides first meet
        low = c / (b + math.sqrt(root)) if b + math.sqrt(root) > 0 else 0.0
        return Estimate(x / y, max(0.0, low), math.inf)
    ends = ((b - math.sqrt(root)) / a, (b + math.sqrt(root)) / a)
    return Estimate(x / y, max(0.0, ends[0]), max(0.0, ends[1]))


class MicroBatchNorms:
    """Squared norms of the micro-batches' gradients, added up weight by weight as they arrive."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []

    def wrap_loss(self, loss_fn: LossFn) -> LossFn:
        """A loss whose every call begins a new micro-batch.

        Args:
            loss_fn: The loss.

        Returns:
            The loss to run the step with.
        """

        def wrapped(model: nn.Module, micro_batch: MicroBatch) -> LossResult:
            self._sums.append(torch.zeros((), dtype=torch.float64))
            return loss_fn(model, micro_batch)

        return wrapped

    def squares(self) -> list[float]:
        """The squared norm of each micro-batch's gradient."""
        return [float(total) for total in self._sums]

    def _add(self, gradient: Tensor) -> None:
        """Take what one weight got from the current micro-batch."""
        self._sums[-1] += torch.linalg.vector_norm(gradient).double().cpu() ** 2


@contextmanager
def record_micro_batch_norms(model: nn.Module) -> Iterator[MicroBatchNorms]:
    """Observe the gradients that reach the weights from each micro-batch.

    Args:
        model: The model; each of its weights gets one gradient a backward pass, also a shared one.

    Yields:
        The norms; run the step with the loss of `MicroBatchNorms.wrap_loss`.
    """
    norms = MicroBatchNorms()
    hooks = [
        weight.register_hook(norms._add) for weight in model.parameters() if weight.requires_grad
    ]
    try:
        yield norms
    finally:
        for hook in hooks:
            hook.remove()


def estimate_signal_and_variance(
    micro_batch_squares: Sequence[float], targets: Sequence[float], *, norm: float
) -> tuple[float, float]:
    """Unbiased estimates from one step.

    Args:
        micro_batch_squares: |s_i|^2 / N^2 of each micro-batch: of its share of the mean gradient.
        targets: n_i, its targets.
        norm: |T| / N, the norm of the batch's gradient, not clipped.

    Returns:
        |G|^2 and tr(Sigma). Either can be negative by chance.
    """
    total = sum(targets)
    concentration = sum((number / total) ** 2 for number in targets)
    squares = sum(micro_batch_squares)
    signal = (norm**2 - squares) / (1 - concentration)
    return signal, (squares - signal * concentration) * total


def gradient_noise_scale(runs: Sequence[NoiseSums], *, blocks: int = 10) -> Estimate | None:
    """The noise scale in targets, with a 95 % confidence interval.

    Steps near each other are alike, so each run is cut into blocks of consecutive steps, and the
    blocks are taken as independent.

    Args:
        runs: The estimates of each run's steps.
        blocks: How many a run is cut into, at most.

    Returns:
        The estimate; its upper end is infinite where the signal cannot be distinguished from zero.
        None with fewer than 3 blocks.
    """
    variance, signal = [], []
    for run in runs:
        for block in np.array_split(np.arange(len(run.signal)), min(blocks, len(run.signal)) or 1):
            if len(block):
                variance.append(float(np.mean([run.variance[step] for step in block])))
                signal.append(float(np.mean([run.signal[step] for step in block])))
    return ratio_interval(variance, signal) if len(signal) >= 3 else None


@dataclass(frozen=True)
class BatchSizeAdvice:
    """What the gradient noise scale says about the batch size of one group.

    Attributes:
        group: The group.
        batch: Its effective batch, in examples.
        noise_scale: In examples, with its 95 % interval.
        steps: How many step estimates it is from.
        text: What it means.
    """

    group: str
    batch: int
    noise_scale: Estimate
    steps: int
    text: str


def batch_size_advice(results: Results) -> list[BatchSizeAdvice]:
    """The noise scale of each group that has an exact arm with accumulation.

    Of several such arms the one with the most micro-batches is used.

    Args:
        results: The results.

    Returns:
        The advice, in the order of the groups.
    """
    advice = []
    for group, arms in results.groups().items():
        usable = [arm for arm in arms if any(run.noise.signal for run in arm.finished())]
        if not usable:
            continue
        arm = min(usable, key=lambda arm: split_sizes(arm.split)[0])
        runs = arm.finished()
        in_targets = gradient_noise_scale([run.noise for run in runs])
        if in_targets is None:
            continue
        per_example = _targets_per_example(runs, arm.batch)
        noise_scale = Estimate(
            in_targets.value / per_example,
            in_targets.low / per_example,
            in_targets.high / per_example,
        )
        steps = sum(len(run.noise.signal) for run in runs)
        text = _advice_text(noise_scale, arm.batch)
        advice.append(BatchSizeAdvice(group, arm.batch, noise_scale, steps, text))
    return advice


def _targets_per_example(runs: Sequence[Run], batch: int) -> float:
    targets = [number for run in runs for number in run.steps.targets]
    return sum(targets) / (len(targets) * batch)


def _advice_text(noise_scale: Estimate, batch: int) -> str:
    if math.isnan(noise_scale.value):
        return (
            "Not resolved: the gradient's signal could not be distinguished from its noise. That "
            "happens where the noise scale is far above the batch; more steps or seeds would help."
        )
    high = f"{noise_scale.high:.3g}" if math.isfinite(noise_scale.high) else "no upper bound"
    alternatives = []
    for name, factor in (("half", 0.5), ("twice", 2.0)):
        steps = _relative_steps(noise_scale.value, batch=batch, factor=factor)
        alternatives.append(
            f"{name} the batch {steps:.2f} times the steps and {steps * factor:.2f} times the "
            "examples"
        )
    return (
        f"Noise scale {noise_scale.value:.3g} examples (95 % interval {noise_scale.low:.3g} to "
        f"{high}). To the same loss, by its model, {', '.join(alternatives)} of batch {batch}."
    )


def _relative_steps(noise_scale: float, *, batch: int, factor: float) -> float:
    """Steps to a loss with another batch, over those with this one: they go as 1 + scale / batch.

    McCandlish et al., section 2.2, for SGD at the best learning rate of each batch.
    """
    return (1 + noise_scale / (batch * factor)) / (1 + noise_scale / batch)
