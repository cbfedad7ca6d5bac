"""Ranks: processes that run a function together over gloo, and that are always ended."""

import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed
from torch.distributed import FileStore, HashStore  # type: ignore[attr-defined]

from samestep.errors import CheckError, DeadlockError

T = TypeVar("T")

PATIENCE = 10.0
"""Seconds that ranks may take, and 40 single runs more, before they count as hung."""


def rank_timeout(slowest: float) -> float:
    """The seconds that ranks may take where a single run takes up to ``slowest`` seconds."""
    return PATIENCE + 40 * slowest


def run_on_ranks(work: Callable[[int], T], world: int, *, seconds: float) -> list[T]:
    """Run a function once on each rank of a process group.

    The processes are forks of this one: what is loaded stays loaded, what they do to it is lost,
    and nothing needs to be picklable but the results. They meet in a file, so no port is taken.

    Args:
        work: Called with the rank.
        world: Number of ranks.
        seconds: After which all are ended.

    Returns:
        The results by rank.

    Raises:
        DeadlockError: They did not finish in time.
        CheckError: One failed or died (shows its error), or this platform cannot fork.
    """
    if "fork" not in multiprocessing.get_all_start_methods():
        raise CheckError("several ranks need a platform that can fork")
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        children = [
            context.Process(
                target=_rank,
                args=(work, rank),
                kwargs={"world": world, "folder": Path(folder), "seconds": seconds},
            )
            for rank in range(world)
        ]
        try:
            with warnings.catch_warnings():
                # A fork keeps no other thread; these children need none of the parent's.
                warnings.simplefilter("ignore", DeprecationWarning)
                for child in children:
                    child.start()
            _wait(children, Path(folder), seconds=seconds)
        finally:
            for child in children:
                if child.pid is not None:
                    child.kill()
                    child.join()
        return [pickle.loads(_result(Path(folder), rank).read_bytes()) for rank in range(world)]


def _result(folder: Path, rank: int) -> Path:
    return folder / f"result-{rank}"


def _error(folder: Path, rank: int) -> Path:
    return folder / f"error-{rank}"


def _wait(children: Sequence[Any], folder: Path, *, seconds: float) -> None:
    """Until all have ended well, or one badly."""
    end = time.monotonic() + seconds
    running = list(children)
    while running:
        left = end - time.monotonic()
        # A sentinel may come late, so the exit codes are looked at every second too.
        wait([child.sentinel for child in running], timeout=max(0.0, min(1.0, left)))
        if left <= 0 and all(child.exitcode is None for child in running):
            raise DeadlockError(f"{len(children)} ranks did not finish within {seconds:.0f} s")
        if any(child.exitcode for child in children):
            for child in children:
                child.join(timeout=0.5)
            raise CheckError(_first_failure(children, folder))
        running = [child for child in running if child.exitcode is None]


def _first_failure(children: Sequence[Any], folder: Path) -> str:
    """The error that came first: the other ranks then fail too, for they lost one of theirs."""
    world = len(children)
    for rank, child in enumerate(children):
        if child.exitcode and not _error(folder, rank).exists():
            return f"rank {rank} of {world}: ended with {child.exitcode}"
    errors = [rank for rank in range(world) if _error(folder, rank).exists()]
    first = min(errors, key=lambda rank: _error(folder, rank).stat().st_mtime_ns)
    return f"rank {first} of {world}: {_error(folder, first).read_text()}"


def _rank(
    work: Callable[[int], Any], rank: int, *, world: int, folder: Path, seconds: float
) -> None:
    """What a child does; never returns to the code that it was forked from."""
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        # The kernel ends this process even if its parent was killed and it is stuck.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds + 5)
        torch.set_num_threads(1)  # the parent's pool of threads did not survive the fork
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world)
        )
        # Else accelerate takes ranks without accelerators for processes that are alone.
        os.environ["ACCELERATE_USE_CPU"] = "true"
        forget_states(of_process=True)
        distributed.init_process_group(
            "gloo",
            store=FileStore(str(folder / "meeting"), world),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=seconds + 5),
        )
        result = pickle.dumps(work(rank))
        _result(folder, rank).write_bytes(result)
        distributed.barrier()  # nobody leaves while another still reads from it
        code = 0
    except BaseException as error:  # the subject's code: report it, then end
        last = traceback.extract_tb(error.__traceback__)[-1]
        _error(folder, rank).write_text(
            f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"
        )
    finally:
        os._exit(code)


def forget_states(*, of_process: bool = False) -> None:
    """Let accelerate forget what all trainers and loops of a process share, and outlives each.

    Args:
        of_process: And find out again which process this is.
    """
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=of_process)
        state.GradientState._reset_state()


_recent_groups: deque[Any] = deque(maxlen=2)
"""Kept so that each group is freed a run later, when its threads are idle.

A group joins its threads when it is freed, with Python's lock held. A thread that is just about to
free a tensor of the last collective waits for that lock, and both would wait for ever.
"""


@contextmanager
def single_process_group() -> Iterator[None]:
    """A process group of this process alone, unless there is one already."""
    if not distributed.is_available() or distributed.is_initialized():
        yield
        return
    distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    _recent_groups.append(distributed.group.WORLD)
    try:
        yield
    finally:
        distributed.destroy_process_group()
