"""What code that multiplies by itself needs to know of autocast, PyTorch's mixed precision."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def product_dtype(tensor: Tensor) -> torch.dtype:
    """The type that a tensor is multiplied in: autocast's where that is on, else its own.

    Args:
        tensor: Floating point.

    Returns:
        The type; float64 stays, as under autocast.
    """
    kind = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.amp.is_autocast_available(kind):
        return tensor.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def in_own_types(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorates a function of tensors: it computes in their types, also under autocast.

    Sums and losses would otherwise lose their last bits: to autocast ``weights @ losses`` is a
    matrix product like any other.

    Args:
        function: Its first argument is a tensor.

    Returns:
        The function, with autocast off inside.
    """

    @wraps(function)
    def without_autocast(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        first = args[0]
        assert isinstance(first, Tensor)
        kind = first.device.type
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return function(*args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return function(*args, **kwargs)

    return without_autocast
