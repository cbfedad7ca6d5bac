"""The gradient noise scale, from the sums over micro-batches that a step makes anyway.

McCandlish et al., "An Empirical Model of Large-Batch Training" (arXiv:1812.06162), equation 2.9
and appendix A.1: B_simple = tr(Sigma) / |G|^2, with Sigma the covariance of one sample's gradient
and G the true gradient. They estimate both from two batch sizes. Here the samples are targets, and
the micro-batches hold unequal numbers of them, n_i of N. With s_i the sum over micro-batch i and
T = sum of s_i, and assuming that micro-batches are independent with mean n_i G,

    |G|^2     ~ (|T|^2 - sum |s_i|^2) / (N^2 - sum n_i^2)
    tr(Sigma) ~ (sum |s_i|^2 - |G|^2 sum n_i^2) / N

are unbiased whatever the n_i are; equal n_i give the paper's formulas. Both are averaged over
steps before they are divided, as the paper advises.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from samestep.engine.terms import LossFn, LossResult, MicroBatch
from samestep.study.results import NoiseSums
from samestep.study.statistics import Estimate, ratio_interval


class MicroNorms:
    """Squared norms of the micro-batches' gradients, as they arrive."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []

    def watch(self, loss_fn: LossFn) -> LossFn:
        """The loss, each call of which begins a new micro-batch."""

        def watched(model: nn.Module, micro: MicroBatch) -> LossResult:
            self._sums.append(torch.zeros((), dtype=torch.float64))
            return loss_fn(model, micro)

        return watched

    def read(self) -> list[float]:
        """The squared norm of each micro-batch's gradient."""
        return [float(one) for one in self._sums]

    def add(self, gradient: Tensor) -> None:
        """Take what one weight got from the current micro-batch."""
        self._sums[-1] += torch.linalg.vector_norm(gradient).double().cpu() ** 2


@contextmanager
def micro_norms(model: nn.Module) -> Iterator[MicroNorms]:
    """Watch the gradients that reach the weights from each call of a watched loss.

    Args:
        model: The model; each of its weights gets one gradient a backward pass, also a shared one.

    Yields:
        The norms.
    """
    norms = MicroNorms()
    hooks = [
        weight.register_hook(norms.add) for weight in model.parameters() if weight.requires_grad
    ]
    try:
        yield norms
    finally:
        for hook in hooks:
            hook.remove()


def estimates(
    micro_squares: Sequence[float], targets: Sequence[float], *, norm: float
) -> tuple[float, float]:
    """Unbiased estimates from one step.

    Args:
        micro_squares: |s_i|^2 / N^2 of each micro-batch: of its share of the mean gradient.
        targets: n_i, its targets.
        norm: |T| / N, the norm of the whole gradient, not clipped.

    Returns:
        |G|^2 and tr(Sigma). Either can be negative by chance.
    """
    total = sum(targets)
    concentration = sum((one / total) ** 2 for one in targets)
    squares = sum(micro_squares)
    signal = (norm**2 - squares) / (1 - concentration)
    return signal, (squares - signal * concentration) * total


def noise_scale(runs: Sequence[NoiseSums], *, blocks: int = 10) -> Estimate | None:
    """The noise scale in targets, with a 95 % confidence interval.

    Steps near each other are alike, so each run is cut into blocks of consecutive steps, and the
    blocks are taken as independent.

    Args:
        runs: The sums of each run.
        blocks: How many a run is cut into, at most.

    Returns:
        The estimate; its upper end is infinite where the signal cannot be told from zero. None
        with fewer than 3 blocks.
    """
    variance, signal = [], []
    for run in runs:
        for part in np.array_split(np.arange(len(run.signal)), min(blocks, len(run.signal)) or 1):
            if len(part):
                variance.append(float(np.mean([run.variance[at] for at in part])))
                signal.append(float(np.mean([run.signal[at] for at in part])))
    return ratio_interval(variance, signal) if len(signal) >= 3 else None
