"""Gradients as vectors: differences, and least squares of one gradient on others."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from samestep.audit.subject import Gradient


@dataclass(frozen=True)
class Comparison:
    """How a gradient differs from a reference.

    Attributes:
        ratio: Its norm over the reference's.
        cosine: Of the angle between them.
        relative_difference: Norm of the difference over the reference's norm.
        worst: The weights that differ most: (name, relative difference), worst first.
    """

    ratio: float
    cosine: float
    relative_difference: float
    worst: tuple[tuple[str, float], ...]


def compare(found: Gradient, reference: Gradient, *, most: int = 40) -> Comparison:
    """Scale and direction apart, and the weights at fault.

    Args:
        found: The gradient in question; a weight that it lacks counts as zero.
        reference: What it should be.
        most: How many weights to name.

    Returns:
        The comparison. A weight's relative difference is to its own norm in the reference, but at
        least to a millionth of the whole gradient's, so that dead weights do not lead the list.
    """
    one, other = flatten(found, reference), flatten(reference, reference)
    norm = float(other.norm())
    if norm == 0:
        same = float(one.norm()) == 0
        return Comparison(1.0 if same else math.inf, 1.0 if same else 0.0, 0.0 if same else 1.0, ())
    cosine = float(one @ other) / (float(one.norm()) * norm) if float(one.norm()) else 0.0
    by_weight = [
        (name, float((_get(found, name, tensor) - tensor).norm() / max(tensor.norm(), norm * 1e-6)))
        for name, tensor in reference.items()
    ]
    by_weight.sort(key=lambda pair: -pair[1] if math.isfinite(pair[1]) else -math.inf)
    return Comparison(
        ratio=float(one.norm()) / norm,
        cosine=max(-1.0, min(1.0, cosine)),
        relative_difference=float((one - other).norm()) / norm,
        worst=tuple(by_weight[:most]),
    )


def across(seen: Comparison) -> float:
    """The part of the relative difference that is at right angles to the reference, no scale."""
    if not math.isfinite(seen.relative_difference):
        return math.inf
    return math.sqrt(max(0.0, 1 - seen.cosine**2)) * seen.ratio


def flatten(gradient: Gradient, layout: Gradient) -> Tensor:
    """One vector, in the order of the layout's names; zeros where the gradient has no such name."""
    return torch.cat([_get(gradient, name, like).flatten() for name, like in layout.items()])


def _get(gradient: Gradient, name: str, like: Tensor) -> Tensor:
    return gradient[name] if name in gradient else torch.zeros_like(like)


def combine(gradients: Sequence[Gradient], factors: Sequence[float]) -> Gradient:
    """The sum of factor times gradient."""
    total: Gradient = {}
    for gradient, factor in zip(gradients, factors, strict=True):
        for name, tensor in gradient.items():
            total[name] = total[name] + factor * tensor if name in total else factor * tensor
    return total


def norm(gradient: Gradient) -> float:
    """Over all weights together."""
    return math.hypot(*(float(tensor.norm()) for tensor in gradient.values()))


@dataclass(frozen=True)
class Fit:
    """A gradient written as a sum of others.

    Attributes:
        coefficients: One for each of the others.
        residual: Norm of what is left over the gradient's norm.
    """

    coefficients: tuple[float, ...]
    residual: float


def fit(target: Gradient, parts: Sequence[Gradient]) -> Fit:
    """Least squares of a gradient on others, in float64.

    Args:
        target: The gradient to explain: as many equations as it has elements.
        parts: The unknowns' gradients, scaled to unit norm for the solution.

    Returns:
        The coefficients and the residual; with parts that are all zero, zeros and 1.
    """
    wanted = flatten(target, target)
    columns = torch.stack([flatten(part, target) for part in parts], dim=1)
    norms = columns.norm(dim=0)
    used = (norms > 0).nonzero().squeeze(1)
    coefficients = torch.zeros(len(parts), dtype=torch.float64)
    if len(used) and float(wanted.norm()):
        scaled = columns[:, used] / norms[used]
        solution = torch.linalg.lstsq(scaled, wanted[:, None], driver="gelsd").solution
        coefficients[used] = solution.squeeze(1) / norms[used]
    left = wanted - columns @ coefficients
    residual = float(left.norm() / wanted.norm()) if float(wanted.norm()) else 0.0
    return Fit(tuple(coefficients.tolist()), residual)
