"""Making the next step's micro-batches while this step runs, on one thread in the background.

What is made is a function of the data, the step and the budget alone, so making it early changes
nothing. The thread ends with the block that started it, however that ends: it looks between two
micro-batches whether it is wanted still.
"""

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

MicroBatch = dict[str, Any]

_KEPT = 2
"""How many steps there is work for: the next one is begun before this one's is taken."""


class Ahead:
    """Work begun for this step and the next, at most; in the block `running` there is a thread."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._begun: dict[Hashable, Future[list[MicroBatch]]] = {}
        self._over = threading.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Have a thread until the end of the block; what it has begun is then given up."""
        self._over.clear()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="samestep-ahead")
        try:
            yield
        finally:
            self._over.set()
            thread, self._thread, self._begun = self._thread, None, {}
            thread.shutdown(cancel_futures=True)

    def start(self, key: Hashable, parts: Sequence[Callable[[], MicroBatch]]) -> None:
        """Begin to make micro-batches; without effect outside of `running`.

        Args:
            key: What they depend on.
            parts: Makes each of them.
        """
        if self._thread is None:
            return
        for old in list(self._begun)[: 1 - _KEPT]:  # nobody asked for it in time
            self._begun.pop(old).cancel()
        self._begun[key] = self._thread.submit(self._make, parts)

    def take(self, key: Hashable) -> list[MicroBatch] | None:
        """What was begun for a key.

        Args:
            key: As for `start`.

        Returns:
            The micro-batches, once; None if they were not begun.

        Raises:
            Exception: What making them raised.
        """
        begun = self._begun.pop(key, None)
        return None if begun is None else begun.result()

    def _make(self, parts: Sequence[Callable[[], MicroBatch]]) -> list[MicroBatch]:
        made: list[MicroBatch] = []
        for part in parts:
            if self._over.is_set():
                break  # nobody waits for it
            made.append(part())
        return made


def pinned(micro: MicroBatch) -> MicroBatch:
    """A micro-batch in memory from which a GPU copies while the CPU goes on.

    Args:
        micro: On the CPU; ``example_ids`` stay, because only the CPU reads them.

    Returns:
        A new micro-batch; the same one where there is no CUDA.
    """
    if not torch.cuda.is_available():
        return micro

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return pinned(value)
        return value.pin_memory() if isinstance(value, Tensor) else value

    return {key: value if key == "example_ids" else moved(value) for key, value in micro.items()}
