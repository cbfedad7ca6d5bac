"""The gradients that known bugs would give, from those of the micro-batches alone."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from samestep.audit.runs import Runs
from samestep.audit.subject import Cut, Gradient
from samestep.audit.vectors import combine


@dataclass(frozen=True)
class Law:
    """A bug, and what it predicts.

    Attributes:
        cause: A name in `samestep.audit.causes.CAUSES`.
        gradient: The prediction.
        words: How it weights the micro-batches.
        of_whole: Whether it only scales the gradient of the undivided batch.
    """

    cause: str
    gradient: Gradient
    words: str
    of_whole: bool = False


@dataclass(frozen=True)
class Case:
    """Everything that is known about one difference, where no gradient is clipped.

    Attributes:
        split: The gradient of the cut.
        whole: The gradient of the undivided batch.
        alone: The gradient of each micro-batch alone.
        examples: How many examples each micro-batch holds.
        targets: How many targets each holds, or None.
        counts: Of each micro-batch and, last, of the whole: `samestep.audit.subject` counts.
        close: Residual that counts as explained.
    """

    split: Gradient
    whole: Gradient
    alone: Sequence[Gradient]
    examples: Sequence[int]
    targets: Sequence[int] | None
    counts: Sequence[Mapping[str, tuple[str, float]]]
    close: float


LINEAR = 1e-6
"""Residual below which a prediction explains a gradient, or what counts as exact if more."""


def closeness(runs: Runs) -> float:
    """The residual that counts as explained."""
    return max(LINEAR, runs.tolerance)


def case_of(runs: Runs, cut: Cut, **changes: object) -> Case:
    """Run what a diagnosis needs."""
    facts = runs.subject.facts()
    everything = tuple(index for micro in cut for index in micro)
    masked = changes.get("masked") or ()
    assert isinstance(masked, tuple)
    targets = None
    if facts is not None:
        counted = [0 if at in masked else one.targets for at, one in enumerate(facts)]
        targets = [sum(counted[index] for index in micro) for micro in cut]
    return Case(
        split=runs.gradient(cut, **changes),
        whole=runs.gradient((everything,), **changes),
        alone=[
            _alone(runs, micro, empty=targets is not None and not targets[at], **changes)
            for at, micro in enumerate(cut)
        ],
        examples=[len(micro) for micro in cut],
        targets=targets,
        counts=[runs.counts(micro, **changes) for micro in (*cut, everything)],
        close=closeness(runs),
    )


def _alone(runs: Runs, micro: tuple[int, ...], *, empty: bool, **changes: object) -> Gradient:
    """The gradient of a micro-batch; nothing of one without targets that cannot be run alone."""
    try:
        found = runs.gradient((micro,), **changes)
    except Exception:  # the subject's code: it need not know what to do without any target
        if not empty:
            raise
        return {}
    finite = all(bool(tensor.isfinite().all()) for tensor in found.values())
    return {} if empty and not finite else found


def laws(case: Case) -> Iterator[Law]:
    """What each linear bug would give, the commonest first."""
    alone, number = case.alone, len(case.alone)
    yield Law("mean-of-means", combine(alone, [1 / number] * number), "all alike")
    yield Law("unscaled-sum", combine(alone, [1.0] * number), "added up")
    yield Law("example-weighted", combine(alone, _shares(case.examples)), "by examples")
    if case.targets is not None and sum(case.targets) > 0:
        words = "by targets"
        yield Law("example-weighted", combine(alone, _shares(case.targets)), words)
    yield from _multiples(case, number)
    yield from _kept(case)
    for name, (cause, _) in case.counts[0].items():
        parts = [found[name][1] for found in case.counts[:-1] if name in found]
        if len(parts) == number and sum(parts) > 0:
            yield Law(cause, combine(alone, _shares(parts)), f"by {name}")


def _multiples(case: Case, number: int) -> Iterator[Law]:
    """Scales of the whole gradient: by the accumulation, or by a count that the cut changes."""

    def scaled(cause: str, factor: float, words: str) -> Law:
        return Law(cause, combine([case.whole], [factor]), words, of_whole=True)

    yield scaled("unscaled-sum", number, "the whole, times the accumulation")
    yield scaled("divided-twice", 1 / number, "the whole, over the accumulation")
    *parts, whole = case.counts
    for name, (cause, of_whole) in whole.items():
        split = sum(found[name][1] for found in parts if name in found)
        if split and split != of_whole:
            yield scaled(cause, of_whole / split, f"the whole, by {name}")
    if case.targets is None:
        return
    for name, (cause, count) in whole.items():
        if cause != "example-weighted" and sum(case.targets) > 0 and count:
            factor = sum(case.targets) / count
            yield scaled(cause, factor, f"the whole, by {name} in place of the targets")


def _kept(case: Case) -> Iterator[Law]:
    """One micro-batch alone: the last or the first, as it is or as its share."""
    number = len(case.alone)
    for kept in (number - 1, 0):
        shares = [1.0, 1 / number, case.examples[kept] / sum(case.examples)]
        if case.targets is not None and sum(case.targets) > 0:
            shares.append(case.targets[kept] / sum(case.targets))
        for share in shares:
            gradient = combine([case.alone[kept]], [share])
            yield Law("last-micro-batch-only", gradient, f"micro-batch {kept + 1} alone")


def _shares(counts: Sequence[float]) -> list[float]:
    total = float(sum(counts))
    return [one / total for one in counts]
