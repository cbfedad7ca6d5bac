"""A mix of several sources: how many rows of each an epoch takes, and which, by (seed, epoch)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from samestep.errors import DataError
from samestep.utils.sources import DataSource

_Ints: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Mix:
    """Records of several sources, one source after another.

    Attributes:
        sizes: The records of each source.
        takes: How many of them an epoch takes; more than there are: some of them again.
    """

    sizes: tuple[int, ...]
    takes: tuple[int, ...]

    def __len__(self) -> int:
        return sum(self.takes)

    def epoch(self, seed: int, epoch: int) -> _Ints:
        """The records of an epoch, shuffled: a function of (sizes, takes, seed, epoch).

        Every source is gone through in a random order, then in another one, and so on; an epoch
        goes on where the one before it ended. So no record is taken a second time more often
        than any other of its source.

        Args:
            seed: At least 0.
            epoch: From 0.

        Returns:
            Indices of records.
        """
        starts = np.cumsum([0, *self.sizes[:-1]])
        parts = [
            start + _taken(size, epoch * take, take, key=(seed, number))
            for number, (start, size, take) in enumerate(
                zip(starts, self.sizes, self.takes, strict=True), 1
            )
        ]
        members = np.concatenate(parts)
        return members[np.random.default_rng([seed, epoch]).permutation(len(members))]

    def describe(self, sources: Sequence[DataSource]) -> str:
        """What an epoch takes of each source, for the log."""
        return "an epoch takes " + ", ".join(
            f"{take:,} of {size:,} rows of {source.path}"
            for take, size, source in zip(self.takes, self.sizes, sources, strict=True)
        )


def _taken(size: int, start: int, number: int, *, key: tuple[int, int]) -> _Ints:
    """Some of the endless sequence of the shuffled records of a source."""
    seed, source = key
    passes = range(start // size, (start + number - 1) // size + 1)
    orders = [np.random.default_rng([seed, at, source]).permutation(size) for at in passes]
    first = start - passes[0] * size
    return np.concatenate(orders)[first : first + number]


def mix_of(sources: Sequence[DataSource], sizes: Sequence[int]) -> Mix | None:
    """The mix that sources ask for.

    Args:
        sources: With weights, numbers of rows, or neither.
        sizes: The records of each.

    Returns:
        The mix; None if every source is taken whole. By weights an epoch is as long as it can be
        with no record twice: the source that is the scarcest for its weight is taken whole.

    Raises:
        DataError: No row of a source is left.
    """
    weights = [source.weight for source in sources]
    if not any(source.rows or source.weight for source in sources):
        return None
    empty = [source.path for source, size in zip(sources, sizes, strict=True) if size == 0]
    if empty:
        raise DataError(
            "\n".join(f"{path}: none of its rows is left to learn from" for path in empty)
        )
    if any(source.rows for source in sources):
        takes = [source.rows or size for source, size in zip(sources, sizes, strict=True)]
        return Mix(tuple(sizes), tuple(takes))
    shares = [float(weight or 0) for weight in weights]
    unit = min(size / share for size, share in zip(sizes, shares, strict=True))
    takes = [max(1, min(size, round(unit * w))) for size, w in zip(sizes, shares, strict=True)]
    return Mix(tuple(sizes), tuple(takes))
