"""Float64 all the way: model code that insists on float32 for parts of itself gets float64."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, autograd
from torch.overrides import TorchFunctionMode

NARROW = (torch.float32, torch.float16, torch.bfloat16)
CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)


class _Widened(TorchFunctionMode):
    """Replaces narrower floating types in the arguments of every PyTorch function.

    Norms, rotary positions, routers and losses of published models cast to float32 inside. Left
    alone, that rounding would hide differences below 1e-7 in a run that is meant to be float64.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in CASTS:
            return Tensor.double(*args)
        wide = {key: _wide(value) for key, value in (kwargs or {}).items()}
        return func(*map(_wide, args), **wide)


def _wide(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in NARROW else value


@contextmanager
def widened() -> Iterator[None]:
    """Within the block float64 is the default type, and no PyTorch call narrows to another."""
    before, engine = torch.get_default_dtype(), vars(autograd)
    run_backward = engine["_engine_run_backward"]

    def run_backward_widened(*args: Any, **kwargs: Any) -> Any:
        # A mode is off inside the calls that it handles, and so inside backward(), where
        # checkpointed layers run their forward again.
        with _Widened():
            return run_backward(*args, **kwargs)

    torch.set_default_dtype(torch.float64)
    engine["_engine_run_backward"] = run_backward_widened
    try:
        with _Widened():
            yield
    finally:
        engine["_engine_run_backward"] = run_backward
        torch.set_default_dtype(before)
