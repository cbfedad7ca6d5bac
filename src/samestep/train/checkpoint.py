"""Checkpoints: everything that a later step needs, written whole or not at all.

A checkpoint is a folder ``step-00000012`` (12 steps are done) with ``shard-*.safetensors``, one a
rank, written and read by torch.distributed.checkpoint (so that it can be read on any number of
ranks, replicated or sharded), and ``state.txt`` with the rest and the checksum of every shard. It
is written under a hidden name, flushed to disk, and renamed; only then are older ones deleted. No
random state is kept: order, learning rate and dropout are functions of the step. Nothing is
pickled: DCP's safetensors storage keeps where each shard belongs in the files' own headers.
"""

import hashlib
import json
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from samestep.engine.collectives import gather_results, on_rank_0, rank, world_size
from samestep.errors import CheckpointError
from samestep.train.progress import DataFingerprint, Progress
from samestep.utils.files import sha256_of, sync

log = logging.getLogger("samestep")

_FORMAT = 2

FILE_BYTES = 2**27
"""What a file of a checkpoint holds at most; a larger tensor has its own."""


def save(
    folder: Path, model: nn.Module, *, optimizer: Optimizer, progress: Progress, keep: int
) -> Path:
    """Write a checkpoint, each rank its part, then delete all but the newest ``keep``.

    Args:
        folder: ``checkpoints/``; made if it is not there. All ranks must see the same folder.
        model: Its weights that require gradients, and its buffers.
        optimizer: Its state.
        progress: How far the run is.
        keep: Checkpoints to keep, this one included.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: It cannot be written, as on a full disk; older ones are intact.
    """
    target = folder / f"step-{progress.step:08d}"
    aside = folder / f".{target.name}.tmp"
    tensors, values = _flatten(optimizer.state_dict())
    tensors |= {f"model.{name}": tensor for name, tensor in _trained(model).items()}
    state: dict[str, Any] = {
        "format": _FORMAT,
        "progress": asdict(progress),
        "optimizer": values,
        "files": {},
    }

    def clear() -> None:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)

    def finish() -> None:
        text = json.dumps(state)
        (aside / "state.txt").write_text(f"{_digest(text)} {text}", encoding="utf-8")
        sync(aside / "state.txt")
        sync(aside)
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
        sync(folder)
        for old in _all(folder)[:-keep]:
            shutil.rmtree(old)

    try:
        on_rank_0(clear)
        writer = HuggingFaceStorageWriter(
            str(aside), fqn_to_index_mapping=_files(tensors), save_distributed=True
        )
        with _no_warning_of_one_process():
            state_dict_saver.save(tensors, storage_writer=writer, no_dist=world_size() == 1)
        for sums in gather_results(lambda: _checksums(aside)):
            state["files"] |= sums
        on_rank_0(finish)
    except (OSError, SafetensorError, CheckpointException) as error:
        shutil.rmtree(aside, ignore_errors=True)
        older = _all(folder)
        raise CheckpointError(
            f"checkpoint {target} could not be written: {_reason(error)}. "
            + (f"{older[-1]} is intact" if older else "There is no earlier one")
        ) from error
    return target


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


def newest_intact(folder: Path) -> Path | None:
    """The newest checkpoint whose files are as they were written; says which ones are not.

    Args:
        folder: ``checkpoints/``.

    Returns:
        Its folder, or None if there is no checkpoint at all.

    Raises:
        CheckpointError: There are checkpoints, and every one is damaged.
    """
    names = gather_results(lambda: [path.name for path in _all(folder)])[0]
    problems = []
    for checkpoint in (folder / name for name in reversed(names)):
        damage = [part for part in gather_results(partial(_damage, checkpoint)) if part]
        if not damage:
            return checkpoint
        problems.append(f"{checkpoint} is damaged: {'; '.join(damage)}")
        log.warning("%s; looking for the checkpoint before it", problems[-1])
    if problems:
        raise CheckpointError("no checkpoint is whole: " + "; ".join(problems))
    return None


def load(checkpoint: Path, model: nn.Module, *, optimizer: Optimizer) -> Progress:
    """Put a checkpoint's weights and optimizer state in place, on any number of ranks.

    Args:
        checkpoint: An intact one, as `newest_intact` gives it.
        model: Built as when it was saved; replicated or sharded.
        optimizer: Built as when it was saved.

    Returns:
        How far the run was.

    Raises:
        CheckpointError: It cannot be read, or belongs to another model or optimizer.
    """
    try:
        state = _read_state(checkpoint)
        reader = HuggingFaceStorageReader(str(checkpoint))
        kept = {
            name: meta
            for name, meta in reader.read_metadata().state_dict_metadata.items()
            if isinstance(meta, TensorStorageMetadata)
        }
        tensors = {f"model.{name}": tensor for name, tensor in _trained(model).items()}
        shapes = {name: meta.size for name, meta in kept.items() if name.startswith("model.")}
        if {name: tensor.shape for name, tensor in tensors.items()} != shapes:
            raise CheckpointError(f"{checkpoint} was saved from another model than this one")
        moments = _places(kept, optimizer)
        with _no_warning_of_one_process():
            state_dict_loader.load(
                {**tensors, **moments}, storage_reader=reader, no_dist=world_size() == 1
            )
        optimizer.load_state_dict(_unflatten(moments, state["optimizer"]))
        progress = state["progress"]
        return Progress(**{**progress, "data": DataFingerprint(**progress["data"])})
    except (
        *(OSError, SafetensorError, CheckpointException),
        *(ValueError, KeyError, TypeError, IndexError),
    ) as error:
        raise CheckpointError(f"{checkpoint} cannot be read: {_reason(error)}") from error


@contextmanager
def _no_warning_of_one_process() -> Iterator[None]:
    """DCP warns of a single process even where ``no_dist`` says that there is only one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")
        yield


def _checksums(folder: Path) -> dict[str, str]:
    """Flush this rank's shards to disk, and give their checksums."""
    shards = sorted(folder.glob(f"shard-{rank() + 1:05d}-*"))
    for shard in shards:
        sync(shard)
    return {shard.name: sha256_of(shard) for shard in shards}


def _read_state(checkpoint: Path) -> dict[str, Any]:
    """What stands in ``state.txt`` after its own checksum."""
    digest, text = (checkpoint / "state.txt").read_text(encoding="utf-8").split(" ", 1)
    if digest != _digest(text):
        raise ValueError("state.txt does not match its checksum")
    state: dict[str, Any] = json.loads(text)
    return state


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _damage(checkpoint: Path) -> str:
    """What is wrong with the files that this rank looks at; empty if nothing is."""
    try:
        state = _read_state(checkpoint)
        if state["format"] != _FORMAT:
            return f"format {state['format']}, not {_FORMAT}"
        for name, digest in sorted(state["files"].items())[rank() :: world_size()]:
            if sha256_of(checkpoint / name) != digest:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _reason(error: BaseException) -> str:
    """The first cause; DCP wraps those of all ranks."""
    if isinstance(error, CheckpointException):
        number, (cause, _) = next(iter(error.failures.items()))
        return f"rank {number}: {cause}" if world_size() > 1 else str(cause)
    return str(error)


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that training changes, each once (tied weights have one name here)."""
    kept = model.state_dict().keys()
    weights = {n: weight.data for n, weight in model.named_parameters() if weight.requires_grad}
    return weights | {name: buffer for name, buffer in model.named_buffers() if name in kept}


def _flatten(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors "optimizer.index.name", and the rest as JSON."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for index, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                plain[f"optimizer.{index}.{name}"] = value
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
        _, index, name = key.split(".", 2)
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": kept["param_groups"]}
