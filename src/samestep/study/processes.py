"""Runs in processes of their own, so that peak memory is each one's and a crash ends only one."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from samestep.errors import SamestepError, StepError
from samestep.study.arm import Job, run_arm
from samestep.study.cache import write_run


def run_jobs(
    jobs: Iterable[tuple[Job, Path]], *, parallel: int, done: Callable[[Job], None]
) -> None:
    """Run jobs, some at a time; each writes its result to the path beside it.

    After a failure the jobs that run are finished, and no other is started.

    Args:
        jobs: What to run, in order, and the file for each result.
        parallel: How many at a time.
        done: Called after each success.

    Raises:
        StepError: Some failed; says which and why.
    """
    context = _context()
    waiting = list(jobs)[::-1]
    running: dict[int, tuple[Any, Job, Path]] = {}
    failures: list[str] = []
    try:
        while running or (waiting and not failures):
            while waiting and not failures and len(running) < parallel:
                job, path = waiting.pop()
                process = context.Process(target=_work, args=(job, path, parallel), daemon=True)
                process.start()
                running[process.sentinel] = (process, job, path)
            ended = set(wait(list(running)))
            for sentinel in [one for one in running if one in ended]:
                process, job, path = running.pop(sentinel)
                process.join()
                if process.exitcode == 0:
                    done(job)
                else:
                    failures.append(_failure(process.exitcode, path))
    finally:
        for process, _, _ in running.values():
            process.terminate()
    if failures:
        raise StepError("a run failed (finished ones are kept): " + "; ".join(failures))


def threads_a_run(parallel: int) -> int:
    """Threads of each run: $OMP_NUM_THREADS, or the cores shared out among those at a time."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() else max(1, (os.cpu_count() or 1) // parallel)


def _context() -> Any:
    """Children of a server that has imported everything: they start at once, without threads."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _work(job: Job, path: Path, parallel: int) -> None:
    # The parent ends its children itself; a Ctrl-C must not print a traceback from each.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(threads_a_run(parallel))
    try:
        write_run(path, run_arm(job))
    except SamestepError as error:
        _error_file(path).write_text(str(error), encoding="utf-8")
        raise SystemExit(1) from None


def _failure(code: int, path: Path) -> str:
    file = _error_file(path)
    if code == 1 and file.exists():
        message = file.read_text(encoding="utf-8")
        file.unlink()
        return message
    if code < 0:
        return f"killed by signal {-code}" + (" (out of memory?)" if code == -9 else "")
    return f"it ended with code {code}; its traceback is above"


def _error_file(path: Path) -> Path:
    return path.with_suffix(".error")
