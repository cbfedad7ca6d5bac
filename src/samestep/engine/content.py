"""A digest of what a micro-batch holds: it tells micro-batches apart, whoever runs them."""

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from samestep.engine.exact_sum import digest_of
from samestep.errors import ConfigError


def content_digest(micro_batch: Any) -> str:
    """SHA-256 of a micro-batch: of its tensors, numbers and texts, by name and in their order.

    Args:
        micro_batch: A tensor, or mappings and sequences of tensors, numbers, texts, slices and
            None.

    Returns:
        Hexadecimal.

    Raises:
        ConfigError: Something else is in it.
    """
    digest = hashlib.sha256()
    _add(digest, micro_batch, "micro-batch")
    return digest.hexdigest()


def _add(digest: Any, value: Any, name: str) -> None:
    if isinstance(value, Tensor):
        text = digest_of(value)
    elif isinstance(value, Mapping):
        text = f"mapping of {len(value)}"
        for key in sorted(value, key=str):
            _add(digest, value[key], f"{name}[{key!r}]")
    elif isinstance(value, list | tuple):
        text = f"sequence of {len(value)}"
        for at, each in enumerate(value):
            _add(digest, each, f"{name}[{at}]")
    elif value is None or isinstance(value, str | int | float | bool | slice | range):
        text = repr(value)
    else:
        raise ConfigError(
            f"bitwise: {name} is {type(value).__name__}: a term that couples the batch needs "
            "micro-batches of tensors, numbers and texts, whose content gives their order"
        )
    digest.update(f"{name} {text}\n".encode())
