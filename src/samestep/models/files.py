"""What the files of a model must be: safetensors, whole, finite, with numbers that can be."""

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import cached_file

from samestep.errors import ConfigError
from samestep.utils.cached_folders import cached_folder

log = logging.getLogger("samestep")

_IS_SAFETENSORS = re.compile(r"[^/\\\x00]+\.safetensors")
"""Names of files of weights: a file beside the index."""

_MOST_PARTS = 100_000
"""Layers or experts that a config may name."""


def made_in_cache(folder: Path, write: Callable[[Path], None], *, failure: str) -> Path:
    """A model's folder that is made once: `samestep.utils.cached_folders.cached_folder`.

    Args:
        folder: Where it is kept.
        write: Fills an empty folder.
        failure: What is said not to have been possible if it cannot be written.

    Returns:
        The folder.

    Raises:
        ConfigError: It cannot be written, or ``write`` raises it.
    """
    try:
        return cached_folder(folder, write)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"model: {failure} in {folder.parent}: {error}. Make room there, or set "
            "SAMESTEP_CACHE to another folder"
        ) from error


def check_safetensors(source: str, index: str) -> None:
    """Refuse an index that names other files: libraries would unpickle them.

    Args:
        source: The folder or Hub name of a model.
        index: The name of its index.

    Raises:
        ConfigError: It names something else than safetensors beside it, or an adapter lies there.
    """
    path = cached_file(source, index, _raise_exceptions_for_missing_entries=False)
    if path is not None:
        names = json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"].values()
        wrong = sorted({str(name) for name in names if not _IS_SAFETENSORS.fullmatch(str(name))})
        if wrong:
            raise ConfigError(
                f"model: {index} of {source} names {', '.join(wrong[:3])}: weights are read from "
                "*.safetensors files beside it alone. Save the model anew with safetensors"
            )
    if (Path(source) / "adapter_config.json").exists():
        raise ConfigError(
            f"model: {source} holds an adapter (adapter_config.json) beside a model's config.json: "
            "merge it into the weights, or move it elsewhere"
        )


def check_parts(config: Mapping[str, Any]) -> None:
    """Refuse numbers of parts that would be built one by one until memory runs out.

    Args:
        config: The fields of a config.

    Raises:
        ValueError: One is too large; names it.
    """
    for name, value in config.items():
        counts_parts = any(part in name for part in ("layer", "block", "expert"))
        if counts_parts and isinstance(value, int) and value > _MOST_PARTS:
            raise ValueError(f"{name} is {value}: more than {_MOST_PARTS:,} are none of a model's")


def check_complete(source: str, model: Any, *, missing: Iterable[str], new_head: bool) -> None:
    """Refuse missing weights, but for those of a head that is to be new.

    Args:
        source: Where the model is from, for messages.
        model: A model of transformers.
        missing: Names of the weights that its files lack.
        new_head: Whether those of its head may be missing.

    Raises:
        ConfigError: Others are.
    """
    body = f"{model.base_model_prefix}."
    absent = sorted(missing)
    if new_head:
        head = [key for key in absent if not key.startswith(body) or ".pooler." in key]
        absent = [key for key in absent if key not in head]
        if head:
            log.info("the head starts from random values: %s", ", ".join(head))
    if absent:
        names = ", ".join(absent[:3]) + (", …" if len(absent) > 3 else "")
        raise ConfigError(
            f"model: {source} lacks {len(absent)} of the model's weights ({names}): they would "
            "start from random values"
        )


@torch.no_grad()
def check_finite(source: str, model: Any) -> None:
    """Refuse weights that hold NaN or infinity, also where no row of the data would reach them.

    Args:
        source: Where the model is from, for messages.
        model: The model.

    Raises:
        ConfigError: Some do; names the first.
    """
    _refuse_not_finite(source, model.named_parameters())


@torch.no_grad()
def check_finite_files(source: str) -> None:
    """As `check_finite`, of the files: weights that are quantised as they are read hide NaN.

    Args:
        source: The folder or Hub name of a model.

    Raises:
        ConfigError: Some weights hold NaN or infinity; names the first.
    """
    names = {"model.safetensors"}
    index = cached_file(
        source, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False
    )
    if index is not None:
        names = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
    _refuse_not_finite(source, _tensors_of_files(source, sorted(names)))


def _tensors_of_files(source: str, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    for file_name in names:
        path = cached_file(source, file_name)
        assert path is not None
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)


def _refuse_not_finite(source: str, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse weights of which some hold NaN or infinity."""
    wrong = {}
    for name, weight in weights:
        # A sum in one pass; only one that is not finite is looked at element by element.
        if weight.is_floating_point() and not weight.sum(dtype=torch.float32).isfinite():
            number = int((~weight.isfinite()).sum())
            if number:
                wrong[name] = f"{number} of {weight.numel():,}"
    if wrong:
        first = next(iter(wrong))
        raise ConfigError(
            f"model: {len(wrong)} weights of {source} hold numbers that are not finite: {first} "
            f"has {wrong[first]}. The model is damaged: get it anew"
        )
