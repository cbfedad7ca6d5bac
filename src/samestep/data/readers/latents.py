"""Precomputed latents: a file an example, with what the model is told beside them.

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
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from samestep.data.examples import Example, Examples
from samestep.data.load import load_rows
from samestep.data.records import Records
from samestep.data.rows import RowError, raise_all, weight_of
from samestep.errors import DataError

LATENTS = "latents"

CONDITION = "condition"

RAGGED = "encoder_hidden_states"
"""How names of embeddings begin that have a length of their own, and so a mask."""

FORMATS = (".safetensors", ".npz")


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
        nothing = torch.empty(0, dtype=torch.int64)
        rows = (Example(nothing, nothing, file.weight, at) for at, file in enumerate(files))
        content = torch.from_numpy(np.frombuffer(b"".join(digests), dtype=np.uint8).copy())
        super().__init__(
            Examples.from_examples(rows), fields={"sha256": content.view(len(files), -1)}
        )
        self.files = tuple(files)

    @property
    def lengths(self) -> list[int]:
        """Positions of the latents of each example: what its memory and time follow."""
        return [int(np.prod(file.shape[1:])) for file in self.files]


def latent_records(source: str) -> LatentRecords:
    """Look at the files of a source.

    Args:
        source: A folder of .safetensors and .npz files, taken in the order of their names; or rows
            with ``file``, relative to the rows, and optionally ``weight``. Each file holds
            ``latents`` [channels, ...], and by the names of the model's arguments what it is told:
            ``encoder_hidden_states`` [length, width] (and ``encoder_hidden_states_2``), of any
            length; others of the same shape in all files; ``condition`` [channels, ...] stands
            below the noisy latents as further channels.

    Returns:
        At least one record.

    Raises:
        DataError: Files cannot be used; lists every one.
    """
    folder = Path(source).expanduser()
    problems: list[str] = []
    files: list[LatentFile] = []
    names: dict[tuple[str, ...], str] = {}
    digests: list[bytes] = []
    for origin, path, weight in _listed(folder, source):
        try:
            if isinstance(weight, RowError):
                raise weight
            tensors = read_tensors(path)
            _check(tensors)
        except RowError as error:
            problems.append(f"{origin}: {error}")
            continue
        names.setdefault(tuple(sorted(tensors)), origin)
        files.append(LatentFile(path, tuple(tensors[LATENTS].shape), weight, origin))
        digests.append(hashlib.sha256(path.read_bytes()).digest())
    if len(names) > 1:
        has = "; ".join(f"{origin} has {', '.join(found)}" for found, origin in names.items())
        problems.append(f"all files must hold the same tensors, but {has}")
    raise_all(problems)
    return LatentRecords(files, digests)


def _listed(folder: Path, source: str) -> list[tuple[str, Path, Any]]:
    if folder.is_dir():
        found = sorted(path for path in folder.iterdir() if path.suffix in FORMATS)
        if not found:
            raise DataError(f"{source}: no file of latents ({', '.join(FORMATS)}) in this folder")
        return [(path.name, path, 1.0) for path in found]
    listed = []
    for row in load_rows(source):
        file = row.values.get("file")
        weight: float | RowError
        try:
            weight = weight_of(row.values)
            if not isinstance(file, str):
                raise RowError(f"file must name a file of latents, found {file!r}")
        except RowError as error:
            file, weight = "", error
        listed.append((row.origin, folder.parent / file, weight))
    return listed


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, in float32 or wider.

    Raises:
        RowError: The file is missing or cannot be read.
    """
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        else:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise RowError(f"{path}: no such file") from None
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise RowError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None
    return {name: _wide(value) for name, value in tensors.items()}


def _wide(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()


def _check(tensors: Mapping[str, Tensor]) -> None:
    latents = tensors.get(LATENTS)
    if latents is None or latents.dim() < 2:
        raise RowError(f"it holds no {LATENTS} [channels, ...]; it has: {', '.join(tensors)}")
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise RowError(f"{name} holds numbers that are not finite")
        if not value.numel():
            raise RowError(f"{name} is empty")
        if name.startswith(RAGGED) and value.dim() != 2:
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
        ``condition``, ``weights`` [examples] and ``told``, the model's further arguments.
    """
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for at in indices:
        by_shape.setdefault(records.files[at].shape, []).append(at)
    weights = [records.files[at].weight for at in indices]
    return {
        "example_ids": torch.tensor(list(indices)),
        "example_weights": torch.tensor(weights, dtype=torch.float64),
        "groups": {
            "x".join(map(str, shape)): _group(records, members, key, time)
            for shape, members in by_shape.items()
        },
    }


def _group(
    records: LatentRecords,
    members: Sequence[int],
    key: tuple[int, int],
    time: Callable[[torch.Generator], Tensor],
) -> dict[str, Any]:
    rows = [read_tensors(records.files[at].path) for at in members]
    noise, times = [], []
    for at, row in zip(members, rows, strict=True):
        generator = keyed_generator(*key, at)
        times.append(time(generator))
        shape = row[LATENTS].shape
        noise.append(torch.randn(shape, generator=generator, dtype=torch.float64))
    group: dict[str, Any] = {
        "latents": torch.stack([row.pop(LATENTS) for row in rows]),
        "noise": torch.stack(noise),
        "time": torch.stack(times),
        "weights": torch.tensor([records.files[at].weight for at in members]).double(),
        "told": {},
    }
    if CONDITION in rows[0]:
        group[CONDITION] = torch.stack([row.pop(CONDITION) for row in rows])
    for name in rows[0]:
        values = [row[name] for row in rows]
        if name.startswith(RAGGED):
            group["told"][name] = pad_sequence(values, batch_first=True)
            masks = [torch.ones(len(value)).long() for value in values]
            mask = name.replace("hidden_states", "attention_mask")
            group["told"][mask] = pad_sequence(masks, batch_first=True)
        else:
            group["told"][name] = torch.stack(values)
    return group


def keyed_generator(seed: int, step: int, example: int) -> torch.Generator:
    """A generator of random numbers that belong to an example in a step."""
    state = np.random.SeedSequence([seed, step, example]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
