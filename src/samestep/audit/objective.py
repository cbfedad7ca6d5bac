"""Whether the reported loss is the objective whose gradient was applied."""

import torch

from samestep.audit.causes import Diagnosis
from samestep.audit.runs import Runs
from samestep.audit.subject import Cut, Gradient, Shift
from samestep.audit.vectors import combine, norm

STEP = 1e-6
"""Length of the displacement that the loss is watched along, both ways."""

PARALLEL = 1e-4
"""Relative difference of slopes above which two objectives differ; the differences are good to
about the square of the step and its inverse times the rounding of float64, 1e-10."""


def report_of_another(runs: Runs, cut: Cut | None = None) -> Diagnosis | None:
    """Compare slopes of the reported loss with the gradient, along it and along random directions.

    Args:
        runs: The subject; only one that computes in float64 can be judged.
        cut: Where; None: the whole batch.

    Returns:
        None if the report has the gradient that was applied, up to a factor that no known wrong
        count explains (sums and means are both reported); else the cause.
    """
    if runs.coarsest > 1e-12:
        return None
    at = runs.whole if cut is None else cut
    gradient = runs.gradient(at)
    along = combine([gradient], [1 / norm(gradient)])
    factor = _slope(runs, at, along) / norm(gradient)
    worst = max(
        abs(_slope(runs, at, line) - factor * _dot(gradient, line)) / norm(gradient)
        for line in (_scrambled(along, seed) for seed in (1, 2))
    )
    scale = max(abs(factor), 1e-12)
    if abs(factor) < PARALLEL or worst / scale > PARALLEL:
        evidence = f"slopes of the reported loss miss the gradient's by {worst / scale:.1e}"
        return Diagnosis("reported-not-optimised", worst / scale, evidence)
    return None if cut is not None else _wrong_count(runs, factor)


def _wrong_count(runs: Runs, factor: float) -> Diagnosis | None:
    """A gradient that is the report's times targets over another count of the same batch."""
    facts = runs.subject.facts()
    targets = 0 if facts is None else sum(one.targets for one in facts)
    for name, (cause, count) in runs.counts(runs.whole[0]).items():
        if cause == "example-weighted" or not targets or count == targets:
            continue
        if abs(factor * targets / count - 1) < PARALLEL:
            evidence = f"the loss is reported over {targets} targets, optimised over {name}: "
            return Diagnosis(cause, abs(factor * targets / count - 1), evidence + f"{count:g}")
    return None


def _slope(runs: Runs, cut: Cut, line: Gradient) -> float:
    """Of the reported loss along a direction of unit length."""
    ahead, behind = (
        runs.again(cut, shift=Shift(combine([line], [sign * STEP]))).reported["loss"]
        for sign in (1.0, -1.0)
    )
    return (ahead - behind) / (2 * STEP)


def _scrambled(line: Gradient, seed: int) -> Gradient:
    """The same sizes with random signs."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: tensor * (torch.randint(0, 2, tensor.shape, generator=draw) * 2 - 1)
        for name, tensor in line.items()
    }


def _dot(one: Gradient, other: Gradient) -> float:
    return sum(float((tensor * other[name]).sum()) for name, tensor in one.items())
