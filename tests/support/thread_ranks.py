"""Ranks as threads of one process: cheap enough to draw hundreds of worlds.

Their collectives are those of `torch.distributed` that samestep calls, each a meeting of all
threads. Sums of floats are added up in a drawn order, so that a sum that depends on it shows.
"""

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import distributed as dist


class Threads:
    """A world of ``number`` ranks."""

    def __init__(self, number: int, *, seed: int = 0) -> None:
        self.number = number
        self._draw = random.Random(seed)
        self._local = threading.local()
        self._barrier = threading.Barrier(number)
        self._given: list[Any] = [None] * number
        self._found: Any = None

    def rank(self) -> int:
        return int(getattr(self._local, "rank", 0))

    def _meet(self, value: Any, combine: Callable[[list[Any]], Any]) -> Any:
        self._given[self.rank()] = value
        if self._barrier.wait() == 0:
            self._found = combine(self._given)
        self._barrier.wait()
        return self._found

    def all_reduce(self, tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> None:
        def combine(tensors: list[torch.Tensor]) -> torch.Tensor:
            order = self._draw.sample(range(self.number), self.number)
            total = tensors[order[0]].clone()
            for at in order[1:]:
                total = torch.maximum(total, tensors[at]) if is_max else total + tensors[at]
            return total

        is_max = op == dist.ReduceOp.MAX
        tensor.copy_(self._meet(tensor, combine))
        self._barrier.wait()

    def all_gather(self, gathered: list[torch.Tensor], tensor: torch.Tensor) -> None:
        found = self._meet(tensor, lambda tensors: [each.clone() for each in tensors])
        for into, each in zip(gathered, found, strict=True):
            into.copy_(each)
        self._barrier.wait()

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """The results of ``work(rank)`` in the order of the ranks; an error of any is raised."""
        results: list[Any] = [None] * self.number
        errors: list[BaseException] = []

        def target(rank: int) -> None:
            self._local.rank = rank
            try:
                results[rank] = work(rank)
            except BaseException as error:
                errors.append(error)
                self._barrier.abort()

        threads = [threading.Thread(target=target, args=(rank,)) for rank in range(self.number)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        own = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
        if errors:
            raise (own or errors)[0]
        return results


@contextmanager
def thread_ranks(number: int, *, seed: int = 0) -> Iterator[Threads]:
    """A world of threads in the place of the process group."""
    world = Threads(number, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "is_initialized", lambda: True)
        patch.setattr(dist, "get_world_size", lambda *_: number)
        patch.setattr(dist, "get_rank", lambda *_: world.rank())
        patch.setattr(dist, "get_backend_config", lambda *_: "cpu:gloo")
        patch.setattr(dist, "all_reduce", world.all_reduce)
        patch.setattr(dist, "all_gather", world.all_gather)
        yield world
