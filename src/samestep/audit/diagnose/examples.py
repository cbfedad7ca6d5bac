"""Example by example: repeats and losses, values that meet the wrong examples, means over groups.

The gradients of a split and of the whole batch are fitted to those of the examples alone.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_high, median_low

from samestep.audit.causes import UNEXPLAINED, Diagnosis
from samestep.audit.diagnose.state import carried_over, order_dependence
from samestep.audit.experiments import Experiments
from samestep.audit.gradients import (
    LeastSquares,
    are_independent,
    global_norm,
    least_squares,
    rank,
    relative_difference,
    subtract,
)
from samestep.audit.hypotheses import SplitEvidence, collect_evidence
from samestep.audit.splits import merged
from samestep.audit.subject import Gradient, Split

WHOLE_NUMBER = 1e-4
"""How far a multiple may be from a whole number and still be one."""

MOST_COPIES = 2
"""Of an example in the whole batch, beside the first; with more, any fraction were a multiple."""

NEIGHBOURS = 5
"""Of different lengths, that an example is put beside."""

TERMS = 2
"""Directions that a loss of two units makes of one example beside different neighbours."""


@dataclass(frozen=True)
class _Fit:
    """How much of each example is in a split, over how much is in the whole batch."""

    members: tuple[int, ...]
    ratios: dict[int, float]
    residual: float
    chosen: tuple[int, ...]
    """Examples that the split takes in and the whole batch leaves out."""


def fits_by_example(
    experiments: Experiments, split: Split, *, evidence: SplitEvidence, **changes: object
) -> bool:
    """Whether both gradients are sums over the examples' own."""
    return _fit(experiments, split, evidence=evidence, **changes) is not None


def by_example(
    experiments: Experiments, split: Split, *, evidence: SplitEvidence, **changes: object
) -> Diagnosis | None:
    """Examples that weigh more or less than those that share their micro-batch.

    Returns:
        None where the fit fails, where all weigh alike, or where no law of examples explains it.
    """
    fit = _fit(experiments, split, evidence=evidence, **changes)
    if fit is None:
        return None
    readings = _readings(fit, split)
    relative = readings[-1]
    if fit.chosen and all(_is_multiple(each, of_whole=1) for each in relative.values()):
        out = ", ".join(f"example {index}" for index in fit.chosen)
        text = f"the whole batch leaves out {out}, which the split takes in"
        if _is_whole_the_same_reversed(experiments, split, evidence, **changes):
            text = f"{text}: which examples count is chosen among those that share a batch"
            return Diagnosis("batch-coupled-term", fit.residual, text)
        return Diagnosis("dropped-examples", fit.residual, text)
    if not _odd(relative):
        return None
    group = next(
        (
            name
            for name, groups in _groups(experiments, fit.members, **changes)
            if _is_by_group(relative, split, groups)
        ),
        None,
    )
    copies = _as_copies(readings, most=_most_copies(experiments, split))
    if copies is not None and group is not None:
        # A weight by group may happen to be a whole number, but not in every cut.
        elsewhere = _readings_elsewhere(experiments, split, **changes)
        copies = copies if all(elsewhere) else None
    if copies is not None:
        dropped = all(abs(times) < WHOLE_NUMBER for times in copies.values())
        cause = "dropped-examples" if dropped else "duplicated-examples"
        return Diagnosis(cause, fit.residual, _said(copies))
    text = _said(_odd(relative))
    ordered = order_dependence(experiments, split, **changes) or 0.0
    if ordered > evidence.residual_tolerance:
        text = f"{text}; the order of the micro-batches changes it by {ordered:.1e}"
        carried = carried_over(experiments, split, **changes)
        if carried is not None:
            return Diagnosis("state-per-micro-batch", fit.residual, f"{text}; {carried}")
        return Diagnosis("misaligned-values", fit.residual, text)
    if group is not None:
        text = f"examples of one {group} in a micro-batch weigh alike, others do not; {text}"
        return Diagnosis("mean-of-means", fit.residual, text)
    return None


def _is_whole_the_same_reversed(
    experiments: Experiments, split: Split, evidence: SplitEvidence, **changes: object
) -> bool:
    """Whether the whole batch leaves out the same examples when they come in another order."""
    turned = experiments.small_gradient((merged(split)[0][::-1],), **changes)
    return relative_difference(turned, evidence.whole) <= evidence.residual_tolerance


def _readings(fit: _Fit, split: Split) -> list[dict[int, float]]:
    """What examples weigh within their micro-batch, whose usual weight may be either middle."""
    return [dict(_within_micro_batches(fit, split, usual)) for usual in (median_low, median_high)]


def _as_copies(readings: Iterable[Mapping[int, float]], *, most: int) -> dict[int, float] | None:
    """The examples that are there more or less often than others; None where a part of one is."""
    for odd in map(_odd, readings):
        if all(_is_multiple(times, of_whole=most) for times in odd.values()):
            return odd
    return None


def _readings_elsewhere(
    experiments: Experiments, split: Split, **changes: object
) -> Iterator[bool]:
    """Whether examples are there a whole number of times in other cuts that can be fitted."""
    for other in other_cuts(split):
        try:
            evidence = collect_evidence(experiments, other, **changes)
            fit = _fit(experiments, other, evidence=evidence, **changes)
        except Exception:  # the subject is the user's code: it may refuse another cut
            continue
        if fit is not None:
            most = _most_copies(experiments, other)
            yield _as_copies(_readings(fit, other), most=most) is not None


def other_cuts(split: Split) -> Iterator[Split]:
    """The same examples from the back: in micro-batches of the same sizes, and of others."""
    members = merged(split)[0][::-1]
    rest = iter(members)
    yield tuple(tuple(next(rest) for _ in micro_batch) for micro_batch in split)
    for size in (4, 3):
        yield tuple(members[at : at + size] for at in range(0, len(members), size))


def _fit(
    experiments: Experiments, split: Split, *, evidence: SplitEvidence, **changes: object
) -> _Fit | None:
    """The fit of split and whole to the examples alone; None where one is no sum of them."""
    members = merged(split)[0]
    own = [experiments.small_gradient(((index,),), **changes) for index in members]
    whole, parts = least_squares(evidence.whole, own), least_squares(evidence.split, own)
    if max(whole.residual, parts.residual) > evidence.residual_tolerance or not are_independent(
        own
    ):
        return None
    triples = zip(members, parts.coefficients, whole.coefficients, strict=True)
    chosen = tuple(at for at, own, of_all in triples if abs(of_all) < 1e-9 < 1e-6 < abs(own))
    return _Fit(members, _ratios(members, parts=parts, whole=whole), parts.residual, chosen)


def _ratios(
    members: Sequence[int], *, parts: LeastSquares, whole: LeastSquares
) -> dict[int, float]:
    pairs = zip(members, parts.coefficients, whole.coefficients, strict=True)
    return {
        index: own / of_whole if abs(of_whole) > 1e-9 else 1.0 for index, own, of_whole in pairs
    }


def _within_micro_batches(
    fit: _Fit, split: Split, usual: Callable[[Iterable[float]], float]
) -> Iterator[tuple[int, float]]:
    """The weight of each example over the usual one of its micro-batch, which is one of them."""
    for micro_batch in split:
        middle = usual(fit.ratios[index] for index in micro_batch)
        if middle:
            yield from ((index, fit.ratios[index] / middle) for index in micro_batch)


def _odd(relative: Mapping[int, float]) -> dict[int, float]:
    return {index: times for index, times in relative.items() if abs(times - 1) > WHOLE_NUMBER}


def _said(odd: Mapping[int, float]) -> str:
    text = ", ".join(f"example {index} x {times:.4g}" for index, times in odd.items())
    return f"within their micro-batch: {text}"


def _most_copies(experiments: Experiments, split: Split) -> int:
    """How often the whole batch may hold an example, judged by the rows that it has too many."""
    whole = merged(split)[0]
    shapes = [experiments.subject.batch_shape((index,)) for index in whole]
    together = experiments.subject.batch_shape(whole)
    if together is None or together[0] == sum(shape[0] for shape in shapes if shape):
        return 1  # unknown, or every example has its rows, once
    return 1 + min(MOST_COPIES, max(0, together[0] - len(whole)))


def _is_multiple(times: float, *, of_whole: int) -> bool:
    """Whether a weight over that in the whole batch is one of copies over copies."""
    multiples = [times * copies for copies in range(1, of_whole + 1)]
    return times > -WHOLE_NUMBER and any(abs(m - round(m)) <= WHOLE_NUMBER for m in multiples)


def _groups(
    experiments: Experiments, members: Sequence[int], **changes: object
) -> Iterator[tuple[str, dict[int, float]]]:
    """Fields of the batch that could be a group: few values, several examples of one of them."""
    held = [experiments.denominators((index,), **changes) for index in members]
    for name in held[0]:
        if not name.startswith("sum of ") or not all(name in each for each in held):
            continue
        values = {index: each[name].value for index, each in zip(members, held, strict=True)}
        if 1 < len(set(values.values())) < len(members):
            yield name.removeprefix("sum of "), values


def _is_by_group(relative: dict[int, float], split: Split, groups: dict[int, float]) -> bool:
    """Whether examples of one group weigh alike within each micro-batch, and some share one."""
    shared = False
    for micro_batch in split:
        cells: dict[float, list[float]] = {}
        for index in micro_batch:
            cells.setdefault(groups[index], []).append(relative.get(index, 1.0))
        if any(max(cell) - min(cell) > WHOLE_NUMBER for cell in cells.values()):
            return False
        shared = shared or any(len(cell) > 1 for cell in cells.values())
    return shared


def cut_by_neighbours(experiments: Experiments, **changes: object) -> Diagnosis | None:
    """Whether what is kept of an example depends on how long its neighbours are.

    Examples of equal lengths add up, so no statistic couples them. An example's own part beside a
    neighbour (the change of the gradient as its tokens change) has one direction for each unit
    that the loss divides by; lost tokens give more.
    """
    counts = experiments.subject.example_counts()
    if counts is None or changes.get("packed"):
        return None
    by_length = sorted(range(len(counts)), key=lambda index: counts[index].length)
    neighbours = by_length[:: max(1, len(by_length) // NEIGHBOURS)]
    best, at = 0, 0
    for example in {by_length[-1], by_length[-2], by_length[len(by_length) // 2]}:
        for first in (False, True):
            directions = _directions(
                experiments, example, neighbours, neighbour_first=first, **changes
            )
            best, at = max((best, at), (directions, example))
            if best > TERMS:
                break
    if best <= TERMS:
        return None
    text = (
        f"beside neighbours of different lengths, the part of example {at} has {best} directions: "
        "how much of it is kept depends on them, though examples of equal lengths add up"
    )
    # Beside padding on the left, another place of the row looks the same.
    left = "left" in experiments.subject.padding_sides()
    return Diagnosis(UNEXPLAINED if left else "dropped-examples", 0.0, text)


def has_two_units(experiments: Experiments, split: Split, **changes: object) -> bool:
    """Whether the loss divides an example's terms by two sums over those that share its batch.

    What tokens of an example change points along two directions then, beside ever other examples;
    with one unit it points along one, whatever it is multiplied by.
    """
    if changes.get("packed"):
        return False
    *others, example = merged(split)[0]
    found = _directions(experiments, example, others[: TERMS + 1], neighbour_first=False, **changes)
    return found == TERMS


def _directions(
    experiments: Experiments,
    example: int,
    neighbours: Sequence[int],
    *,
    neighbour_first: bool,
    **changes: object,
) -> int:
    """How many directions the part of an example has, alone and beside each neighbour."""
    beside = (
        _own_part(experiments, example, neighbour, neighbour_first=neighbour_first, **changes)
        for neighbour in (None, *neighbours)
    )
    return rank([part for part in beside if part is not None and global_norm(part)])


def _own_part(
    experiments: Experiments,
    example: int,
    neighbour: int | None,
    *,
    neighbour_first: bool,
    **changes: object,
) -> Gradient | None:
    """How a gradient changes with the tokens of an example, beside a neighbour or alone."""
    if neighbour == example:
        return None
    members = (example,) if neighbour is None else (example, neighbour)
    members = members[::-1] if neighbour_first else members
    try:
        own = experiments.small_gradient((members,), **changes)
        altered = experiments.small_gradient((members,), **changes, altered_examples=(example,))
    except Exception:  # the subject is the user's code: it may refuse changed inputs
        return None
    part = subtract(own, altered)
    return part if global_norm(part) > 1e-6 * global_norm(own) else None
