"""Confidence intervals of means and of ratios of means, from few numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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
