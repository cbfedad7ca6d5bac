"""``deterministic``: the same bits whenever a run is repeated or resumed, on an accelerator too."""

from collections.abc import Iterator
from contextlib import contextmanager

from samestep.engine.repeatable import repeatable_operations


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """A block in which every operation gives the same bits each time, or raises.

    Args:
        wanted: Whether; the block is as without it otherwise.

    Raises:
        ConfigError: An operation has no deterministic kernel, or cuBLAS was used before.
    """
    if not wanted:
        yield
        return
    with repeatable_operations("deterministic"):
        yield
