"""SIGINT and SIGTERM end a run between two micro-batches, not inside one."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from samestep.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interruptible(announce: Callable[[str], None]) -> Iterator[Callable[[], int]]:
    """Turn the first SIGINT or SIGTERM into a question that the loop asks between micro-batches.

    Args:
        announce: Called with one line when the signal comes.

    Yields:
        A function that gives the number of the signal that came, or 0. A second signal raises
        `Interrupted` at once.
    """
    asked = 0

    def ask(number: int, _: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise Interrupted(number)
        asked = number
        name = signal.Signals(number).name
        announce(f"{name}: stopping after this micro-batch, then saving; again stops at once")

    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0  # signals reach the main thread only
        return
    before = {number: signal.signal(number, ask) for number in SIGNALS}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
