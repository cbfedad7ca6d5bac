"""The noise of a computation, measured: how its gradient varies when nothing should move it."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from samestep.audit.gradients import global_norm, linear_combination, scale
from samestep.audit.subject import Gradient


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
