"""Trying ever less until it fits into memory."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from samestep.errors import OutOfMemoryError, SequenceTooLargeError
from samestep.utils.memory import release_memory

Size = TypeVar("Size")
Result = TypeVar("Result")


def first_that_fits(
    sizes: Sequence[Size], run: Callable[[Size], Result]
) -> tuple[Result, list[Size]]:
    """Run work of the first of some sizes that fits into memory.

    Args:
        sizes: Each smaller than the one before; at least one.
        run: Runs the work. It starts with the memory of what did not fit given back.

    Returns:
        What it returned, and the sizes that did not fit.

    Raises:
        SequenceTooLargeError: A sequence by itself does not fit, which no size makes smaller.
        OutOfMemoryError: The smallest does not fit.
    """
    for at, size in enumerate(sizes):
        try:
            return run(size), list(sizes[:at])
        except SequenceTooLargeError:
            raise
        except OutOfMemoryError:
            if at + 1 == len(sizes):
                raise
        release_memory()  # outside of the handler: an error that is handled keeps what it came by
    raise ValueError("no sizes")
