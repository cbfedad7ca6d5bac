"""Laws of a micro-batch's size, and norms of a part: what scales gradients that are right in kind.

Where a split and its whole are both sums of the micro-batches' own gradients, their coefficients
say how much of each micro-batch the split holds over how much the whole does. Where each weight's
gradient is the unclipped one times a factor, all were added up before they were clipped.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from samestep.audit.causes import Diagnosis
from samestep.audit.gradients import global_norm, least_squares
from samestep.audit.hypotheses import SplitEvidence
from samestep.audit.subject import Gradient

SAME = 1e-6
"""Relative difference up to which two factors are one."""

MINIMUM = 1e-6
"""Norm of a weight's gradient over the whole gradient's from which on it has a direction."""


def by_size(evidence: SplitEvidence) -> Diagnosis | None:
    """A factor of each micro-batch that depends on how many examples it holds, and on nothing else.

    Micro-batches of one size have to have one factor although their targets differ, and the factor
    has to grow, or to fall, from each size to the next: what is alike for some sizes depends on
    something else.
    """
    ratios = _ratios(evidence)
    if ratios is None:
        return None
    by: dict[int, list[float]] = {}
    counts: dict[int, set[int]] = {}
    for at, (size, ratio) in enumerate(zip(evidence.examples, ratios, strict=True)):
        by.setdefault(size, []).append(ratio)
        counts.setdefault(size, set()).add(at if evidence.targets is None else evidence.targets[at])
    repeated = [values for size, values in by.items() if len(counts[size]) > 1]
    if not repeated or not all(_alike(values) for values in repeated):
        return None
    if not _strictly_monotone([values[0] for _, values in sorted(by.items())]):
        return None
    shown = ", ".join(f"{size} x {values[0]:.4g}" for size, values in sorted(by.items()))
    text = f"over the whole batch's, a micro-batch weighs by its number of examples alone: {shown}"
    return Diagnosis("weighted-by-size", 0.0, text)


def by_two_units(evidence: SplitEvidence) -> Diagnosis | None:
    """Micro-batches that weigh by one unit in the split and by another one in the whole.

    How much of a micro-batch the split holds over how much the whole does is free of what a
    micro-batch that runs alone is divided by. So it tells laws apart that weight the micro-batches'
    own gradients alike: any loop that does not know its window adds these up.
    """
    ratios = _ratios(evidence)
    if ratios is None:
        return None
    units = list(units_of(evidence))
    alike = Unit("all alike", "mean-of-means", [1.0] * len(ratios), float(len(ratios)))
    for of_whole in units:
        held = [ratio * count for ratio, count in zip(ratios, of_whole.counts, strict=True)]
        for of_split in (*units, alike):
            if is_proportional(of_split.counts, of_whole.counts):
                continue
            if not is_proportional(held, of_split.counts):
                continue
            cause = _cause_of(of_split, of_whole, total=sum(held) / of_whole.whole)
            text = f"micro-batches weigh {of_split.name} in the split, {of_whole.name} in the whole"
            return Diagnosis(cause, 0.0, text) if cause is not None else None
    return None


@dataclass(frozen=True)
class Unit:
    """What a loop could weigh by: how it is said, the cause that it is, and how many there are.

    Attributes:
        name: In words.
        cause: Where a loop takes it for another.
        counts: Of each micro-batch.
        whole: Of the undivided batch, which may hold more: padding.
    """

    name: str
    cause: str
    counts: Sequence[float]
    whole: float


def units_of(evidence: SplitEvidence) -> Iterator[Unit]:
    """Targets, examples, and all that can be counted in every micro-batch.

    Args:
        evidence: Of a split.
    """
    if evidence.targets is not None:
        yield Unit("by targets", "example-weighted", evidence.targets, sum(evidence.targets))
    yield Unit("by examples", "example-weighted", evidence.examples, sum(evidence.examples))
    *parts, whole = evidence.denominators
    for name, (cause, value) in whole.items():
        if all(name in held for held in parts):
            yield Unit(f"by {name}", cause, [held[name].value for held in parts], value)


def _cause_of(of_split: Unit, of_whole: Unit, *, total: float) -> str | None:
    """What it is to weigh by these two; `total` is the split's scale over the whole's.

    Returns:
        None where all weigh alike, and are neither averaged nor added up.
    """
    if of_split.name == "all alike" and abs(total - 1) > SAME:
        return "unscaled-sum" if abs(total / of_split.whole - 1) <= SAME else None
    wrong = (unit.cause for unit in (of_split, of_whole) if unit.cause != "example-weighted")
    return next(wrong, "example-weighted")


def is_proportional(values: Sequence[float], others: Sequence[float]) -> bool:
    """Whether numbers are others times one factor; never of what is not above 0."""
    if not all(value > 0 for value in (*values, *others)):
        return False
    return _alike([value / other for value, other in zip(values, others, strict=True)])


def whole_follows_a_count(evidence: SplitEvidence) -> bool:
    """Whether the whole weighs micro-batches by shares, or all alike, as sums over counts do."""
    if evidence.residual_tolerance > SAME:
        return True  # coarse arithmetic: its weights are not known to enough digits to deny it
    if not evidence.independent:
        return True  # many weights give the same whole
    whole = evidence.of_whole
    return abs(sum(whole.coefficients) - 1) <= SAME or _alike(list(whole.coefficients))


def whole_follows_a_unit(evidence: SplitEvidence) -> bool:
    """Whether the whole weighs micro-batches all alike, or by something that can be counted."""
    weights = evidence.of_whole.coefficients
    counts = [unit.counts for unit in units_of(evidence)]
    return any(is_proportional(weights, each) for each in ([1.0] * len(weights), *counts))


def _ratios(evidence: SplitEvidence) -> list[float] | None:
    """How much of each micro-batch the split holds, over how much the whole does."""
    whole = evidence.of_whole
    split = evidence.of_split
    if max(whole.residual, split.residual) > evidence.residual_tolerance:
        return None
    if not evidence.independent:
        return None
    if any(abs(own) < 1e-9 for own in (*whole.coefficients, *split.coefficients)):
        return None
    pairs = zip(split.coefficients, whole.coefficients, strict=True)
    return [own / of_whole for own, of_whole in pairs]


def _strictly_monotone(values: list[float]) -> bool:
    least = SAME * max(map(abs, values))
    steps = [after - before for before, after in pairwise(values)]
    grows, falls = all(s > least for s in steps), all(s < -least for s in steps)
    return bool(steps) and (grows or falls)


def _alike(values: list[float]) -> bool:
    return max(values) - min(values) <= SAME * max(map(abs, values))


def of_one_length(evidence: SplitEvidence) -> Diagnosis | None:
    """Whether gradients are brought to one length before they are added up, whatever they hold.

    Args:
        evidence: Of a split; one that has that length too is scaled after the addition.
    """
    lengths = [global_norm(each) for each in (evidence.whole, *evidence.alone)]
    if min(lengths) <= 0 or not _alike(lengths) or _alike([global_norm(evidence.split), *lengths]):
        return None
    text = (
        f"each micro-batch alone has a gradient of length {lengths[0]:.4g}, and so has the whole: "
        "each is scaled before it is added"
    )
    return Diagnosis("clip-per-micro-batch", 0.0, text)


def shortened_after_adding(
    observed: Gradient, unclipped: Gradient, *, bound: float
) -> Diagnosis | None:
    """Whether each weight's gradient is the unclipped one times a factor of its own.

    Clipping before the addition changes directions; clipping after it by the norm of a part does
    not.

    Args:
        observed: The clipped gradient.
        unclipped: The same step's, too small to be clipped.
        bound: Relative residual up to which two gradients have one direction.
    """
    factors = _factors(observed, unclipped, bound=bound)
    if not factors:
        return None
    kinds = sorted({float(f"{factor:.4g}") for factor in factors.values()})
    shown = ", ".join(f"x {factor:.4g}" for factor in kinds[:4])
    text = (
        f"each of {len(factors)} weights has the direction of the unclipped gradient, shortened "
        f"({shown}): all was added up before it was clipped"
    )
    return Diagnosis("partial-norm", 0.0, text)


def _factors(
    observed: Gradient, unclipped: Gradient, *, bound: float
) -> Mapping[str, float] | None:
    """By weight; None where one has another direction."""
    least = MINIMUM * global_norm(unclipped)
    factors = {}
    for name, expected in unclipped.items():
        if float(expected.norm()) <= least or expected.numel() < 2:
            continue
        if name not in observed:
            return None
        fit = least_squares({name: observed[name]}, [{name: expected}])
        if fit.residual > bound:
            return None
        factors[name] = fit.coefficients[0]
    return factors
