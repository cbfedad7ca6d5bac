"""Watches over the ranks of a run, so that one that dies or hangs is named and ends it in time.

Every rank posts a sign of life each second, with where it is, into a store that all can read. A
rank that has stood still for too long looks at the others' signs, names the rank that is to blame,
and ends its own process; the launcher then ends the rest.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from torch import distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from samestep.engine import collectives
from samestep.engine.collectives import rank, world_size
from samestep.errors import RankError
from samestep.train.group import under_torchrun

EXIT = 3
"""The exit code of a rank that gives up on another; the command line's for `RankError`."""

PULSE = 1.0
"""Seconds between signs of life."""

SILENT = 3.5
"""Seconds without a sign of life after which a rank is dead, or stopped."""

Sign: TypeAlias = dict[str, Any]
"""A sign of life: its number, where the rank is in words, and whether it works or waits."""

COMMUNICATION = (str(Path(dist.__file__).parent), str(Path(collectives.__file__)))
"""The source of what waits for other ranks."""


class Watch:
    """This rank's signs of life, and its look at those of the others.

    Args:
        patience: Seconds without progress after which this rank gives up.
        store: Where the ranks of the run can read each other's signs; None for one rank.
    """

    def __init__(self, patience: float, store: Store | None) -> None:
        self._patience = patience
        self._store = store
        self._sign: Sign = {"number": 0, "at": "the start", "works": False}
        self._moved = time.monotonic()
        self._hurried = True
        self._over = threading.Event()
        self._main = threading.get_ident()

    def moves(self, at: str, *, hurried: bool = True) -> None:
        """This rank begins something.

        Args:
            at: What, in words.
            hurried: Whether it must be over before the patience ends; saving to a slow disk need
                not.
        """
        self._sign = self._sign | {"at": at}
        self._moved, self._hurried = time.monotonic(), hurried

    def run(self) -> None:
        """Post signs of life until the end; end the process if nothing moves for too long."""
        while not self._over.wait(PULSE):
            self._post()
            if self._hurried and time.monotonic() - self._moved > self._patience:
                self._give_up()

    def stop(self) -> None:
        """No more signs."""
        self._over.set()

    def who(self) -> str:
        """Which rank is to blame, after a few seconds of listening."""
        before = self._signs()
        deadline = time.monotonic() + SILENT
        while time.monotonic() < deadline:
            time.sleep(PULSE / 2)
            self._post()
        return blame(before, self._signs())

    def _give_up(self) -> None:
        text = f"nothing has moved for {self._patience:g} s: {self.who()}"
        print(f"samestep: rank {rank()}: {text}. --resume continues", file=sys.stderr, flush=True)
        os._exit(EXIT)

    def _post(self) -> None:
        works = not _waits_for_others(self._main)
        self._sign = self._sign | {"number": self._sign["number"] + 1, "works": works}
        assert self._store is not None
        self._store.set(f"sign {rank()}", json.dumps(self._sign))

    def _signs(self) -> list[Sign | None]:
        assert self._store is not None
        names = [f"sign {number}" for number in range(world_size())]
        return [
            json.loads(self._store.get(name)) if self._store.check([name]) else None
            for name in names
        ]


def blame(before: list[Sign | None], now: list[Sign | None]) -> str:
    """Which rank holds the others up, told by their signs of life at two times.

    Args:
        before: The signs of all ranks; None of one that has given none yet.
        now: Their signs some seconds later.

    Returns:
        A sentence that names the ranks.
    """
    silent = [
        number
        for number, (one, other) in enumerate(zip(before, now, strict=True))
        if other is None or (one is not None and one["number"] == other["number"])
    ]
    if silent:
        return f"{_names(silent)} died or was stopped{_last_seen(now, silent)}"
    working = [number for number, sign in enumerate(now) if sign is not None and sign["works"]]
    if not working:
        return f"every rank waits for the others{_last_seen(now, list(range(len(now))))}"
    return f"{_names(working)} hangs{_last_seen(now, working)}"


def _names(numbers: list[int]) -> str:
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _last_seen(signs: list[Sign | None], numbers: list[int]) -> str:
    places = {sign["at"] for sign in (signs[number] for number in numbers) if sign is not None}
    return f" (last seen at {' and '.join(sorted(places))})" if places else ""


@contextmanager
def watched(patience: float) -> Iterator[Watch]:
    """A watch over the ranks of this run, while the block runs.

    Args:
        patience: As for `Watch`.

    Yields:
        The watch. On a single rank it watches nothing.

    Raises:
        RankError: The block failed in a way that shows that another rank is gone; names it.
    """
    if world_size() == 1:
        yield Watch(patience, None)  # it is never run
        return
    watch = Watch(patience, _store())
    thread = threading.Thread(target=watch.run, name="samestep watch", daemon=True)
    thread.start()
    try:
        yield watch
    except RuntimeError as error:
        if not _is_of_communication(error):
            raise
        raise RankError(f"{watch.who()}. --resume continues, on fewer ranks too") from error
    finally:
        watch.stop()


def _store() -> Store:
    """A connection of our own to the store of the ranks: the group's own may be busy."""
    if under_torchrun():
        store, *_ = next(iter(rendezvous("env://", rank(), world_size())))
    else:  # a group that was started in another way
        store = distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
    return PrefixStore(f"samestep {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _waits_for_others(thread: int) -> bool:
    """Whether a thread is inside of a collective, told by the innermost functions it has called."""
    frame, depth = sys._current_frames().get(thread), 0
    while frame is not None and depth < 8:
        if frame.f_code.co_filename.startswith(COMMUNICATION):
            return True
        frame, depth = frame.f_back, depth + 1
    return False


def _is_of_communication(error: RuntimeError) -> bool:
    if isinstance(error, dist.DistError):
        return True
    return any(sign in str(error) for sign in ("gloo", "Connection closed by peer", "NCCL"))
