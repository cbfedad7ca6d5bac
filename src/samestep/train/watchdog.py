"""What ends a run from outside: a signal, or a rank that dies or hangs.

SIGINT and SIGTERM end a run between two micro-batches, not inside one.

Every rank posts a heartbeat each second, with where it is, into a store that all can read. A rank
that has made no progress for too long looks at the heartbeats of the others, names the rank that
is to blame, and ends its own process; the launcher then ends the rest.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias

from torch import distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from samestep.engine import collectives
from samestep.engine.collectives import rank, world_size
from samestep.errors import Interrupted, RankError
from samestep.train.launch import under_torchrun

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_EXIT = 3
"""The exit code of a rank that gives up on another; the command line's for `RankError`."""

_INTERVAL = 1.0
"""Seconds between heartbeats."""

_SILENCE = 3.5
"""Seconds without a heartbeat after which a rank is dead, or stopped."""

Heartbeat: TypeAlias = dict[str, Any]
"""Its number, where the rank is in words ("at"), and whether it works or waits for others."""

_COMMUNICATION = (str(Path(dist.__file__).parent), str(Path(collectives.__file__)))
"""The source of what waits for other ranks."""


@contextmanager
def interruptible(announce: Callable[[str], None]) -> Iterator[Callable[[], int]]:
    """Let the loop ask between micro-batches whether SIGINT or SIGTERM came, instead of raising.

    Args:
        announce: Called with one line when the signal comes.

    Yields:
        A function that gives the number of the signal that came, or 0. A second signal raises
        `Interrupted` at once.
    """
    received = 0

    def receive(number: int, _: FrameType | None) -> None:
        nonlocal received
        if received:
            raise Interrupted(number)
        received = number
        name = signal.Signals(number).name
        announce(f"{name}: stopping after this micro-batch, then saving; again stops at once")

    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0  # signals reach the main thread only
        return
    before = {number: signal.signal(number, receive) for number in _SIGNALS}
    try:
        yield lambda: received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Watchdog:
    """Posts the heartbeats of this rank, and looks at those of the others.

    Args:
        timeout: Seconds without progress after which this rank gives up.
        store: Where the ranks of the run can read each other's heartbeats; None for one rank.
    """

    def __init__(self, timeout: float, store: Store | None) -> None:
        self._timeout = timeout
        self._store = store
        self._last: Heartbeat = {"number": 0, "at": "the start", "works": False}
        self._progressed = time.monotonic()
        self._timed = True
        self._over = threading.Event()
        self._main = threading.get_ident()

    def heartbeat(self, at: str, *, timed: bool = True) -> None:
        """Note that this rank begins something.

        Args:
            at: What, in words.
            timed: Whether it must end within the timeout; saving to a slow disk need not.
        """
        self._last = self._last | {"at": at}
        self._progressed, self._timed = time.monotonic(), timed

    def run(self) -> None:
        """Post heartbeats until the end; end the process if there is no progress for too long."""
        while not self._over.wait(_INTERVAL):
            self._post()
            if self._timed and time.monotonic() - self._progressed > self._timeout:
                self._give_up()

    def stop(self) -> None:
        """Post no more heartbeats."""
        self._over.set()

    def find_culprit(self) -> str:
        """Which rank is to blame, after a few seconds of listening."""
        before = self._heartbeats()
        deadline = time.monotonic() + _SILENCE
        while time.monotonic() < deadline:
            time.sleep(_INTERVAL / 2)
            self._post()
        return blame(before, self._heartbeats())

    def _give_up(self) -> None:
        text = f"nothing has moved for {self._timeout:g} s: {self.find_culprit()}"
        print(f"samestep: rank {rank()}: {text}. --resume continues", file=sys.stderr, flush=True)
        os._exit(_EXIT)

    def _post(self) -> None:
        works = not _waits_for_others(self._main)
        self._last = self._last | {"number": self._last["number"] + 1, "works": works}
        assert self._store is not None
        self._store.set(f"heartbeat {rank()}", json.dumps(self._last))

    def _heartbeats(self) -> list[Heartbeat | None]:
        assert self._store is not None
        names = [f"heartbeat {number}" for number in range(world_size())]
        return [
            json.loads(self._store.get(name)) if self._store.check([name]) else None
            for name in names
        ]


def blame(before: list[Heartbeat | None], now: list[Heartbeat | None]) -> str:
    """Which rank holds the others up, inferred from their heartbeats at two times.

    Args:
        before: The last heartbeats of all ranks; None of one that has posted none yet.
        now: The last ones some seconds later.

    Returns:
        A sentence that names the ranks.
    """
    silent = [
        number
        for number, (earlier, later) in enumerate(zip(before, now, strict=True))
        if later is None or (earlier is not None and earlier["number"] == later["number"])
    ]
    if silent:
        return f"{_names(silent)} died or was stopped{_last_seen(now, silent)}"
    working = [number for number, beat in enumerate(now) if beat is not None and beat["works"]]
    if not working:
        return f"every rank waits for the others{_last_seen(now, list(range(len(now))))}"
    return f"{_names(working)} hangs{_last_seen(now, working)}"


def _names(numbers: list[int]) -> str:
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _last_seen(beats: list[Heartbeat | None], numbers: list[int]) -> str:
    places = {beat["at"] for beat in (beats[number] for number in numbers) if beat is not None}
    return f" (last seen at {' and '.join(sorted(places))})" if places else ""


@contextmanager
def watch_ranks(timeout: float) -> Iterator[Watchdog]:
    """Watch over the ranks of this run, while the block runs.

    Args:
        timeout: As for `Watchdog`.

    Yields:
        The watchdog. On a single rank it watches nothing.

    Raises:
        RankError: The block failed in a way that shows that another rank is gone; names it.
    """
    if world_size() == 1:
        yield Watchdog(timeout, None)  # it is never run
        return
    watchdog = Watchdog(timeout, _store())
    thread = threading.Thread(target=watchdog.run, name="samestep watchdog", daemon=True)
    thread.start()
    try:
        yield watchdog
    except RuntimeError as error:
        if not _is_of_communication(error):
            raise
        raise RankError(
            f"{watchdog.find_culprit()}. --resume continues, on fewer ranks too"
        ) from error
    finally:
        watchdog.stop()


def _store() -> Store:
    """A connection of our own to the store of the ranks: the group's own may be busy."""
    if under_torchrun():
        store, *_ = next(iter(rendezvous("env://", rank(), world_size())))
    else:  # a group that was started in another way
        store = distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
    return PrefixStore(f"samestep {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _waits_for_others(thread: int) -> bool:
    """Whether a thread is inside of a collective, by the innermost functions it has called."""
    frame, depth = sys._current_frames().get(thread), 0
    while frame is not None and depth < 8:
        if frame.f_code.co_filename.startswith(_COMMUNICATION):
            return True
        frame, depth = frame.f_back, depth + 1
    return False


def _is_of_communication(error: RuntimeError) -> bool:
    if isinstance(error, dist.DistError):
        return True
    return any(mark in str(error) for mark in ("gloo", "Connection closed by peer", "NCCL"))
