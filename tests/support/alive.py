"""What a computation makes, and what of it is still held."""

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class Made(TorchDispatchMode):
    """Remembers, without holding it, the storage of every tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[StorageWeakRef, int] = {}
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        given = {one.untyped_storage()._cdata for one in args if isinstance(one, Tensor)}
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata in given:  # a view, or written in place
                    continue
                self.storages[StorageWeakRef(storage)] = storage.nbytes()
                self.shapes.add(tuple(tensor.shape))
        return out

    def held(self) -> int:
        """Bytes that are still alive."""
        return sum(size for storage, size in self.storages.items() if not storage.expired())
