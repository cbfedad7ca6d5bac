"""A function in a process of its own: limited in time and memory, and always ended."""

import multiprocessing
import re
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from multiprocessing.connection import wait
from typing import Any

BYTES = 8 << 30


Found = dict[str, Any]
Work = Callable[[str], Found]


class _Fork:
    """A fork of this process that works on a name: libraries that are loaded stay loaded."""

    def __init__(self, work: Work, name: str, seconds: float) -> None:
        context = multiprocessing.get_context("fork")
        self.name, self.seconds = name, seconds
        self.ends = time.monotonic() + seconds
        self.receiver, sender = context.Pipe(duplex=False)
        self._process = context.Process(target=_work, args=(work, name, sender))
        self._process.start()
        sender.close()

    def result(self) -> Found:
        """What it found, once the receiver is ready or its time is over; it is ended."""
        try:
            if not self.receiver.poll():
                return {"verdict": "not run", "why": f"stopped after {self.seconds:g} s"}
            found: Found = self.receiver.recv()
            return found
        except EOFError:
            self._process.join()
            return {"verdict": "not run", "why": f"the process died with code {self.code}"}
        finally:
            self.end()

    @property
    def code(self) -> int | None:
        """The exit code."""
        return self._process.exitcode

    def end(self) -> None:
        """End it, if it still runs."""
        self._process.kill()
        self._process.join()
        self.receiver.close()


def in_forks(
    work: Work, names: Iterable[str], *, jobs: int = 1, seconds: float = 120
) -> Iterator[tuple[str, Found]]:
    """Names, each with what a function returns for it in a process of its own, as they end.

    ``{"verdict": "not run", "why": ...}`` stands for one that fails, dies, or takes too long.

    Args:
        work: The function.
        names: In this order.
        jobs: How many at a time.
        seconds: For each.
    """
    waiting, running = iter(names), list[_Fork]()
    try:
        while True:
            running += [_Fork(work, name, seconds) for name in islice(waiting, jobs - len(running))]
            if not running:
                return
            left = min(fork.ends for fork in running) - time.monotonic()
            ready = wait([fork.receiver for fork in running], max(0.0, left))
            for fork in list(running):
                if fork.receiver in ready or fork.ends <= time.monotonic():
                    running.remove(fork)
                    yield fork.name, fork.result()
    finally:
        for fork in running:
            fork.end()


def in_fork(work: Work, name: str, *, seconds: float = 120) -> Found:
    """`in_forks` of one name."""
    ((_, found),) = in_forks(work, [name], seconds=seconds)
    return found


def _work(work: Callable[[str], dict[str, Any]], name: str, sender: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    try:
        sender.send(work(name))
    except BaseException as error:
        sender.send({"verdict": "not run", "why": short(error)})


def short(error: BaseException) -> str:
    """An error on a line, without the folders of this machine."""
    text = re.sub(r"\s+", " ", str(error)).replace("make_trainer failed: ", "")
    return re.sub(r"\(/[^ ]*/([\w.]+:\d+)\)", r"(\1)", text)[:240]
