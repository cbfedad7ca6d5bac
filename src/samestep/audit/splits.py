"""Splits of a batch: which the audit tries, and what they are called."""

import itertools

from samestep.audit.subject import Split


def candidate_splits(size: int, *, uniform: bool) -> list[Split]:
    """The splits of a batch that the audit tries: ragged first where the subject can.

    Args:
        size: Examples; at least 4.
        uniform: Micro-batches are of one size; see `uneven_split` for a smaller last one.

    Returns:
        Different splits, none of them whole.
    """
    sizes = [1, 2] if size < 8 else [1, 2, size // 2]
    regular = [_cut_every(size, step) for step in sizes]
    if uniform:
        return regular
    third = max(1, size // 3)
    borders = sorted({0, third, third + 1, min(size, third + 1 + third), size})
    ragged = tuple(tuple(range(start, end)) for start, end in itertools.pairwise(borders))
    return [ragged, *regular]


def uneven_split(size: int) -> Split:
    """What a data set is cut into that no batch size divides: the last micro-batch is smaller."""
    return _cut_every(size, 3)


def _cut_every(size: int, step: int) -> Split:
    return tuple(tuple(range(start, min(start + step, size))) for start in range(0, size, step))


def merged(split: Split) -> Split:
    """All examples of a split, in its order, as one micro-batch."""
    return (tuple(index for micro_batch in split for index in micro_batch),)


def sizes_of(split: Split) -> str:
    """A split in words: "2 x 4", or the sizes of a ragged one."""
    sizes = [len(micro_batch) for micro_batch in split]
    if len(set(sizes)) == 1:
        return f"{sizes[0]} x {len(sizes)}"
    return "+".join(map(str, sizes))
