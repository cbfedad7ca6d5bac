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

_labels: list[str] = []
"""What is under way, the innermost last."""

_moved = 0
"""How often work began, ended, or said how far it is."""


def work_under_way() -> tuple[int, str]:
    """How often work has moved in this process, and the label of the innermost; empty if none."""
    labels = list(_labels)
    return _moved, labels[-1] if labels else ""


def _move() -> None:
    global _moved
    _moved += 1


def doing(detail: str) -> None:
    """Say how far the work under way is; shown with its next line, if there is one.

    Args:
        detail: Such as "12,000 of 100,000 rows".
    """
    _move()
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
    with _noted(label):
        if os.environ.get("RANK", "0") != "0":
            yield
            return
        with _said(label, say=say, pauses=pauses, clock=clock):
            yield


@contextmanager
def _noted(label: str) -> Iterator[None]:
    _labels.append(label)
    _move()
    try:
        yield
    finally:
        _labels.pop()
        _move()


@contextmanager
def _said(
    label: str, *, say: Callable[[str], None], pauses: tuple[float, ...], clock: Callable[[], float]
) -> Iterator[None]:
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
