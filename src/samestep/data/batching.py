"""Which examples make a step, and how a step is divided into ranks and micro-batches.

All pure functions. What a step holds depends on (seed, epoch) and the batch size alone; how it is
sharded over ranks and packed into micro-batches depends on the lengths, the number of ranks and the
budget alone, and cannot change the step.
"""

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from samestep.data.mixing import Mix
from samestep.errors import ConfigError

_Ints: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True)
class StepPlan:
    """One step's examples.

    Attributes:
        step: The step's number, from 0.
        epoch: The epoch that it lies in, from 0.
        progress: Epochs done after it, with the part of the current one.
        examples: Indices into the data set, in the order of the epoch.
    """

    step: int
    epoch: int
    progress: float
    examples: tuple[int, ...]


def shuffled_indices(size: int, *, seed: int, epoch: int) -> list[int]:
    """The order of the examples in an epoch: a function of (size, seed, epoch).

    Args:
        size: Number of examples.
        seed: At least 0.
        epoch: From 0.

    Returns:
        A permutation of range(size).
    """
    permutation: list[int] = _permutation(size, seed=seed, epoch=epoch).tolist()
    return permutation


def _permutation(size: int, *, seed: int, epoch: int) -> _Ints:
    return np.random.default_rng([seed, epoch]).permutation(size)


def _order(size: int, *, seed: int, epoch: int, mix: Mix | None) -> _Ints:
    return _permutation(size, seed=seed, epoch=epoch) if mix is None else mix.epoch(seed, epoch)


def epoch_batches(
    epoch_order: Sequence[int],
    lengths: Sequence[int],
    *,
    batch_size: int | None = None,
    batch_tokens: int | None = None,
) -> list[tuple[int, ...]]:
    """Divide an epoch into effective batches; the last one may be shorter, none repeats an example.

    Args:
        epoch_order: The examples of the epoch in order.
        lengths: The length of every example, in tokens.
        batch_size: Examples a batch; or
        batch_tokens: Input tokens a batch, at most; a longer example is a batch by itself.

    Returns:
        The batches in order.

    Raises:
        ConfigError: Not exactly one of the two is given, or it is below 1.
    """
    _exactly_one(batch_size=batch_size, batch_tokens=batch_tokens)
    ends = _ends(np.asarray(lengths)[epoch_order], batch_size=batch_size, batch_tokens=batch_tokens)
    return [tuple(epoch_order[a:b]) for a, b in itertools.pairwise([0, *ends])]


def num_steps(
    lengths: Sequence[int],
    *,
    seed: int,
    epochs: int,
    batch_size: int | None = None,
    batch_tokens: int | None = None,
    mix: Mix | None = None,
) -> int:
    """The number of steps in the first epochs; by ``batch_size`` without looking at the data.

    Args:
        lengths: The length of every example, in tokens.
        seed: Seed of the order.
        epochs: How many.
        batch_size: As for `epoch_batches`.
        batch_tokens: As for `epoch_batches`.
        mix: As for `plan_steps`.

    Returns:
        The steps.
    """
    _exactly_one(batch_size=batch_size, batch_tokens=batch_tokens)
    if batch_size is not None:
        return epochs * -(-len(lengths if mix is None else mix) // batch_size)
    sizes = np.asarray(lengths)
    orders = (_order(len(sizes), seed=seed, epoch=epoch, mix=mix) for epoch in range(epochs))
    return sum(
        len(_ends(sizes[order], batch_size=None, batch_tokens=batch_tokens)) for order in orders
    )


def _exactly_one(**sizes: int | None) -> None:
    values = [value for value in sizes.values() if value is not None]
    if len(values) != 1 or values[0] < 1:
        shown = ", ".join(f"{name}={value}" for name, value in sizes.items())
        raise ConfigError(f"{shown}: give exactly one, at least 1")


def _ends(sizes: _Ints, *, batch_size: int | None, batch_tokens: int | None) -> list[int]:
    """Where each batch ends in an epoch whose examples have these sizes."""
    if batch_size is not None:
        return [*range(batch_size, len(sizes), batch_size), len(sizes)]
    assert batch_tokens is not None
    through = sizes.cumsum()
    ends: list[int] = []
    start = before = 0
    while start < len(sizes):
        fitting = int(through.searchsorted(before + batch_tokens, side="right"))
        start = max(fitting, start + 1)  # a longer example is a batch by itself
        before = int(through[start - 1])
        ends.append(start)
    return ends


def plan_steps(
    lengths: Sequence[int],
    *,
    seed: int,
    batch_size: int | None = None,
    batch_tokens: int | None = None,
    mix: Mix | None = None,
    start: int = 0,
) -> Iterator[StepPlan]:
    """The steps of a run without end, epoch after epoch, from step ``start`` on.

    Args:
        lengths: The length of every example, in tokens; at least one.
        seed: Seed of the order.
        batch_size: As for `epoch_batches`.
        batch_tokens: As for `epoch_batches`.
        mix: What an epoch takes of the examples; None: each once.
        start: First step to yield: a resumed run starts at the step that it had reached.

    Yields:
        One plan a step.
    """
    _exactly_one(batch_size=batch_size, batch_tokens=batch_tokens)
    sizes = np.asarray(lengths)
    size = len(sizes) if mix is None else len(mix)
    first = 0 if batch_size is None else start // -(-size // batch_size)
    step = first if batch_size is None else first * -(-size // batch_size)
    for epoch in itertools.count(first):
        epoch_order = _order(len(sizes), seed=seed, epoch=epoch, mix=mix)
        ends = _ends(sizes[epoch_order], batch_size=batch_size, batch_tokens=batch_tokens)
        skipped = min(max(0, start - step), len(ends))
        step += skipped
        for a, b in itertools.pairwise([0, *ends][skipped:]):
            batch = tuple(epoch_order[a:b].tolist())
            yield StepPlan(step, epoch, epoch + b / size, batch)
            step += 1


def shard_by_cost(lengths: Sequence[int], *, ranks: int) -> list[list[int]]:
    """Divide a step's sequences among ranks, so that all work about equally long.

    A sequence costs its share of all tokens (matrix products) plus its share of all squared
    lengths (attention). The costliest goes first, each to the rank that has the least (longest
    processing time first: at most 4/3 of the best possible, Graham 1969).

    Args:
        lengths: The lengths of the step's sequences, in tokens.
        ranks: At least 1.

    Returns:
        Positions in ``lengths``, ascending, each exactly once, by rank; none for some ranks if
        there are fewer sequences than ranks.
    """
    tokens = max(1, sum(lengths))
    squares = max(1, sum(length**2 for length in lengths))
    costs = [length / tokens + length**2 / squares for length in lengths]
    return [sorted(positions) for positions in _balance(costs, ranks)]


def _balance(costs: Sequence[float], bins: int) -> list[list[int]]:
    """Positions by bin: the costliest first, each into the bin that has the least so far."""
    contents: list[list[int]] = [[] for _ in range(bins)]
    loads = [(0.0, index) for index in range(bins)]
    for position in sorted(range(len(costs)), key=lambda at: (-costs[at], at)):
        load, index = heapq.heappop(loads)
        contents[index].append(position)
        heapq.heappush(loads, (load + costs[position], index))
    return contents


def pack_micro_batches(
    lengths: Sequence[int],
    *,
    micro_batch: int | None = None,
    micro_tokens: int | None = None,
    padded: bool = False,
) -> list[list[int]]:
    """Divide a step's sequences into micro-batches.

    With ``micro_tokens`` this packs first-fit decreasing: longest first, each into the first
    micro-batch with room. At most 11/9 of the fewest possible micro-batches, plus one (Dósa 2007).
    Where the same number of micro-batches can be filled evenly, they are. The largest comes first:
    all others fit into the memory that it leaves.

    Args:
        lengths: The lengths of the step's sequences, in tokens.
        micro_batch: Sequences a micro-batch, taken in order; or
        micro_tokens: Tokens a micro-batch, at most; a longer sequence is alone.
        padded: The budget includes padding to the longest sequence of the micro-batch.

    Returns:
        Positions in ``lengths``, each exactly once, by micro-batch.

    Raises:
        ConfigError: Not exactly one of the two is given, or it is below 1.
    """
    _exactly_one(micro_batch=micro_batch, micro_tokens=micro_tokens)
    if micro_batch is not None:
        positions = list(range(len(lengths)))
        return [positions[i : i + micro_batch] for i in range(0, len(positions), micro_batch)]
    assert micro_tokens is not None
    packed = _first_fit(lengths, micro_tokens, padded=padded)
    if not padded:
        # As many micro-batches, but alike: the largest, which memory is taken for, is smaller.
        balanced = _balance(lengths, len(packed))
        if all(sum(lengths[at] for at in positions) <= micro_tokens for positions in balanced):
            packed = balanced

    def size(positions: list[int]) -> int:
        sizes = [lengths[at] for at in positions]
        return len(sizes) * max(sizes) if padded else sum(sizes)

    return sorted(packed, key=size, reverse=True)


def padding_share(lengths: Sequence[int], micro_batches: Sequence[Sequence[int]]) -> float:
    """The share of padding, if each micro-batch is padded to its longest sequence.

    Args:
        lengths: The lengths of a step's sequences, in tokens.
        micro_batches: Positions in ``lengths``, as `pack_micro_batches` gives them.

    Returns:
        From 0 to 1.
    """
    computed = sum(
        len(positions) * max(lengths[at] for at in positions) for positions in micro_batches
    )
    return 1 - sum(lengths) / computed


def _first_fit(lengths: Sequence[int], budget: int, *, padded: bool) -> list[list[int]]:
    bins: list[list[int]] = []
    room: list[int] = []
    for position in sorted(range(len(lengths)), key=lambda at: (-lengths[at], at)):
        # Longest first: a padded row costs as much as the first of its micro-batch.
        costs = [lengths[members[0]] if padded else lengths[position] for members in bins]
        fit = next((i for i, cost in enumerate(costs) if cost <= room[i]), None)
        if fit is None:
            bins.append([position])
            room.append(budget - lengths[position])
        else:
            bins[fit].append(position)
            room[fit] -= costs[fit]
    return bins
