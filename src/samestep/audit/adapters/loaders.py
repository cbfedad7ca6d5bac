"""Loaders of the user's own: what they deal, recognised by its content."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from samestep.audit.subject import Split
from samestep.errors import CheckError

MOST_TIMES = 4
"""How often a pass may hold each example before it counts as one that does not end."""


def one_pass(items: Iterable[Any], examples: int) -> list[Any]:
    """The micro-batches that a loader gives.

    Args:
        items: The loader.
        examples: How many examples it was given.

    Raises:
        CheckError: It does not end, or gives none.
    """
    most = MOST_TIMES * examples
    held = list(itertools.islice(items, most + 1))
    if not held or len(held) > most:
        what = "none" if not held else f"more than {most}, without an end"
        raise CheckError(
            f"loader gives {what} micro-batches for {examples} examples: it has to give one pass "
            "over the examples"
        )
    return held


def recognise(rows: Sequence[Any], given: Sequence[Any]) -> tuple[int | None, ...]:
    """The places of rows among those that were given, by content; None of an unknown one."""
    found: list[int | None] = []
    for row in rows:
        places = [at for at, each in enumerate(given) if row is each or is_same(row, each)]
        fresh = [at for at in places if at not in found]
        found.append(next(iter(fresh or places), None))
    return tuple(found)


def named(seen: Sequence[Sequence[int | None]], examples: Sequence[int]) -> Split | None:
    """The examples of each micro-batch, by the places that were recognised; None if some were not.

    Args:
        seen: The places of each micro-batch among the examples that the loader was given.
        examples: Those.
    """
    split = tuple(
        tuple(examples[at] for at in places if at is not None)
        for places in seen
        if None not in places
    )
    return split if len(split) == len(seen) > 0 else None


def is_same(one: Any, other: Any) -> bool:
    """Whether two rows hold the same; of mappings, the fields that the first still has."""
    if isinstance(one, Mapping):
        return isinstance(other, Mapping) and all(
            key in other and is_same(value, other[key]) for key, value in one.items()
        )
    if isinstance(one, Tensor | np.ndarray):
        if not isinstance(other, Tensor | np.ndarray | list):
            return False
        left, right = torch.as_tensor(one), torch.as_tensor(other)
        return left.shape == right.shape and bool((left == right).all())
    if isinstance(one, list | tuple):
        return (
            isinstance(other, list | tuple)
            and len(one) == len(other)
            and all(map(is_same, one, other))
        )
    return type(one) is type(other) and bool(one == other)
