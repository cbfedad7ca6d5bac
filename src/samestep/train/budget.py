"""``micro_tokens: auto``: the budget of a micro-batch, from what two micro-batches cost.

A micro-batch of n tokens costs a fixed time (gradients of all weights are written and added up once
a micro-batch) and a time a token; and memory a token on top of what is there anyway. Both lines
follow from two measurements on the first step's own data. Larger micro-batches spread the fixed
time further, with ever less to gain.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from samestep.utils.files import write_atomically

DEFAULT = 1024
"""Tokens a micro-batch where nothing was measured."""

SIZES = (256, 1024)
"""Budgets of the two measurements."""

BUDGETS = (256, 448, 896, 1792)
"""What can be chosen: each about twice the one before, so that noise in a measurement seldom
changes the choice, and no more than keeps every known processor busy, so that it never costs much
memory."""

ENOUGH = 448
"""Less is chosen only for want of memory: where other programs disturb the clock, the fixed costs
of small micro-batches are easily missed, and those are remembered for good."""

FIXED_SHARE = 0.12
"""The choice is the smallest budget that spends at most this share of the time on fixed costs:
twice the budget would save half of it, for twice the activations."""


@dataclass(frozen=True)
class Sample:
    """One measured micro-batch.

    Attributes:
        tokens: Its tokens.
        seconds: Its time; on a CPU, that of all cores together.
        peak: The most memory taken, in bytes; None: unknown.
    """

    tokens: int
    seconds: float
    peak: float | None


@dataclass(frozen=True)
class Costs:
    """What micro-batches cost on one machine.

    Attributes:
        seconds: Of a micro-batch, however small.
        seconds_per_token: On top.
        bytes: Memory of the process while a micro-batch runs, however small; None: unknown.
        bytes_per_token: On top.
    """

    seconds: float
    seconds_per_token: float
    bytes: float | None
    bytes_per_token: float


def fit(small: Sample, large: Sample) -> Costs:
    """The lines through two measurements; the larger one has more tokens."""
    step = large.tokens - small.tokens
    slope = max(large.seconds - small.seconds, 1e-9) / step
    fixed = max(0.0, small.seconds - slope * small.tokens)
    if small.peak is None or large.peak is None:
        return Costs(fixed, slope, None, 0.0)
    growth = max(0.0, large.peak - small.peak) / step
    return Costs(fixed, slope, small.peak - growth * small.tokens, growth)


def best_budget(
    costs: Costs, *, longest: int = 0, limit: float | None = None, reserved: float = 0.0
) -> int:
    """The budget that is nearly the fastest, if memory allows.

    Args:
        costs: What micro-batches cost.
        longest: Tokens of the longest record, which cannot be cut.
        limit: Bytes that the process may take; None: unknown.
        reserved: Bytes that will be taken beside what was measured (the optimizer's state).

    Returns:
        The smallest of `BUDGETS` from `ENOUGH` on whose fixed costs are at most `FIXED_SHARE` of
        its time, or the largest below it that fits; the smallest of all if none does. At least the
        longest record, up to the largest of them: less would take as much memory in the end.
    """
    least = min(longest, BUDGETS[-1])
    if least > ENOUGH and _fits(costs, least, limit, reserved):
        return max(least, best_budget(costs, limit=limit, reserved=reserved))
    fitting = [budget for budget in BUDGETS if _fits(costs, budget, limit, reserved)]
    for budget in (one for one in fitting if one >= ENOUGH):
        whole = costs.seconds + costs.seconds_per_token * budget
        if costs.seconds <= FIXED_SHARE * whole:
            return budget
    return fitting[-1] if fitting else BUDGETS[0]


def peak_bytes(costs: Costs, budget: int, *, reserved: float) -> float | None:
    """The memory that the process will take at its peak, in bytes."""
    if costs.bytes is None:
        return None
    return costs.bytes + reserved + costs.bytes_per_token * budget


def _fits(costs: Costs, budget: int, limit: float | None, reserved: float) -> bool:
    peak = peak_bytes(costs, budget, reserved=reserved)
    return peak is None or limit is None or peak <= limit


def measured(
    tokens: Callable[[int], Sequence[int]], run: Callable[[int, int], Sample]
) -> Costs | None:
    """Measure two micro-batches.

    Args:
        tokens: The tokens of each micro-batch that the first step is cut into under a budget.
        run: Runs one of them, (budget, its place), forward and backward.

    Returns:
        The costs; None if the step is too small to hold micro-batches of two sizes.
    """
    few, many = tokens(SIZES[0]), tokens(SIZES[1])
    smallest, largest = min(few), max(many)
    if largest < 2 * smallest:
        return None
    small = (SIZES[0], few.index(smallest))
    large = (SIZES[1], many.index(largest))
    run(*small)  # the first one also compiles kernels and fills caches
    turns = [
        (run(*small), run(*large)) for _ in range(2)
    ]  # in turn, so that a disturbance hits both
    return fit(*(_quickest(samples) for samples in zip(*turns, strict=True)))


def _quickest(samples: Sequence[Sample]) -> Sample:
    """The least disturbed time, and the memory of the first run."""
    seconds = min(sample.seconds for sample in samples)
    return Sample(samples[0].tokens, seconds, samples[0].peak)


def remembered(path: Path, measure: Callable[[], Costs | None]) -> Costs | None:
    """The costs that a file holds; measured and written if there is none.

    Args:
        path: The file; its name stands for the model, the settings and the machine.
        measure: Gives the costs.

    Returns:
        The costs; None if they cannot be measured, which is not written.
    """
    try:
        return Costs(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # not there, or damaged: measure again
        costs = measure()
    if costs is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(asdict(costs)) + "\n")
    return costs
