"""A digest of integers that costs little more than reading them, on a GPU too.

SHA-256 reads some 1 or 2 GB/s, and on the CPU alone: a step would wait for it. So a step's sums are
folded first, where they are: in rows of `LANES` integers, each row times an odd number of its own,
added up modulo 2**64. An odd number has an inverse modulo 2**64, so that no change of one element
is lost; changes of several are lost only where they cancel. SHA-256 is taken of what is left.
"""

import functools
import hashlib

import torch
from torch import Tensor

LANES = 2**15
"""Integers in a row."""

LANES_LEFT = 2**12
"""Integers that are left of the sums of rows, folded once more."""

_WORD = 2**64


class Fold:
    """A tensor of integers, folded piece by piece.

    Args:
        numel: How many there are.
        device: Where.

    Example:
        >>> import torch
        >>> numbers = torch.arange(100_000)
        >>> def digest():
        ...     fold = Fold(len(numbers), numbers.device)
        ...     for piece in numbers.split(2 * LANES):
        ...         fold.add(piece)
        ...     return digest_of_lanes(fold.lanes(), "int64")
        >>> before = digest()
        >>> numbers[77_777] += 1
        >>> digest() == before
        False
    """

    def __init__(self, numel: int, device: torch.device) -> None:
        self._row = 0
        self._lanes = torch.zeros(min(numel, LANES), dtype=torch.int64, device=device)

    def add(self, piece: Tensor) -> None:
        """Go on with the next elements.

        Args:
            piece: Flat; whole rows, but for the last piece.
        """
        self._row = add_rows_(self._lanes, piece, self._row)

    def lanes(self) -> Tensor:
        """What is left of all elements."""
        if len(self._lanes) <= LANES_LEFT:
            return self._lanes
        left = torch.zeros(LANES_LEFT, dtype=torch.int64, device=self._lanes.device)
        add_rows_(left, self._lanes, self._row)
        return left


def add_rows_(lanes: Tensor, words: Tensor, row: int) -> int:
    """Add rows of integers to lanes, each times its own odd number, modulo 2**64.

    Args:
        lanes: As long as a row; changed in place.
        words: Rows, one after another; the last may be shorter.
        row: The number of the first.

    Returns:
        The number of the row after the last.
    """
    if words.device.type != "cpu":
        return _add_rows_at_once(lanes, words, row)
    for part in words.split(len(lanes)) if len(lanes) else ():
        into = lanes if len(part) == len(lanes) else lanes[: len(part)]
        into.add_(part, alpha=_odd(row))
        row += 1
    return row


def _add_rows_at_once(lanes: Tensor, words: Tensor, row: int) -> int:
    """The same in a few operations: a device that waits for each pays for their number."""
    rows = len(words) // len(lanes) if len(lanes) else 0
    whole, rest = words.split([rows * len(lanes), len(words) - rows * len(lanes)])
    odd = torch.tensor([_odd(row + at) for at in range(rows + 1)], device=words.device)
    lanes += (whole.view(rows, len(lanes)) * odd[:rows, None]).sum(0)
    lanes[: len(rest)] += rest * odd[rows]
    return row + rows + bool(len(rest))


@functools.lru_cache(maxsize=2**16)
def _odd(row: int) -> int:
    """An odd number of 64 bits for a row (splitmix64), as a signed one."""
    word = (row + 1) * 0x9E3779B97F4A7C15 % _WORD
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % _WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB % _WORD
    word = (word ^ word >> 31) | 1
    return word - _WORD if word >= _WORD // 2 else word


def digest_of_lanes(lanes: Tensor, title: str) -> str:
    """SHA-256 of a title and of lanes, hexadecimal.

    Args:
        lanes: On the CPU.
        title: What they are of.
    """
    digest = hashlib.sha256(f"{title} ".encode())
    digest.update(lanes.contiguous().numpy().data)
    return digest.hexdigest()
