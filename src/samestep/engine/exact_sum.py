"""Sums that do not depend on the order: of numbers, and of gradients as integers on a grid.

Floats are added exactly (`exact_parts`, `rounded_sum`): a sum is kept as a few floats that do not
overlap, and rounded once, when all parts of all ranks are there.

Gradients are too large for that. Each element is rounded once to a whole multiple of a power of
two, the grid of its weight; from there on it is a 64-bit integer, and integers add up exactly in
any order and over any all-reduce (`samestep.engine.grid_sum`). The grid is the same for every pack
and rank of a step.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

SUMS = "2"
"""Which way of rounding gradients and of digesting their sums: another one gives other bits."""

WORD_BITS = 62
"""Bits of an integer that a sum may fill: one for the sign, one to spare."""

ROUNDING_BITS = 51
"""Bits of an integer that one gradient may fill, as `samestep.engine.grid_sum` rounds it."""

GROWTH_BITS = 10
"""How many times, as a power of two, a step's largest element may exceed that of the last step."""

SHRINK_BITS = 8
"""How many times, as a power of two, it may stay below it, before the grid is too coarse."""


def exact_parts(values: Iterable[float]) -> list[float]:
    """A few floats whose exact sum is that of the values (Shewchuk 1997, as in `math.fsum`).

    Args:
        values: Finite numbers, or some that are not, which are then all that is left.

    Returns:
        The parts; none of no values.
    """
    parts: list[float] = []
    odd: list[float] = []
    for value in values:
        if not math.isfinite(value):
            odd.append(value)
            continue
        kept = []
        for part in parts:
            large, small = (value, part) if abs(value) >= abs(part) else (part, value)
            value = large + small
            rest = small - (value - large)
            if rest:
                kept.append(rest)
        parts = [*kept, value]
    return odd or parts


def rounded_sum(parts: Iterable[float]) -> float:
    """The sum of numbers, rounded once: the same in any order; infinite or NaN if one of them is.

    Args:
        parts: Such as `exact_parts` of every rank, one after another.

    Returns:
        The sum.
    """
    numbers = list(parts)
    odd = [number for number in numbers if not math.isfinite(number)]
    return sum(odd) if odd else math.fsum(numbers)


def grid_bits(packs: int) -> int:
    """How many bits the largest element of the last step gets on the grid of this one.

    Args:
        packs: How many packs the step adds up, over all ranks.

    Returns:
        The bits; 41 for up to 2,048 packs, where float32 has 24.
    """
    free = WORD_BITS - math.ceil(math.log2(max(1, packs)))
    return min(ROUNDING_BITS, free) - GROWTH_BITS


def exponent_of(largest: float) -> int | None:
    """The least e with ``largest < 2**e``; None of 0, which says nothing of a grid."""
    return math.frexp(largest)[1] if largest > 0 else None


def fits(exponent: int | None, largest: float) -> bool:
    """Whether a grid made for one magnitude holds another, exactly: no overflow, enough bits.

    Args:
        exponent: `exponent_of` the largest element that the grid was made for.
        largest: The largest element of any pack now.

    Returns:
        True too if there is nothing to add: then any grid is as good.
    """
    now = exponent_of(largest)
    if now is None:
        return True
    return exponent is not None and -SHRINK_BITS <= now - exponent <= GROWTH_BITS


def digest_of(tensor: Tensor) -> str:
    """SHA-256 of a tensor's type, shape and bytes, hexadecimal."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_of_all(digests: Sequence[tuple[str, str]]) -> str:
    """SHA-256 of names and digests, hexadecimal."""
    text = "".join(f"{name} {digest}\n" for name, digest in digests)
    return hashlib.sha256(text.encode()).hexdigest()
