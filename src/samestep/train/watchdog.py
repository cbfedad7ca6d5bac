"""What ends a run from outside: a rank that dies or hangs, or a launcher that is gone.

Every rank posts a heartbeat each second, with where it is, into a store that all can read. What a
rank does belongs to a phase, which has a limit. A rank that has seen nothing move for longer looks
at the heartbeats of the others, names the rank that is to blame (`samestep.train.blame`), and ends
its own process; the launcher then ends the rest. A rank whose launcher was killed ends by itself.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from torch import distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from samestep.engine.collectives import rank, world_size
from samestep.errors import CheckpointError, RankError
from samestep.train.blame import Heartbeat, blame, innermost_frame, line_of, waits_for_others
from samestep.train.launch import launched, store_is_of_launcher, under_torchrun
from samestep.utils.text import printable
from samestep.utils.waiting import work_under_way

LIMITS = {
    "loading": 6.0,
    "micro-batch": 1.0,
    "generation": 1.0,
    "log": 1.0,
    "evaluation": 1.0,
    "saving": 3.0,
    "export": 3.0,
}
"""How long a phase may go on without a move, in ``rank_timeout``: what reads or writes whole models
takes longer than a micro-batch."""

_EXIT = 3
"""The exit code of a rank that gives up on another; the command line's for `RankError`."""

_INTERVAL = 1.0
"""Seconds between heartbeats."""

_SILENCE = 3.5
"""Seconds without a heartbeat after which a rank is dead, or stopped."""

_VERDICT = "verdict"
"""Where the store holds what the first rank that gave up has found."""

Item = TypeVar("Item")


class Watchdog:
    """Posts the heartbeats of this rank, and looks at those of the others.

    Args:
        timeout: Seconds without a move after which a rank gives up, times its phase's `LIMITS`.
        store: Where the ranks of the run can read each other's heartbeats; None for one rank.
    """

    def __init__(self, timeout: float, store: Store | None) -> None:
        self._timeout = timeout
        self._store = store
        self._last: Heartbeat = {"number": 0, "moves": 0, "works": False}  # of the watching thread
        self._phase, self._at, self._moves = "loading", "the start", 0  # of the main thread
        self._moved_at = time.monotonic()
        self._seen: Any = None
        self._over = threading.Event()
        self._main, self._parent = threading.get_ident(), os.getppid()

    def begin(self, phase: str, at: str) -> None:
        """Note that this rank begins something.

        Args:
            phase: Of `LIMITS`.
            at: What, in words.
        """
        assert phase in LIMITS
        self._phase, self._at = phase, at
        self._moves += 1

    def each(self, items: Iterable[Item], phase: str, at: str) -> Iterator[Item]:
        """Items that are made one by one, the making of each noted.

        Args:
            items: What is made.
            phase: Of `LIMITS`.
            at: What is made, in words; the number of the item follows.

        Yields:
            The items.
        """
        maker, number = iter(items), 1
        self.begin(phase, f"{at} {number}")
        for item in maker:
            yield item
            number += 1
            self.begin(phase, f"{at} {number}")

    def run(self) -> None:
        """Post heartbeats until the end; end the process if nothing moves for too long."""
        while not self._over.wait(_INTERVAL):
            if launched() and os.getppid() != self._parent:
                self._end("the launcher is gone: this rank ends too")
            if self._store is None:
                continue
            try:
                self._post()
                self._obey_verdict()
                self._check()
            except (RuntimeError, dist.DistError):
                if not self._over.wait(2 * _INTERVAL):  # the run may just have ended
                    self._end(self._store_lost())

    def stop(self) -> None:
        """Post no more heartbeats."""
        self._over.set()
        if self._store is not None:
            faulthandler.cancel_dump_traceback_later()

    def find_culprit(self) -> str:
        """Which rank is to blame, after a few seconds of listening."""
        try:
            before = self._heartbeats()
            deadline = time.monotonic() + _SILENCE
            while time.monotonic() < deadline:
                time.sleep(_INTERVAL / 2)
                self._post()
            return blame(before, self._heartbeats())
        except (RuntimeError, dist.DistError):
            return self._store_lost()

    def _check(self) -> None:
        """Give up if neither this rank nor, where it waits, another one has moved for too long."""
        limit = LIMITS[self._phase] * self._timeout
        if sys.__stderr__ is not None:
            # In case that the main thread never lets another one of Python's run again.
            with suppress(OSError, ValueError, OverflowError):
                later = limit + 4 * _SILENCE
                faulthandler.dump_traceback_later(later, exit=True, file=sys.__stderr__)
        moves: Any = self._last["moves"]
        if not self._last["works"]:
            moves = [beat["moves"] if beat else 0 for beat in self._heartbeats()]
        if moves != self._seen:
            self._seen, self._moved_at = moves, time.monotonic()
        if time.monotonic() - self._moved_at > limit:
            culprit = self.find_culprit()
            self._obey_verdict()
            text = f"{self._phase}: nothing has moved for {limit:g} s: {culprit}"
            assert self._store is not None
            self._store.set(_VERDICT, text)
            self._end(text, linger=rank() == 0 and not store_is_of_launcher())

    def _obey_verdict(self) -> None:
        """End with what another rank has found: the first to find the culprit speaks for all."""
        assert self._store is not None
        if self._store.check([_VERDICT]):
            self._end(self._store.get(_VERDICT).decode("utf-8", "replace"))

    def _end(self, text: str, *, linger: bool = False) -> None:
        line = printable(f"samestep: rank {rank()}: {text}. --resume continues")
        print(line, file=sys.stderr, flush=True)
        if linger:  # the store ends with this process: the others read in it who is to blame
            time.sleep(2.5 * _INTERVAL)
        os._exit(_EXIT)

    def _post(self) -> None:
        frame = innermost_frame(self._main)
        works = not waits_for_others(frame)
        moved, label = work_under_way()
        self._last = {
            "number": self._last["number"] + 1,
            "at": self._at,
            "moves": self._moves + moved,
            "works": works,
            "line": ", ".join(filter(None, [label, line_of(frame)])) if works else "",
        }
        assert self._store is not None
        self._store.set(f"heartbeat {rank()}", json.dumps(self._last))

    def _heartbeats(self) -> list[Heartbeat | None]:
        assert self._store is not None
        names = [f"heartbeat {number}" for number in range(world_size())]
        return [
            json.loads(self._store.get(name)) if self._store.check([name]) else None
            for name in names
        ]

    def _store_lost(self) -> str:
        """Who is gone if the store does not answer: it lies in a process of the run."""
        if store_is_of_launcher():
            return "the launcher is gone: this rank ends too"
        return f"rank 0 died or was stopped (last seen before {self._at} on this rank)"


@contextmanager
def watch_ranks(timeout: float) -> Iterator[Watchdog]:
    """Watch over the ranks of this run, and over their launcher, while the block runs.

    Args:
        timeout: As for `Watchdog`.

    Yields:
        The watchdog. On a single rank it watches the launcher alone, if there is one.

    Raises:
        RankError: The block failed in a way that shows that another rank is gone; names it.
    """
    several = world_size() > 1
    watchdog = Watchdog(timeout, _store() if several else None)
    if several or launched():
        threading.Thread(target=watchdog.run, name="samestep watchdog", daemon=True).start()
    try:
        yield watchdog
    except (RuntimeError, CheckpointError) as error:
        if not several or not _is_of_communication(error):
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


def _is_of_communication(error: RuntimeError | CheckpointError) -> bool:
    if isinstance(error, dist.DistError):
        return True
    lost = ("Connection closed by peer", "Connection reset by peer")
    if isinstance(error, CheckpointError):  # PyTorch's writer wraps what is raised inside of it
        return any(mark in str(error) for mark in lost)
    return any(mark in str(error) for mark in (*lost, "gloo", "NCCL"))
