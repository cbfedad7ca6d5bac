"""The plan: which examples make a step, and how a step is cut into micro-batches.

All pure functions. What a step holds depends on (seed, epoch) and the batch size alone; how it is
dealt out to ranks and cut depends on the lengths, the number of ranks and the budget alone, and
cannot change the step.
"""

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from samestep.errors import ConfigError


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


def order(size: int, *, seed: int, epoch: int) -> list[int]:
    """The order of the examples in an epoch: a function of (size, seed, epoch).

    Args:
        size: Number of examples.
        seed: At least 0.
        epoch: From 0.

    Returns:
        A permutation of range(size).
    """
    permutation: list[int] = np.random.default_rng([seed, epoch]).permutation(size).tolist()
    return permutation


def cut_epoch(
    epoch_order: Sequence[int],
    lengths: Sequence[int],
    *,
    batch_size: int | None = None,
    batch_tokens: int | None = None,
) -> list[tuple[int, ...]]:
    """Cut an epoch into effective batches; the last one may be shorter, none repeats an example.

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
    given = [value for value in (batch_size, batch_tokens) if value is not None]
    if len(given) != 1 or given[0] < 1:
        raise ConfigError(
            f"batch_size={batch_size}, batch_tokens={batch_tokens}: give exactly one, at least 1"
        )
    if batch_size is not None:
        starts = range(0, len(epoch_order), batch_size)
        return [tuple(epoch_order[start : start + batch_size]) for start in starts]
    assert batch_tokens is not None
    batches: list[list[int]] = []
    room = 0
    for example in epoch_order:
        if lengths[example] > room:
            batches.append([])
            room = batch_tokens
        batches[-1].append(example)
        room -= lengths[example]
    return [tuple(batch) for batch in batches]


def plan_steps(
    lengths: Sequence[int],
    *,
    seed: int,
    batch_size: int | None = None,
    batch_tokens: int | None = None,
    start: int = 0,
) -> Iterator[StepPlan]:
    """The steps of a run without end, epoch after epoch, from step ``start`` on.

    Args:
        lengths: The length of every example, in tokens; at least one.
        seed: Seed of the order.
        batch_size: As for `cut_epoch`.
        batch_tokens: As for `cut_epoch`.
        start: First step to yield: a resumed run starts at the step that it had reached.

    Yields:
        One plan a step.
    """
    step = 0
    for epoch in itertools.count():
        epoch_order = order(len(lengths), seed=seed, epoch=epoch)
        seen = 0
        for batch in cut_epoch(
            epoch_order, lengths, batch_size=batch_size, batch_tokens=batch_tokens
        ):
            seen += len(batch)
            if step >= start:
                yield StepPlan(step, epoch, epoch + seen / len(lengths), batch)
            step += 1


def deal(lengths: Sequence[int], *, ranks: int) -> list[list[int]]:
    """Deal a step's sequences out to ranks, so that all work about equally long.

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
    hands: list[list[int]] = [[] for _ in range(ranks)]
    piles = [(0.0, rank) for rank in range(ranks)]
    for position in sorted(range(len(lengths)), key=lambda at: (-costs[at], at)):
        load, rank = heapq.heappop(piles)
        hands[rank].append(position)
        heapq.heappush(piles, (load + costs[position], rank))
    return [sorted(hand) for hand in hands]


def cut_step(
    lengths: Sequence[int],
    *,
    micro_batch: int | None = None,
    micro_tokens: int | None = None,
    padded: bool = False,
) -> list[list[int]]:
    """Cut a step's sequences into micro-batches.

    With ``micro_tokens`` this packs first-fit decreasing: longest first, each into the first
    micro-batch with room. At most 11/9 of the fewest possible micro-batches, plus one (Dósa 2007).

    Args:
        lengths: The lengths of the step's sequences, in tokens.
        micro_batch: Sequences a micro-batch, taken in the given order; or
        micro_tokens: Tokens a micro-batch, at most; a longer sequence is alone.
        padded: The budget includes padding to the longest sequence of the micro-batch.

    Returns:
        Positions in ``lengths``, each exactly once, by micro-batch.

    Raises:
        ConfigError: Not exactly one of the two is given, or it is below 1.
    """
    given = [value for value in (micro_batch, micro_tokens) if value is not None]
    if len(given) != 1 or given[0] < 1:
        raise ConfigError(
            f"micro_batch={micro_batch}, micro_tokens={micro_tokens}: give exactly one, at least 1"
        )
    if micro_batch is not None:
        positions = list(range(len(lengths)))
        return [positions[i : i + micro_batch] for i in range(0, len(positions), micro_batch)]
    assert micro_tokens is not None
    bins: list[list[int]] = []
    room: list[int] = []
    for position in sorted(range(len(lengths)), key=lambda at: (-lengths[at], at)):
        # Longest first: a padded row costs as much as the first of its micro-batch.
        costs = [lengths[one[0]] if padded else lengths[position] for one in bins]
        fit = next((i for i, cost in enumerate(costs) if cost <= room[i]), None)
        if fit is None:
            bins.append([position])
            room.append(micro_tokens - lengths[position])
        else:
            bins[fit].append(position)
            room[fit] -= costs[fit]
    return bins
