"""Work that takes a while says so: lines in the log, from two seconds on.

A single label holds the place of a whole; `doing` says from inside how far the work is.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, repeat

_log = logging.getLogger("samestep")

_PAUSES = (2.0, 3.0, 5.0, 10.0)
"""Seconds until each line, after the one before it; from then on, the last."""

_details: list[str] = []
"""What the works under way last said of themselves, the innermost last."""


def doing(detail: str) -> None:
    """Say how far the work under way is; shown with its next line, if there is one.

    Args:
        detail: Such as "12,000 of 100,000 rows".
    """
    if _details:
        _details[-1] = detail


@contextmanager
def waiting(
    label: str,
    *,
    say: Callable[[str], None] = _log.info,
    pauses: tuple[float, ...] = _PAUSES,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[None]:
    """Say what is being worked on, again and again while it takes long; never for short work.

    Args:
        label: What is done, such as "loading the model".
        say: Takes a line; only rank 0 of a run on this machine speaks.
        pauses: Seconds until each line, after the one before it; then the last of them.
        clock: Seconds.

    Yields:
        Nothing.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    started, done = clock(), threading.Event()
    _details.append("")
    place = len(_details) - 1

    def talk() -> None:
        for pause in chain(pauses, repeat(pauses[-1])):
            if done.wait(pause):
                return
            detail = f", {_details[place]}" if _details[place] else ""
            say(f"{label}: {clock() - started:.0f} s{detail}")

    speaker = threading.Thread(target=talk, daemon=True)
    speaker.start()
    try:
        yield
    finally:
        done.set()
        speaker.join()
        del _details[place]
