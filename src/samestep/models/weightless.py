"""Models without their weights: every size and type of them, and no memory."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch

_weightless: ContextVar[bool] = ContextVar("weightless", default=False)


@contextmanager
def without_weights() -> Iterator[None]:
    """A block in which models are made on PyTorch's meta device, and no weights are read."""
    token = _weightless.set(True)
    try:
        yield
    finally:
        _weightless.reset(token)


def is_weightless() -> bool:
    """Whether this is inside `without_weights`."""
    return _weightless.get()


def on_meta() -> Any:
    """Where `without_weights` makes a model; elsewhere a context that does nothing."""
    return torch.device("meta") if _weightless.get() else nullcontext()
