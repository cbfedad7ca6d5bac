"""Copies between a GPU and the CPU's memory, on a stream of their own beside the computation."""

from collections import deque
from typing import Any

import torch
from torch import Tensor


class CopyStream:
    """Sends tensors of a GPU to pinned memory, and fetches them again, while others are computed.

    A tensor that leaves is held until the computation has been told to wait for its copy: its
    memory is not given to anything else before. How many bytes are held so is bounded, so a bus
    that is slower than the forward slows it down instead of filling the GPU.

    Args:
        device: The GPU.
        held: Bytes of tensors that are on their way out at a time.
        cuda: What it uses of `torch.cuda`; tests give a recorder.
        pin: Whether copies are in memory that a GPU can copy to by itself; not in tests on CPUs.
    """

    def __init__(
        self, device: torch.device, *, held: int, cuda: Any = torch.cuda, pin: bool = True
    ) -> None:
        self._device, self._held, self._cuda, self._pin = device, held, cuda, pin
        self._stream = cuda.Stream(device)
        self._leaving: deque[tuple[Tensor, Any]] = deque()

    def send(self, tensor: Tensor) -> Tensor:
        """Begin to copy a tensor to the CPU.

        Args:
            tensor: Of the GPU; nothing may write to it any more.

        Returns:
            The copy, in pinned memory, laid out as the tensor is: what comes back takes the same
            kernels in the backward, and no copy in between. Only `fetch` may read it.
        """
        self._stream.wait_stream(self._computation())  # which may not have written it yet
        with self._cuda.stream(self._stream):
            copy = torch.empty_like(tensor, device="cpu", pin_memory=self._pin)
            copy.copy_(tensor, non_blocking=True)
            self._leaving.append((tensor, self._stream.record_event()))
        self._release(self._held)
        return copy

    def finish_sending(self) -> None:
        """Let go of all that was sent; what is computed from here on waits for the copies."""
        self._release(0)

    def _release(self, held: int) -> None:
        while sum(tensor.nbytes for tensor, _ in self._leaving) > held:
            tensor, copied = self._leaving.popleft()
            self._computation().wait_event(copied)
            del tensor  # its memory may be used again, after that wait

    def fetch(self, copy: Tensor) -> "Fetched":
        """Begin to bring a copy back; it arrives after all copies that were begun before.

        Args:
            copy: Of `send`.

        Returns:
            The tensor under way.
        """
        computation = self._computation()
        tensor = torch.empty_like(copy, device=self._device, pin_memory=False)
        self._stream.wait_stream(computation)  # which may still use this memory
        with self._cuda.stream(self._stream):
            tensor.copy_(copy, non_blocking=True)
            arrived = self._stream.record_event()
        return Fetched(tensor, arrived, computation)

    def receive(self, fetched: "Fetched") -> Tensor:
        """A tensor that was fetched; what is computed from here on waits until it has arrived."""
        return fetched.on(self._computation())

    def _computation(self) -> Any:
        return self._cuda.current_stream(self._device)


class Fetched:
    """A tensor on its way to the GPU.

    Its memory is used again in the order of the computation, which waits for the copy in any case:
    where the tensor is received, or where it is dropped unread. (`Tensor.record_stream` would keep
    the memory until the GPU has got there: a CPU that runs ahead would take new memory each time,
    up to all that was offloaded.)

    Args:
        tensor: What is copied to.
        arrived: The event after the copy.
        computation: The stream that the memory belongs to.
    """

    def __init__(self, tensor: Tensor, arrived: Any, computation: Any) -> None:
        self.tensor, self._arrived, self._computation = tensor, arrived, computation
        self._waited = False

    def on(self, stream: Any) -> Tensor:
        """The tensor, once a stream waits for it."""
        stream.wait_event(self._arrived)
        self._waited = True
        return self.tensor

    def __del__(self) -> None:
        """Wait where nobody has: whatever gets the memory next must not be overwritten."""
        if not self._waited:
            self._computation.wait_event(self._arrived)
