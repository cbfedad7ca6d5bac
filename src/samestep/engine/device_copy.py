"""Micro-batches on a device that know the data on the CPU, where they can be counted at once.

How many targets there are is a value, and who reads a value from a GPU waits until all that was
given to it before is done. The data were on the CPU once: counts are taken there.
"""

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

_Entry: TypeAlias = tuple[tuple[str, ...], Any, int]
"""Where a value stands, it, and how often it was written to."""


class DeviceCopy(dict[str, Any]):
    """A micro-batch whose tensors are copies of others.

    What is made of it (``dict(micro_batch)``, ``{**micro_batch, ...}``, a copy) is a plain mapping.

    Args:
        copies: The micro-batch.
        data: What it is a copy of, on the CPU; None: it is not known, as of what libraries make of
            it by ``type(micro_batch)({...})``.

    Example:
        >>> import torch
        >>> data = {"labels": torch.tensor([[1, 2, -100]])}
        >>> micro_batch = DeviceCopy({"labels": data["labels"].to("meta")}, data)
        >>> data_of(micro_batch)["labels"].device
        device(type='cpu')
        >>> micro_batch["labels"] = torch.ones(1, 3, device="meta")  # no copy of the data any more
        >>> data_of(micro_batch)["labels"].device
        device(type='meta')
    """

    def __init__(self, copies: Mapping[str, Any], data: Mapping[str, Any] | None = None) -> None:
        super().__init__(copies)
        self._data = data
        self._entries = list(_entries(copies))

    def __copy__(self) -> dict[str, Any]:
        return dict(self)

    def data(self) -> Mapping[str, Any]:
        """What it is a copy of; itself if that is not known, or if it was changed since."""
        if self._data is None:
            return self
        now = list(_entries(self))
        unchanged = len(now) == len(self._entries) and all(
            path == path_then and value is value_then and writes == writes_then
            for (path, value, writes), (path_then, value_then, writes_then) in zip(
                now, self._entries, strict=True
            )
        )
        return self._data if unchanged else self


def copy_without_waiting(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy that may still be under way: what runs on the device afterwards finds it there.

    From memory that is not pinned CUDA copies by way of a buffer, in the order of its work: whoever
    gives it more than fits into that buffer waits until all before is done.

    Args:
        tensor: On the CPU.
        device: Where to.

    Returns:
        The copy; the same tensor on a CPU.
    """
    source = tensor.pin_memory() if device.type == "cuda" else tensor
    return source.to(device, non_blocking=True)


def data_of(micro_batch: Any) -> Any:
    """The data of a micro-batch on the CPU, where it is known; else the micro-batch.

    Args:
        micro_batch: Any.

    Returns:
        A micro-batch of the same content.
    """
    return micro_batch.data() if isinstance(micro_batch, DeviceCopy) else micro_batch


def _entries(micro_batch: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[_Entry]:
    for name, value in micro_batch.items():
        if isinstance(value, Mapping):
            yield from _entries(value, (*path, name))
        else:
            yield (*path, name), value, value._version if isinstance(value, Tensor) else 0
