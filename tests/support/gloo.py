"""Real processes with a gloo group between them, kept for the whole session: starting is slow."""

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

from command_line import PRELOAD

PATIENCE = 100
"""Seconds after which ranks that have not answered are killed."""


class Ranks:
    """``number`` processes that run what they are sent, all at the same time."""

    def __init__(self, number: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self._store = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(number):
            mine, theirs = context.Pipe()
            arguments = (theirs, rank, number, f"{self._store.name}/store")
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)

    def run(self, *call: Any) -> list[tuple[str, Any]]:
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps(call))
        return [_answer(pipe) for pipe in self._pipes]

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._store.cleanup()


_started: dict[int, Ranks] = {}


def on_ranks(number: int, work: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:
    """The results of ``work(*arguments, **options)`` on each rank.

    An error on any of them fails the test, and the next one gets new processes.
    """
    if number not in _started:
        _started[number] = Ranks(number)
    answers = _started[number].run(work, arguments, options)
    failed = [result for kind, result in answers if kind == "error"]
    if failed:
        _started.pop(number).kill()
    assert not failed, "\n".join(failed)
    return [result for _, result in answers]


def _answer(pipe: Connection) -> tuple[str, Any]:
    if not pipe.poll(PATIENCE):
        return "error", f"no answer in {PATIENCE} s"
    try:
        answer: tuple[str, Any] = pickle.loads(pipe.recv_bytes())
    except EOFError:
        return "error", "the process died"
    return answer


def _serve(pipe: Connection, rank: int, number: int, store: str) -> None:
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(number), "LOCAL_RANK": str(rank)}
    distributed.init_process_group(
        "gloo",
        store=distributed.FileStore(store, number),
        rank=rank,
        world_size=number,
        timeout=timedelta(seconds=60),
    )
    while True:
        try:
            work, arguments, options = pickle.loads(pipe.recv_bytes())
        except EOFError:
            os._exit(0)
        try:
            answer: tuple[str, Any] = "result", work(*arguments, **options)
        except BaseException:
            answer = "error", f"rank {rank}: {traceback.format_exc()}"
        # By value: pipe.send would share the memory of tensors with a process that may end first.
        pipe.send_bytes(pickle.dumps(answer))
