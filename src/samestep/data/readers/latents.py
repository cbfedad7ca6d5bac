"""Precomputed latents: a file an example, with the model's further arguments beside them.

Whatever is random about an example, its noise and its time, is a function of (seed, step, example):
not of the micro-batch that it is in.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from samestep.data.collate import attention_mask, pad_rows
from samestep.data.examples import Example, Examples
from samestep.data.load import load_rows
from samestep.data.records import Records
from samestep.data.row_converters import Converter
from samestep.data.row_formats import RowFormat
from samestep.data.rows import (
    WEIGHS_NOTHING,
    Row,
    RowDropped,
    RowError,
    RowTally,
    iter_rows,
    read_weight,
)
from samestep.errors import ConfigError, DataError
from samestep.utils.files import open_regular, user_path

LATENTS = "latents"
"""The name of the latents in a file."""

CONDITION = "condition"
"""The name of further channels that stand below the noisy latents."""

_RAGGED = "encoder_hidden_states"
"""How names of embeddings begin that have a length of their own, and so a mask."""

_EXTENSIONS = (".safetensors", ".npz")


@dataclass(frozen=True)
class LatentFile:
    """One example.

    Attributes:
        path: A .safetensors or .npz file.
        shape: Of its latents [channels, ...].
        weight: Of the example in the loss.
        origin: Where the row is from, for messages.
    """

    path: Path
    shape: tuple[int, ...]
    weight: float
    origin: str


class LatentRecords(Records):
    """Examples that stay in their files until they are used; they have no tokens.

    Args:
        files: At least one.
        digests: SHA-256 of each file's content.
    """

    def __init__(self, files: Sequence[LatentFile], digests: Sequence[bytes]) -> None:
        no_tokens = torch.empty(0, dtype=torch.int64)
        rows = (
            Example.without_targets(no_tokens, weight=file.weight, row=at)
            for at, file in enumerate(files)
        )
        content = torch.from_numpy(np.frombuffer(b"".join(digests), dtype=np.uint8).copy())
        super().__init__(
            Examples.from_examples(rows), fields={"sha256": content.view(len(files), -1)}
        )
        self.files = tuple(files)

    @property
    def lengths(self) -> list[int]:
        """Positions of the latents of each example: what its memory and time follow."""
        return [int(np.prod(file.shape[1:])) for file in self.files]


def latent_records(
    source: str, *, row_format: str | Converter | RowFormat | None = None
) -> LatentRecords:
    """Look at the files of a source.

    Args:
        source: A folder of .safetensors and .npz files, taken in the order of their names; or rows
            with ``file``, relative to the rows, and optionally ``weight``. Each file holds
            ``latents`` [channels, ...], and by their names further arguments of the model:
            ``encoder_hidden_states`` [length, width] (and ``encoder_hidden_states_2``), of any
            length; others of the same shape in all files; ``condition`` [channels, ...] stands
            below the noisy latents as further channels.
        row_format: As for `samestep.data.load.load_rows`; for rows alone.

    Returns:
        At least one record.

    Raises:
        DataError: Files cannot be used; lists every one.
        ConfigError: ``row_format`` names nothing that converts rows, or there are no rows.
    """
    path = user_path(source)
    if not path.is_dir():
        folder, rows = path.parent, load_rows(source, row_format=row_format)
    elif row_format is None:
        folder, rows = path, _rows_of_files(path)
    else:
        raise ConfigError(f"row_format: {source} is a folder of latents, not of rows: leave it out")
    origins: dict[tuple[str, ...], str] = {}
    digests: list[bytes] = []

    def read(at: int, row: Row) -> LatentFile:
        weight, name = read_weight(row.values), row.values.get("file")
        if not weight:
            raise RowDropped(WEIGHS_NOTHING)
        if not isinstance(name, str):
            raise RowError(f"file must name a file of latents, found {name!r}")
        path = folder / name
        tensors = read_tensors(path)
        _check_tensors(tensors)
        origins.setdefault(tuple(sorted(tensors)), row.origin)
        digests.append(hashlib.sha256(path.read_bytes()).digest())
        return LatentFile(path, tuple(tensors[LATENTS].shape), weight, row.origin)

    dropped = RowTally()
    files = [file for _, file in iter_rows(rows, read, dropped=dropped)]
    if not files:
        raise DataError(f"{source}: no row is left to learn from ({WEIGHS_NOTHING})")
    if len(origins) > 1:
        names = "; ".join(f"{origin} has {', '.join(names)}" for names, origin in origins.items())
        raise DataError(f"all files must hold the same tensors, but {names}")
    records = LatentRecords(files, digests)
    records.dropped = dropped
    return records


def _rows_of_files(folder: Path) -> list[Row]:
    """A row for each file of latents in a folder."""
    names = sorted(file.name for file in folder.iterdir() if file.suffix in _EXTENSIONS)
    if not names:
        raise DataError(f"{folder}: no file of latents ({', '.join(_EXTENSIONS)}) in this folder")
    return [Row({"file": name}, name) for name in names]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, in float32 or wider.

    Args:
        path: A .safetensors or .npz file.

    Returns:
        By name.

    Raises:
        RowError: The file is missing or cannot be read.
    """
    try:
        if path.suffix == ".npz":
            with open_regular(path) as file, np.load(file, allow_pickle=False) as arrays:
                tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        else:
            open_regular(path).close()  # a pipe would hang
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise RowError(f"{path}: no such file") from None
    except MemoryError:
        raise RowError(f"{path}: cannot be read (it does not fit into memory)") from None
    except Exception as error:  # readers of damaged archives raise whatever they trip over
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RowError(f"{path}: cannot be read ({reason})") from None
    return {name: _wide(value) for name, value in tensors.items()}


def _wide(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()


def _check_tensors(tensors: Mapping[str, Tensor]) -> None:
    latents = tensors.get(LATENTS)
    if latents is None or latents.dim() < 2:
        raise RowError(f"it holds no {LATENTS} [channels, ...]; it has: {', '.join(tensors)}")
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise RowError(f"{name} holds numbers that are not finite")
        if not value.numel():
            raise RowError(f"{name} is empty")
        if name.startswith(_RAGGED) and value.dim() != 2:
            raise RowError(f"{name} must be [length, width], found {list(value.shape)}")
    condition = tensors.get(CONDITION)
    if condition is not None and condition.shape[1:] != latents.shape[1:]:
        raise RowError(f"{CONDITION} is {list(condition.shape)} for latents {list(latents.shape)}")
    if "image_embeds" in tensors and not tensors["image_embeds"].any():
        raise RowError("image_embeds are all 0, which means no image: leave them out")


def collate_latents(
    records: LatentRecords,
    indices: Sequence[int],
    *,
    key: tuple[int, int],
    time: Callable[[torch.Generator], Tensor],
) -> dict[str, Any]:
    """One micro-batch, noise and times drawn.

    Args:
        records: The data set.
        indices: Which of its records; at least one.
        key: (seed, step).
        time: Draws a time in (0, 1) from a generator: 0 is data, 1 is noise.

    Returns:
        ``example_ids`` [examples]; ``example_weights`` [examples], float64; ``groups``: for each
        shape of latents ``latents`` and ``noise`` [examples, channels, ...], ``time`` [examples],
        ``condition``, ``weights`` [examples] and ``model_kwargs``, the model's further arguments.
    """
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for at in indices:
        by_shape.setdefault(records.files[at].shape, []).append(at)
    weights = [records.files[at].weight for at in indices]
    return {
        "example_ids": torch.tensor(list(indices)),
        "example_weights": torch.tensor(weights, dtype=torch.float64),
        "groups": {
            "x".join(map(str, shape)): _collate_shape(records, members, key=key, time=time)
            for shape, members in by_shape.items()
        },
    }


def _collate_shape(
    records: LatentRecords,
    members: Sequence[int],
    *,
    key: tuple[int, int],
    time: Callable[[torch.Generator], Tensor],
) -> dict[str, Any]:
    """Examples of one shape of latents, see `collate_latents`."""
    files = [read_tensors(records.files[at].path) for at in members]
    noise, times = [], []
    for at, tensors in zip(members, files, strict=True):
        generator = keyed_generator(key, at)
        times.append(time(generator))
        shape = tensors[LATENTS].shape
        noise.append(torch.randn(shape, generator=generator, dtype=torch.float64))
    group: dict[str, Any] = {
        "latents": torch.stack([tensors.pop(LATENTS) for tensors in files]),
        "noise": torch.stack(noise),
        "time": torch.stack(times),
        "weights": torch.tensor([records.files[at].weight for at in members]).double(),
    }
    if CONDITION in files[0]:
        group[CONDITION] = torch.stack([tensors.pop(CONDITION) for tensors in files])
    model_kwargs: dict[str, Tensor] = {}
    for name in files[0]:
        values = [tensors[name] for tensors in files]
        if name.startswith(_RAGGED):
            model_kwargs[name] = pad_rows(values, fill=0)
            mask = name.replace("hidden_states", "attention_mask")
            model_kwargs[mask] = attention_mask(values)
        else:
            model_kwargs[name] = torch.stack(values)
    return {**group, "model_kwargs": model_kwargs}


def keyed_generator(key: tuple[int, int], example: int) -> torch.Generator:
    """A generator of random numbers that belong to an example in a step.

    Args:
        key: (seed, step).
        example: Its index in the data set.

    Returns:
        A generator on the CPU.
    """
    state = np.random.SeedSequence([*key, example]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
