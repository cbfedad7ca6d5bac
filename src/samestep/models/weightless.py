"""Models without their weights: every size and type of them, and no memory."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

_weightless: ContextVar[bool] = ContextVar("weightless", default=False)


def without_weights() -> AbstractContextManager[None]:
    """A block in which models are made on PyTorch's meta device, and no weights are read."""
    return _weightless_is(True)


def with_weights() -> AbstractContextManager[None]:
    """A block in which models have their weights again, inside of `without_weights`."""
    return _weightless_is(False)


@contextmanager
def _weightless_is(value: bool) -> Iterator[None]:
    token = _weightless.set(value)
    try:
        yield
    finally:
        _weightless.reset(token)


def is_weightless() -> bool:
    """Whether this is inside `without_weights`."""
    return _weightless.get()
