"""Models without their weights: every size and type of them, and no memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_weightless: ContextVar[bool] = ContextVar("weightless", default=False)


@contextmanager
def without_weights() -> Iterator[None]:
    """A block in which models are made on PyTorch's meta device, and no weights are read."""
    token = _weightless.set(True)
    try:
        yield
    finally:
        _weightless.reset(token)


@contextmanager
def with_weights() -> Iterator[None]:
    """A block in which models have their weights again, inside of `without_weights`."""
    token = _weightless.set(False)
    try:
        yield
    finally:
        _weightless.reset(token)


def is_weightless() -> bool:
    """Whether this is inside `without_weights`."""
    return _weightless.get()
