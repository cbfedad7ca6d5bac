"""A checkpoint's shards: which tensors each holds, writing them by DCP, and their checksums."""

import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from samestep.engine.collectives import rank, world_size
from samestep.utils.files import sha256_of, sync

# DCP warns of a single process even where ``no_dist`` says that there is only one. For the process,
# not for a block: filters of a block would be taken from it by blocks in other threads.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")

FILE_BYTES = 2**27
"""What a file of a checkpoint holds at most; a larger tensor has its own."""


def write_shards(folder: Path, tensors: Mapping[str, Tensor], *, writers: int = 1) -> None:
    """Write this rank's part of all tensors, flushed to disk.

    Args:
        folder: Empty.
        tensors: By name; on several ranks those of all of them.
        writers: Files written at a time, in one process alone. Each takes twice `FILE_BYTES`.

    Raises:
        OSError: A file could not be written; what others have raised, as DCP wraps it, too.
    """
    assert writers == 1 or world_size() == 1
    files = _files(tensors)
    parts = [
        {name: tensor for name, tensor in tensors.items() if files[name] % writers == part}
        for part in range(writers)
    ]

    def write(part: Mapping[str, Tensor]) -> None:
        # Not its own threads: what goes wrong in them is lost.
        writer = HuggingFaceStorageWriter(
            str(folder), fqn_to_index_mapping=files, save_distributed=True
        )
        state_dict_saver.save(dict(part), storage_writer=writer, no_dist=world_size() == 1)

    if writers == 1:
        write(tensors)
        return
    with ThreadPoolExecutor(writers) as threads:
        for _ in threads.map(write, filter(None, parts)):
            pass


def _files(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The number, from 1, of the file that holds each tensor.

    The writer copies a whole file's tensors, twice, before it writes: files are small.
    """
    files: dict[str, int] = {}
    number, room = 1, FILE_BYTES
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if size > room < FILE_BYTES:
            number, room = number + 1, FILE_BYTES
        files[name], room = number, room - size
    return files


def checksums(folder: Path) -> dict[str, str]:
    """Flush this rank's shards to disk, and give their checksums.

    Args:
        folder: Where they are.

    Returns:
        SHA-256 by file name.

    Raises:
        OSError: One cannot be read or flushed.
    """
    # No glob: it takes a folder that cannot be read for an empty one.
    own = f"shard-{rank() + 1:05d}-"
    shards = sorted(path for path in folder.iterdir() if path.name.startswith(own))
    with ThreadPoolExecutor() as threads:  # which hash at the same time, one on each core
        digests = threads.map(_flushed_digest, shards)
        return {shard.name: digest for shard, digest in zip(shards, digests, strict=True)}


def _flushed_digest(shard: Path) -> str:
    sync(shard)
    return sha256_of(shard)
