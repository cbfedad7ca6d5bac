"""Checkpoints: everything that a later step needs, written whole or not at all.

A checkpoint is a folder ``step-00000012`` (12 steps are done) with ``shard-*.safetensors``, one a
rank, written and read by torch.distributed.checkpoint (so that it can be read on any number of
ranks, replicated or sharded), and ``state.txt`` with the rest and the checksum of every shard. It
is written under a hidden name, flushed to disk, and renamed; only then are older ones deleted
(`samestep.train.checkpoint_files` has the folders and names). No random state is kept: order,
learning rate and dropout are functions of the step. Nothing is pickled: DCP's safetensors storage
keeps where each shard belongs in the files' own headers.
"""

import logging
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from samestep.engine.collectives import gather_results, on_rank_0, rank, world_size
from samestep.engine.oom import is_out_of_memory
from samestep.errors import CheckpointError
from samestep.train.checkpoint_files import (
    FORMAT,
    all_checkpoints,
    aside_of,
    damage,
    prune,
    put_in_place,
    read_state,
    recover,
    step_folder,
    write_state,
)
from samestep.train.progress import Progress
from samestep.train.shards import checksums, write_shards
from samestep.utils.files import remove

log = logging.getLogger("samestep")


def save(
    folder: Path,
    model: nn.Module,
    *,
    optimizer: Optimizer,
    progress: Progress,
    keep: int,
    writers: int = 1,
    origin: Mapping[str, Any] | None = None,
    average: Mapping[str, Tensor] | None = None,
    objective: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a checkpoint, each rank its part, then delete all but the newest ``keep`` and the best.

    A checkpoint of the same step stays until the new one stands.

    Args:
        folder: ``checkpoints/``; made if it is not there. All ranks must see the same folder.
        model: Its weights that require gradients, and its buffers.
        optimizer: Its state.
        progress: How far the run is.
        keep: Checkpoints to keep, this one included.
        writers: As for `samestep.train.shards.write_shards`.
        origin: What the run depends on and the checkpoint does not hold;
            `samestep.train.checkpoint_files.read_origin` gives it.
        average: The moving average of weights by name, if there is one.
        objective: The state of the objective by name, if it has one.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: It cannot be written, as on a full disk, or weights are not finite; older
            ones are intact.
    """
    target = step_folder(folder, progress.step)
    aside = aside_of(target)
    check_finite(model, progress.step)
    tensors, values = _flatten(optimizer.state_dict())
    tensors |= {f"model.{name}": tensor for name, tensor in _trained(model).items()}
    tensors |= _beside(average, objective)
    state: dict[str, Any] = {
        "format": FORMAT,
        "progress": asdict(progress),
        "optimizer": values,
        "files": {},
        "origin": dict(origin or {}),
    }

    def clear() -> None:
        recover(folder)
        aside.mkdir(parents=True)

    def finish() -> None:
        write_state(aside, state)
        put_in_place(target)
        prune(folder, step=progress.step, keep=keep, best=progress.choice.step)

    try:
        on_rank_0(clear)
        write_shards(aside, tensors, writers=writers)
        for sums in gather_results(lambda: checksums(aside)):
            state["files"] |= sums
        on_rank_0(finish)
    except (OSError, SafetensorError, CheckpointException, RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        with suppress(OSError):
            remove(aside)
        older = all_checkpoints(folder)
        raise CheckpointError(
            f"checkpoint {target} could not be written: {_reason(error)}. "
            + (f"{older[-1]} is intact" if older else "There is no earlier one")
        ) from error
    return target


def newest_intact(folder: Path) -> Path | None:
    """The newest checkpoint whose files are as they were written; says which ones are not.

    Args:
        folder: ``checkpoints/``.

    Returns:
        Its folder, or None if there is no checkpoint at all.

    Raises:
        CheckpointError: There are checkpoints, and every one is damaged.
    """
    names = gather_results(lambda: _names(folder))[0]
    problems = []
    for checkpoint in (folder / name for name in reversed(names)):
        problem = _damage(checkpoint)
        if not problem:
            return checkpoint
        problems.append(f"{checkpoint} is damaged: {problem}")
        log.warning("%s; looking for the checkpoint before it", problems[-1])
    if problems:
        raise CheckpointError("no checkpoint is whole: " + "; ".join(problems))
    return None


def load(
    checkpoint: Path,
    model: nn.Module,
    *,
    optimizer: Optimizer,
    average: Mapping[str, Tensor] | None = None,
    objective: Mapping[str, Tensor] | None = None,
) -> Progress:
    """Put a checkpoint's weights and optimizer state in place, on any number of ranks.

    Args:
        checkpoint: An intact one, as `newest_intact` gives it.
        model: Built as when it was saved; replicated or sharded.
        optimizer: Built as when it was saved.
        average: Takes the moving average, if the run has one.
        objective: Takes the state of the objective, if it has one.

    Returns:
        How far the run was.

    Raises:
        CheckpointError: It cannot be read, or belongs to another model or optimizer.
    """
    try:
        state = read_state(checkpoint)
        reader = _ListedReader(checkpoint, state["files"])
        kept = {
            name: meta
            for name, meta in reader.read_metadata().state_dict_metadata.items()
            if isinstance(meta, TensorStorageMetadata)
        }
        tensors = {f"model.{name}": tensor for name, tensor in _trained(model).items()}
        shapes = {name: meta.size for name, meta in kept.items() if name.startswith("model.")}
        if {name: tensor.shape for name, tensor in tensors.items()} != shapes:
            raise CheckpointError(f"{checkpoint} was saved from another model than this one")
        tensors |= _beside(average, objective)
        moments = _places(kept, optimizer)
        state_dict_loader.load(
            {**tensors, **moments}, storage_reader=reader, no_dist=world_size() == 1
        )
        changed = _damage(checkpoint)
        if changed:
            raise CheckpointError(f"{checkpoint} changed while it was read: {changed}")
        optimizer.load_state_dict(_unflatten(moments, state["optimizer"]))
        return Progress.from_saved(state["progress"])
    except (
        *(OSError, SafetensorError, CheckpointException),
        *(ValueError, KeyError, TypeError, IndexError),
    ) as error:
        raise CheckpointError(f"{checkpoint} cannot be read: {_reason(error)}") from error


def _names(folder: Path) -> list[str]:
    """The names of the checkpoints; rank 0 first finishes what a kill has left."""
    try:
        if rank() == 0:
            recover(folder)
        return [path.name for path in all_checkpoints(folder)]
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error


def _damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, each rank having read its share of the files."""
    share = slice(rank(), None, world_size())
    found = gather_results(lambda: damage(checkpoint, part=share))
    return "; ".join(part for part in found if part)


class _ListedFiles(FileSystem):
    """A folder in which there is nothing but the files of a list."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self._names = sorted(names)

    def ls(self, path: str | os.PathLike[str]) -> list[str]:
        return [os.path.join(path, name) for name in self._names]


class _ListedReader(HuggingFaceStorageReader):
    """Reads the files that belong to a checkpoint, not every file that lies beside them."""

    def __init__(self, checkpoint: Path, names: Iterable[str]) -> None:
        super().__init__(str(checkpoint))
        self.fs = _ListedFiles(names)


def check_finite(model: nn.Module, step: int) -> None:
    """Refuse to save weights that are not finite: they would replace those that are.

    Args:
        model: Its weights that require gradients are looked at, on all ranks.
        step: Steps done, for the message.

    Raises:
        CheckpointError: Some are not; names them.
    """
    trained = {n: weight for n, weight in model.named_parameters() if weight.requires_grad}
    found = gather_results(lambda: [name for name in trained if not _is_finite(trained[name])])
    names = sorted({name for part in found for name in part})
    if names:
        raise CheckpointError(
            f"after step {step} {len(names)} weights are not finite ({', '.join(names[:3])}): they "
            "are not saved. Usual causes: a learning rate or weight decay that is too high. "
            "Earlier checkpoints are intact"
        )


@torch.no_grad()
def _is_finite(weight: Tensor) -> bool:
    """Of this rank's part, piece by piece: what tells is as large as a piece, not as a weight."""
    local = weight.to_local() if isinstance(weight, DTensor) else weight
    return all(bool(piece.isfinite().all()) for piece in local.reshape(-1).split(2**24))


def _reason(error: BaseException) -> str:
    """The first cause; DCP wraps those of all ranks."""
    if isinstance(error, CheckpointException):
        number, (cause, _) = next(iter(error.failures.items()))
        return f"rank {number}: {_in_words(cause)}" if world_size() > 1 else _in_words(cause)
    return _in_words(error)


def _in_words(error: BaseException) -> str:
    # Without memory for the bytes of a file, PyTorch has an object of Python's that is not there.
    if is_out_of_memory(error) or "PyObject pointer is null" in str(error):
        text = str(error).strip().split("\n")[0] or type(error).__name__
        return f"out of memory for the copy of a file that is written ({text})"
    return str(error) or type(error).__name__


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that training changes, each once (tied weights have one name here)."""
    kept = model.state_dict().keys()
    weights = {n: weight.data for n, weight in model.named_parameters() if weight.requires_grad}
    return weights | {name: buffer for name, buffer in model.named_buffers() if name in kept}


def _beside(
    average: Mapping[str, Tensor] | None, objective: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """What a checkpoint holds beside the weights and the optimizer's state."""
    parts = {"average": average or {}, "objective": objective or {}}
    return {
        f"{part}.{name}": tensor
        for part, tensors in parts.items()
        for name, tensor in tensors.items()
    }


def _flatten(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors "optimizer.index.name", and the rest as JSON."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    storages: set[int] = set()

    def add(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            storage = 0 if isinstance(value, DTensor) else value.untyped_storage().data_ptr()
            # Files refuse what shares its memory, such as the codes of all weights.
            tensors[name] = value.clone() if storage in storages else value
            storages.update({storage} - {0})
        elif isinstance(value, dict):  # bitsandbytes wraps what FSDP must not see
            for part, inner in value.items():
                add(f"{name}.{part}", inner)
        else:
            plain[name] = value

    for index, values in state["state"].items():
        add(f"optimizer.{index}", values)
    return tensors, {"param_groups": state["param_groups"], "values": plain}


def _places(kept: dict[str, TensorStorageMetadata], optimizer: Optimizer) -> dict[str, Tensor]:
    """Tensors to read an optimizer's state into: sharded like the weight where of its shape."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    places: dict[str, Tensor] = {}
    for name, meta in kept.items():
        if name.startswith("optimizer."):
            weight, dtype = weights[int(name.split(".")[1])], meta.properties.dtype
            if meta.size == weight.shape and weight.dim() > 0:
                places[name] = torch.zeros_like(weight, dtype=dtype, requires_grad=False)
            else:
                places[name] = torch.zeros(meta.size, dtype=dtype)
    return places


def _unflatten(tensors: dict[str, Tensor], kept: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {}
    for key, value in (tensors | kept["values"]).items():
        _, index, *groups, name = key.split(".")
        place = state.setdefault(int(index), {})
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = value
    return {"state": state, "param_groups": kept["param_groups"]}
