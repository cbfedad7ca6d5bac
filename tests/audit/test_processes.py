"""Ranks meet, give their results back, and are always ended."""

import os
import time
from pathlib import Path

import pytest
import torch
from torch import distributed

from samestep.audit.adapters.processes import run_on_ranks, single_process_group
from samestep.errors import CheckError, DeadlockError


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def pids(folder: Path) -> list[int]:
    return [int(file.name) for file in folder.iterdir()]


def test_ranks_work_together() -> None:
    def work(rank: int) -> float:
        total = torch.tensor(float(rank + 1))
        distributed.all_reduce(total)
        return float(total)

    assert run_on_ranks(work, 2, seconds=30) == [3.0, 3.0]
    assert not distributed.is_initialized()


def test_a_hang_is_ended(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        (tmp_path / str(os.getpid())).touch()
        if rank == 0:
            distributed.all_reduce(torch.zeros(()))
        time.sleep(60)

    with pytest.raises(DeadlockError, match="2 ranks did not finish within 2 s"):
        run_on_ranks(work, 2, seconds=2)
    assert all(gone(pid) for pid in pids(tmp_path))


def test_an_error_is_shown_and_the_other_rank_ended(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        (tmp_path / str(os.getpid())).touch()
        if rank == 1:
            raise ValueError("no such layer")
        distributed.all_reduce(torch.zeros(()))

    with pytest.raises(CheckError, match=r"rank 1 of 2: ValueError: no such layer"):
        run_on_ranks(work, 2, seconds=30)
    assert all(gone(pid) for pid in pids(tmp_path))


def test_a_crash_is_reported(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        if rank == 0:
            os._exit(7)
        time.sleep(300)

    # Long enough for ranks to meet on a busy machine: a crash is noticed at once, not in the end.
    started = time.monotonic()
    with pytest.raises(CheckError, match="rank 0 of 2: ended with 7"):
        run_on_ranks(work, 2, seconds=300)
    assert time.monotonic() - started < 250


def test_an_interrupt_ends_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from samestep.audit.adapters import processes

    def interrupted(*_: object, **__: object) -> None:
        while len(pids(tmp_path)) < 2:
            time.sleep(0.01)
        raise KeyboardInterrupt

    def work(rank: int) -> None:
        (tmp_path / str(os.getpid())).touch()
        time.sleep(60)

    monkeypatch.setattr(processes, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_on_ranks(work, 2, seconds=30)
    assert all(gone(pid) for pid in pids(tmp_path))


def test_a_process_alone_is_a_group_of_one() -> None:
    with single_process_group():
        assert distributed.get_world_size() == 1
        with single_process_group():
            assert distributed.is_initialized()
        assert distributed.is_initialized()
    assert not distributed.is_initialized()
