"""Runs on two ranks in which one rank hangs in a chosen place, started without a launcher."""

import importlib
import multiprocessing
import os
import re
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from command_line import PRELOAD
from runs import run_config

LOSS = """
import os, time
import torch
from samestep import CausalLMLoss

real, calls = CausalLMLoss(), []


def slow_loss(model, micro):
    calls.append(1)
    if len(calls) > 6 and os.environ["RANK"] == "1":
        time.sleep(600)
    return real(model, micro)
"""
"""A loss of a user's own that hangs on rank 1 in its seventh micro-batch."""


def _sleep(real: Callable[..., Any], *, rank: int, after: int = 0) -> Callable[..., Any]:
    """A function that hangs on one rank, once it was called so often."""
    calls: list[int] = []

    def hanging(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if os.environ["RANK"] == str(rank) and len(calls) > after:
            time.sleep(600)
        return real(*arguments, **options)

    return hanging


HOOKS = {
    "loading": ("samestep.train.trainer", "set_up", 0),
    "resuming": ("samestep.train.trainer", "first_progress", 0),
    "collating": ("samestep.train.micro_batches:MicroBatches", "_make", 6),
    "micro-batch": ("samestep.train.trainer", "key_dropout", 3),
    "evaluation": ("samestep.train.evaluator", "evaluate", 1),
    "log": ("samestep.train.log:RunLog", "step", 1),
    "saving": ("samestep.train.shards", "sync", 0),
    "after a save": ("samestep.train.trainer", "learning_rate", 3),
    "export": ("samestep.train.model_folder", "sync_tree", 0),
    "compiled code": ("samestep.train.trainer", "key_dropout", 0),
}
"""What hangs in a place: the module or class, its function, and how many calls go well."""


def hook(place: str) -> tuple[Any, str, int]:
    """The object whose function is to hang in a place, that function's name, and the good calls."""
    where, name, after = HOOKS[place]
    module, _, owner = where.partition(":")
    found = importlib.import_module(module)
    return (getattr(found, owner) if owner else found), name, after


def _plant(place: str, rank: int) -> None:
    owner, name, after = hook(place)

    def catastrophic(*_: Any, **__: Any) -> None:
        if os.environ["RANK"] == str(rank):
            re.match(r"(a+)+$", "a" * 60 + "b")

    real = getattr(owner, name)
    hanging = catastrophic if place == "compiled code" else _sleep(real, rank=rank, after=after)
    setattr(owner, name, hanging)


PLACES = {
    "loading": (0, 1),
    "resuming": (0, 1),
    "collating": (0, 1),
    "micro-batch": (0, 1),
    "evaluation": (0, 1),
    "log": (0,),
    "saving": (0, 1),
    "after a save": (0, 1),
    "export": (0,),
    "custom loss": (1,),
    "compiled code": (0, 1),
}
"""Where a rank may hang, and which ranks come there."""

SEEN_AT = {
    "loading": "loading",
    "resuming": "loading",
    "collating": "step 1, collating",
    "micro-batch": "step 2, micro-batch",
    "evaluation": "evaluation",
    "log": "step 2, writing the log",
    "saving": "saving step 2",
    "after a save": "step 3",
    "export": "saving the model",
    "custom loss": "evaluation, micro-batch 7",
}
"""What a rank that hangs must be said to be doing; compiled code lets it say nothing any more."""


def _rank(folder: str, name: str, place: str, victim: int, rank: int, port: int) -> None:
    """Run as one of two ranks; the file of its output says what it printed."""
    import torch

    from samestep.errors import SamestepError
    from samestep.train.trainer import train

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with (Path(folder) / f"{name}-{rank}.txt").open("w") as text:
        os.dup2(text.fileno(), 2)
    if place == "custom loss":
        changes: dict[str, Any] = {"objective": f"{folder}/loss.py:slow_loss"}
    else:
        changes = {}
        _plant(place, victim)
    settings = run_config(
        Path(folder),
        out=f"{folder}/{name}",
        steps=4,
        save_every=2,
        eval_data=f"{folder}/rows.jsonl",
        eval_every=2,
        micro_batch=2,
        rank_timeout=2.0,
        **changes,
    )
    code = 0
    try:
        train(settings)
    except SamestepError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        code = 3
    except BaseException as error:
        print(f"Traceback: {error!r}", file=sys.stderr, flush=True)
        code = 1
    os._exit(code)


class PlantedRun:
    """Two ranks of which one will hang."""

    def __init__(self, folder: Path, place: str, victim: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        (folder / "loss.py").write_text(LOSS, encoding="utf-8")
        self.folder, self.name = folder, f"{place}-{victim}".replace(" ", "-")
        self.started = time.monotonic()
        self.processes = [
            context.Process(target=_rank, args=(str(folder), self.name, place, victim, rank, port))
            for rank in range(2)
        ]
        for process in self.processes:
            process.start()

    def end(self, patience: float = 60) -> tuple[list[int | None], str]:
        """Wait for both: their exit codes (None of one that had to be killed), and their output."""
        end = self.started + patience
        for process in self.processes:
            process.join(max(0.1, end - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            if process.is_alive():
                process.kill()
        texts = [self.folder / f"{self.name}-{rank}.txt" for rank in range(2)]
        return codes, "\n".join(text.read_text() for text in texts if text.exists())
