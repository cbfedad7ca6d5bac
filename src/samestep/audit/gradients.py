"""Gradients as vectors: what is kept of large ones, differences, and least squares.

Of a large model's gradient random sums of its elements are kept. A sum with random signs is linear,
so a gradient that is a combination of others has the same combination of their sums, and a
difference anywhere shows. Lengths and angles are kept to about one over the square root of the
number of sums (Achlioptas, Database-friendly random projections, 2003). A gradient of up to
`MAX_ELEMENTS` elements is kept as it is.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from samestep.audit.subject import Gradient

MAX_ELEMENTS = 2**19
"""Elements of a model's gradient that are kept, 4 MB in float64: dozens fit beside any model."""

INDEPENDENT = 1e-5
"""Singular value over the largest above which a direction counts: well above the noise of float64,
well below what a lost token does."""


@dataclass(frozen=True)
class GradientDifference:
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

    @property
    def size(self) -> float:
        """The relative difference, for ranking: what is not finite is the largest."""
        return self.relative_difference if math.isfinite(self.relative_difference) else math.inf

    @property
    def perpendicular(self) -> float:
        """The part of the relative difference that is at right angles to the reference."""
        if not math.isfinite(self.relative_difference):
            return math.inf
        return math.sqrt(max(0.0, 1 - self.cosine**2)) * self.ratio


def compare_gradients(
    gradient: Gradient, reference: Gradient, *, most: int = 40
) -> GradientDifference:
    """Scale and direction apart, and the weights at fault.

    Args:
        gradient: The gradient in question.
        reference: What it should be. A weight that one of the two lacks counts as zero there.
        most: How many weights to name.

    Returns:
        The difference. A weight's relative difference is to its own norm in the reference, but at
        least to a millionth of the whole gradient's, so that dead weights do not lead the list.
    """
    layout = {**gradient, **reference}
    vector, expected = _flatten(gradient, layout), _flatten(reference, layout)
    length, expected_length = float(vector.norm()), float(expected.norm())
    if expected_length == 0:
        if length == 0:
            return GradientDifference(1.0, 1.0, 0.0, ())
        return GradientDifference(math.inf, 0.0, 1.0, ())
    cosine = float(vector @ expected) / (length * expected_length) if length else 0.0
    least = expected_length * 1e-6
    by_weight = []
    for name, like in layout.items():
        tensor = _get(reference, name, like=like)
        error = (_get(gradient, name, like=like) - tensor).norm()
        by_weight.append((name, float(error / max(tensor.norm(), least))))
    by_weight.sort(key=lambda pair: -pair[1] if math.isfinite(pair[1]) else -math.inf)
    return GradientDifference(
        ratio=length / expected_length,
        cosine=max(-1.0, min(1.0, cosine)),
        relative_difference=float((vector - expected).norm()) / expected_length,
        worst=tuple(by_weight[:most]),
    )


def relative_difference(gradient: Gradient, reference: Gradient) -> float:
    """As `compare_gradients` has it: the norm of the difference over the reference's norm."""
    layout = {**gradient, **reference}
    vector, expected = _flatten(gradient, layout), _flatten(reference, layout)
    size = float(expected.norm())
    if size == 0:
        return float(bool(vector.any()))
    return float((vector - expected).norm()) / size


def _flatten(gradient: Gradient, layout: Gradient) -> Tensor:
    """One vector, in the order of the layout's names; zeros where the gradient has no such name."""
    return torch.cat([_get(gradient, name, like=like).flatten() for name, like in layout.items()])


def _get(gradient: Gradient, name: str, *, like: Tensor) -> Tensor:
    return gradient[name] if name in gradient else torch.zeros_like(like)


def linear_combination(gradients: Sequence[Gradient], factors: Sequence[float]) -> Gradient:
    """The sum of factor times gradient."""
    total: Gradient = {}
    for gradient, factor in zip(gradients, factors, strict=True):
        for name, tensor in gradient.items():
            total[name] = total[name] + factor * tensor if name in total else factor * tensor
    return total


def subtract(gradient: Gradient, offset: Gradient) -> Gradient:
    """The first minus the second."""
    return linear_combination([gradient, offset], [1.0, -1.0])


def scale(gradient: Gradient, factor: float) -> Gradient:
    """Factor times gradient."""
    return linear_combination([gradient], [factor])


def global_norm(gradient: Gradient) -> float:
    """Over all weights together."""
    return math.hypot(*norms(gradient).values())


def norms(gradient: Gradient) -> dict[str, float]:
    """That of each weight."""
    if not gradient:
        return {}
    sizes = torch.stack(torch._foreach_norm(list(gradient.values()))).tolist()
    return dict(zip(gradient, sizes, strict=True))


def is_finite(gradient: Gradient) -> bool:
    """Whether every element is."""
    return all(bool(tensor.isfinite().all()) for tensor in gradient.values())


@dataclass(frozen=True)
class LeastSquares:
    """A gradient written as a sum of others.

    Attributes:
        coefficients: Of each of the others.
        residual: Norm of what is left over the gradient's norm.
    """

    coefficients: tuple[float, ...]
    residual: float

    def __str__(self) -> str:
        return " ".join(f"{coefficient:.4g}" for coefficient in self.coefficients)


def least_squares(target: Gradient, parts: Sequence[Gradient]) -> LeastSquares:
    """Least squares of a gradient on others, in float64.

    Args:
        target: The gradient to explain: as many equations as it has elements.
        parts: The unknowns' gradients, scaled to unit norm for the solution.

    Returns:
        The coefficients and the residual; with parts that are all zero, zeros and 1.
    """
    expected = _flatten(target, target)
    columns = torch.stack([_flatten(part, target) for part in parts], dim=1)
    norms = columns.norm(dim=0)
    used = (norms > 0).nonzero().squeeze(1)
    coefficients = torch.zeros(len(parts), dtype=torch.float64)
    if len(used) and float(expected.norm()):
        scaled = columns[:, used] / norms[used]
        solution = torch.linalg.lstsq(scaled, expected[:, None], driver="gelsd").solution
        coefficients[used] = solution.squeeze(1) / norms[used]
    left = expected - columns @ coefficients
    residual = float(left.norm() / expected.norm()) if float(expected.norm()) else 0.0
    return LeastSquares(tuple(coefficients.tolist()), residual)


def are_independent(gradients: Sequence[Gradient]) -> bool:
    """Whether no gradient is a combination of the others: else many weights give one sum.

    Args:
        gradients: Those that are nothing are left out.
    """
    held = [gradient for gradient in gradients if global_norm(gradient)]
    return rank(held) == len(held)


def rank(gradients: Sequence[Gradient]) -> int:
    """How many directions gradients have, each taken at unit length.

    Args:
        gradients: None of them nothing.
    """
    layout = {name: tensor for gradient in gradients for name, tensor in gradient.items()}
    if not gradients:
        return 0
    flat = torch.stack([_flatten(gradient, layout) for gradient in gradients])
    rows = flat / flat.norm(dim=1, keepdim=True)
    sizes = torch.linalg.svdvals(rows @ rows.T).sqrt()
    return int((sizes > INDEPENDENT * sizes[0]).sum())


def sketch_fold(model: nn.Module) -> int:
    """How many elements make one sum, so that a gradient of the trainable weights fits."""
    return fold_of(weight for weight in model.parameters() if weight.requires_grad)


def fold_of(tensors: Iterable[Tensor]) -> int:
    """The same for any tensors that are to fit together."""
    elements = sum(tensor.numel() for tensor in tensors)
    return max(1, -(-elements // MAX_ELEMENTS))


def sketch(tensor: Tensor, fold: int) -> Tensor:
    """Sums of elements with random signs.

    Args:
        tensor: Of any shape; dense.
        fold: Elements of a sum, from `sketch_fold`.

    Returns:
        Float64 on the CPU, a copy: ``[ceil(elements / fold)]``; with a fold of 1 the tensor itself.
    """
    if fold == 1:
        return tensor.detach().to("cpu", torch.float64, copy=True)
    flat = tensor.detach().flatten()
    sums = torch.zeros(-(-len(flat) // fold), dtype=torch.float64)
    for start, signs in _rows_of_signs(len(flat), len(sums)):
        row = flat[start : start + len(signs)].to("cpu", torch.float64)
        sums[: len(row)] += row * signs
    return sums


def unsketch(sums: Tensor, like: Tensor, *, fold: int) -> Tensor:
    """The direction whose product with any gradient is that of the sums with the gradient's.

    Args:
        sums: As `sketch` returns them.
        like: The weight: its shape.
        fold: Elements of a sum.

    Returns:
        Float64 on the CPU, of the shape of the weight.
    """
    if fold == 1:
        return sums
    flat = torch.empty(like.numel(), dtype=torch.float64)
    for start, signs in _rows_of_signs(len(flat), len(sums)):
        flat[start : start + len(signs)] = sums[: len(signs)] * signs
    return flat.view(like.shape)


def _rows_of_signs(elements: int, sums: int) -> Iterator[tuple[int, Tensor]]:
    """The start of each row of as many elements as there are sums, and its signs."""
    generator = torch.Generator().manual_seed(elements)
    for start in range(0, elements, sums):
        length = min(sums, elements - start)
        bits = torch.randint(0, 2, (length,), generator=generator, dtype=torch.float64)
        yield start, bits * 2 - 1


class FloatDtypeRecorder(TorchDispatchMode):
    """Collects the floating types that are computed where gradients are recorded.

    So neither how a model is made, nor what is watched without gradients, counts.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if not torch.is_grad_enabled() or not any(map(_is_floating, args)):
            return result
        for output in result if isinstance(result, list | tuple) else (result,):
            if isinstance(output, Tensor) and output.is_floating_point() and output.dim():
                self.dtypes.add(output.dtype)
        return result

    def coarsest(self) -> float:
        """The largest relative rounding of any type that was seen."""
        return max((float(torch.finfo(dtype).eps) for dtype in self.dtypes), default=0.0)


def _is_floating(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_is_floating, value))
    return isinstance(value, Tensor) and value.is_floating_point()


def perturbations(weights: Gradient, step: float) -> list[Gradient]:
    """Three displacements of the weights: 1, 2 and 3 steps along a random line.

    Args:
        weights: Any gradient or weights that give names and shapes.
        step: Size of a step, of each element.
    """
    generator = torch.Generator().manual_seed(0)
    line = {
        name: torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * step
        for name, tensor in weights.items()
    }
    return [scale(line, float(number)) for number in (1, 2, 3)]


def noise_estimate(gradients: Sequence[Gradient]) -> float:
    """Relative noise of a gradient: its third difference along a line of tiny steps.

    What is smooth cancels to the third order of the step; what rounds at random does not
    (Moré and Wild, Estimating computational noise, 2011: the variance of a third difference of
    independent noise is 20 times the noise's).

    Args:
        gradients: At four points with equal steps between.
    """
    third = linear_combination(gradients, [-1.0, 3.0, -3.0, 1.0])
    size = global_norm(gradients[0])
    return global_norm(third) / math.sqrt(20) / size if size else 0.0
