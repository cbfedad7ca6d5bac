"""Ctrl-C ends a run between two steps, not inside one."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interruptible(announce: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT into a question that the loop asks between steps.

    Args:
        announce: Called with one line when the signal comes.

    Yields:
        A function that says whether to stop. A second SIGINT raises KeyboardInterrupt at once.
    """
    asked = False

    def ask(_: int, __: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        announce("stopping after this step, then saving; Ctrl-C again stops at once")

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # signals reach the main thread only
        return
    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
