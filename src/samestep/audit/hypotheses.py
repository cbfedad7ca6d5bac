"""Hypotheses: the gradients that known bugs would give, from those of the micro-batches alone."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from samestep.audit.causes import Cause
from samestep.audit.experiments import Experiments
from samestep.audit.gradients import (
    LeastSquares,
    are_independent,
    is_finite,
    least_squares,
    linear_combination,
    scale,
)
from samestep.audit.splits import merged
from samestep.audit.subject import Denominator, Gradient, Split
from samestep.errors import CheckError


@dataclass(frozen=True)
class Hypothesis:
    """A bug, and the gradient that it predicts.

    Attributes:
        cause: A name in `samestep.audit.causes.CAUSES`, or of a cause of the user's.
        gradient: The prediction.
        weighting: How it weights the micro-batches, in words.
        scales_whole: Whether it only scales the gradient of the undivided batch.
    """

    cause: str
    gradient: Gradient
    weighting: str
    scales_whole: bool = False


@dataclass(frozen=True)
class SplitEvidence:
    """What was measured of one split that is inexact, where no gradient is clipped.

    Attributes:
        split: The gradient of the split.
        whole: The gradient of the undivided batch.
        alone: The gradient of each micro-batch alone.
        examples: How many examples each micro-batch holds.
        targets: How many targets each holds, or None.
        denominators: What a loop could divide by, of each micro-batch and, last, of the whole.
        residual_tolerance: Residual that counts as explained.
    """

    split: Gradient
    whole: Gradient
    alone: Sequence[Gradient]
    examples: Sequence[int]
    targets: Sequence[int] | None
    denominators: Sequence[Mapping[str, Denominator]]
    residual_tolerance: float

    @cached_property
    def of_whole(self) -> LeastSquares:
        """The whole as a sum of the micro-batches' own gradients."""
        return least_squares(self.whole, self.alone)

    @cached_property
    def of_split(self) -> LeastSquares:
        """The split as such a sum."""
        return least_squares(self.split, self.alone)

    @cached_property
    def independent(self) -> bool:
        """Whether the weights of such a sum are the only ones that give it."""
        return are_independent(self.alone)


def collect_evidence(experiments: Experiments, split: Split, **changes: object) -> SplitEvidence:
    """Run what a diagnosis of a split needs.

    Args:
        experiments: The subject's.
        split: The split that is inexact.
        **changes: The settings that it was run under.
    """
    counts = experiments.subject.example_counts()
    masked = changes.get("masked_examples") or ()
    assert isinstance(masked, tuple)
    targets = None
    if counts is not None:
        of_example = [0 if at in masked else each.targets for at, each in enumerate(counts)]
        targets = [sum(of_example[index] for index in micro_batch) for micro_batch in split]
    whole = merged(split)
    return SplitEvidence(
        split=experiments.small_gradient(split, **changes),
        whole=experiments.small_gradient(whole, **changes),
        alone=[
            _alone(experiments, micro, empty=targets is not None and not targets[at], **changes)
            for at, micro in enumerate(split)
        ],
        examples=[len(micro_batch) for micro_batch in split],
        targets=targets,
        denominators=[experiments.denominators(micro, **changes) for micro in (*split, *whole)],
        residual_tolerance=experiments.residual_tolerance,
    )


def only_weights(evidence: SplitEvidence, names: Sequence[str]) -> SplitEvidence:
    """The evidence of these weights alone.

    Args:
        evidence: Of all.
        names: Of the weights to keep.
    """

    def of(gradient: Gradient) -> Gradient:
        return {name: gradient[name] for name in names if name in gradient}

    return replace(
        evidence,
        split=of(evidence.split),
        whole=of(evidence.whole),
        alone=[of(each) for each in evidence.alone],
    )


def _alone(
    experiments: Experiments, micro_batch: tuple[int, ...], *, empty: bool, **changes: object
) -> Gradient:
    """The gradient of a micro-batch; nothing of one without targets that cannot be run alone."""
    try:
        gradient = experiments.small_gradient((micro_batch,), **changes)
    except Exception:  # the subject's code: it need not know what to do without any target
        if not empty:
            raise
        return {}
    return {} if empty and not is_finite(gradient) else gradient


def hypotheses(evidence: SplitEvidence, causes: Iterable[Cause] = ()) -> Iterator[Hypothesis]:
    """What each linear bug would give, the commonest first.

    Args:
        evidence: Of an inexact split.
        causes: Those that predict weights of the micro-batches come last.
    """
    alone, number = evidence.alone, len(evidence.alone)

    def weighted(cause: str, weights: Sequence[float], weighting: str) -> Hypothesis:
        return Hypothesis(cause, linear_combination(alone, weights), weighting)

    yield from _by_accumulation(evidence)
    yield weighted("mean-of-means", [1 / number] * number, "all alike")
    yield weighted("unscaled-sum", [1.0] * number, "added up")
    yield weighted("example-weighted", _shares(evidence.examples), "by examples")
    if evidence.targets is not None and sum(evidence.targets) > 0:
        yield weighted("example-weighted", _shares(evidence.targets), "by targets")
    yield from _multiples_of_whole(evidence)
    yield from _only_one(evidence)
    for name, (cause, _) in evidence.denominators[0].items():
        counts = [held[name].value for held in evidence.denominators[:-1] if name in held]
        if len(counts) == number and sum(counts) > 0:
            yield weighted(cause, _shares(counts), f"by {name}")
    for own in causes:
        weights = None if own.weights is None else own.weights(evidence)
        if weights is None:
            continue
        if len(weights) != number:
            raise CheckError(
                f"cause {own.name!r}: weights gives {len(weights)} numbers for {number} "
                "micro-batches"
            )
        yield weighted(own.name, weights, f"as {own.name} says")


def _by_accumulation(evidence: SplitEvidence) -> Iterator[Hypothesis]:
    """Scales of the whole gradient by the accumulation.

    They come first: where the loop divides by a constant, all micro-batches weigh alike too.
    """
    number = len(evidence.alone)
    yield _scaled(evidence, "unscaled-sum", number, "the whole, times the accumulation")
    yield _scaled(evidence, "divided-twice", 1 / number, "the whole, over the accumulation")


def _scaled(evidence: SplitEvidence, cause: str, factor: float, weighting: str) -> Hypothesis:
    return Hypothesis(cause, scale(evidence.whole, factor), weighting, scales_whole=True)


def _multiples_of_whole(evidence: SplitEvidence) -> Iterator[Hypothesis]:
    """Scales of the whole gradient by a count that the split changes, or by a wrong one."""
    *parts, whole = evidence.denominators
    for name, (cause, of_whole) in whole.items():
        split = sum(held[name].value for held in parts if name in held)
        if split and split != of_whole:
            yield _scaled(evidence, cause, of_whole / split, f"the whole, by {name}")
    if evidence.targets is None:
        return
    for name, (cause, count) in whole.items():
        if cause != "example-weighted" and sum(evidence.targets) > 0 and count:
            factor, text = sum(evidence.targets) / count, f"by {name} in place of the targets"
            yield _scaled(evidence, cause, factor, f"the whole, {text}")


def _only_one(evidence: SplitEvidence) -> Iterator[Hypothesis]:
    """One micro-batch alone: the last or the first, as it is or as its share."""
    number = len(evidence.alone)
    for kept in (number - 1, 0):
        shares = [1.0, 1 / number, evidence.examples[kept] / sum(evidence.examples)]
        if evidence.targets is not None and sum(evidence.targets) > 0:
            shares.append(evidence.targets[kept] / sum(evidence.targets))
        for share in shares:
            gradient = scale(evidence.alone[kept], share)
            yield Hypothesis("last-micro-batch-only", gradient, f"micro-batch {kept + 1} alone")


def _shares(counts: Sequence[float]) -> list[float]:
    total = float(sum(counts))
    return [count / total for count in counts]
