"""Making micro-batches: those of the next step while this one runs, on a thread in the background.

What is made is a function of the data, the step and the records alone, so making it early changes
nothing. `Ahead` holds the only function that makes any: whoever asks gets what was begun, if that
very micro-batch was, and has it made otherwise. The thread ends with the block that started it,
however that ends, after the micro-batch that it is at.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor

from samestep.data.collate import map_tensors
from samestep.data.records import Records

MicroBatch: TypeAlias = dict[str, Any]

Collator: TypeAlias = Callable[[Records, Sequence[int], int], MicroBatch]
"""(data set, indices of its records, number of the step) to a micro-batch on the CPU; what is
random about a record depends on its row and the step."""

Request: TypeAlias = tuple[Records, tuple[int, ...], int]
"""What a `Collator` takes."""

_KEPT = 2
"""How many steps there is work for: the next one is begun before this one's is taken."""

_making = threading.Lock()
"""Held while a micro-batch is made: processors of images serve one thread at a time."""


class Ahead:
    """Makes micro-batches; in the block `running` those of the next step before they are asked for.

    Args:
        collate: Makes one.
        device: Where it will go.
    """

    def __init__(self, collate: Collator, device: torch.device) -> None:
        self._collate = collate
        self._device = device
        self._thread: ThreadPoolExecutor | None = None
        self._begun: list[dict[Request, Future[MicroBatch]]] = []  # by step, the oldest first

    @contextmanager
    def running(self) -> Iterator[None]:
        """Have a thread until the end of the block; what it has begun is then given up."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="samestep-ahead")
        try:
            yield
        finally:
            thread, self._thread, self._begun = self._thread, None, []
            thread.shutdown(cancel_futures=True)

    def begin(self, requests: Sequence[Request]) -> None:
        """Begin to make the micro-batches of a step; without effect outside of `running`.

        Args:
            requests: All of them, in the order in which they will be asked for.
        """
        if self._thread is None:
            return
        self.forget(keep=_KEPT - 1)
        self._begun.append(
            {request: self._thread.submit(self._made, request) for request in requests}
        )

    def forget(self, *, keep: int = 0) -> None:
        """Give up what was begun.

        Args:
            keep: Of how many steps, the latest, it is kept.
        """
        while len(self._begun) > keep:
            for future in self._begun.pop(0).values():
                future.cancel()

    def make(self, request: Request) -> MicroBatch:
        """A micro-batch, as it was begun, or made now.

        Args:
            request: Which.

        Returns:
            It, in memory from which the device copies; it is not kept.

        Raises:
            Exception: What making it raised.
        """
        for of_step in self._begun:
            if request in of_step:
                return of_step.pop(request).result()
        return self._made(request)

    def _made(self, request: Request) -> MicroBatch:
        with _making:
            return pinned(self._collate(*request), self._device)


def pinned(micro: MicroBatch, device: torch.device) -> MicroBatch:
    """A micro-batch in memory from which a GPU copies while the CPU goes on.

    Args:
        micro: On the CPU; ``example_ids`` stay, because only the CPU reads them.
        device: Where it will go.

    Returns:
        A new micro-batch; the same one for any other device than a GPU of CUDA.
    """
    if device.type != "cuda":
        return micro
    return map_tensors(micro, Tensor.pin_memory)
