"""Laws of a micro-batch's place: what it weighs depends on when it comes within its window."""

from collections.abc import Sequence
from itertools import pairwise

from samestep.audit.causes import Diagnosis
from samestep.audit.experiments import Experiments
from samestep.audit.gradients import LeastSquares, least_squares
from samestep.audit.hypotheses import SplitEvidence
from samestep.audit.splits import merged
from samestep.audit.subject import Split

SAME = 1e-6
"""Relative difference up to which two weights are one."""

MIN_KINDS = 3
"""Different weights from which on it is a law: one micro-batch may be lost, or come twice."""


def by_place(
    experiments: Experiments, split: Split, *, evidence: SplitEvidence, **changes: object
) -> Diagnosis | None:
    """Weights that stay at their places when the micro-batches are turned round.

    They are those of the micro-batches' own gradients, as where means are divided by how many came
    so far, or those over the whole's, as where sums over one count are decayed.

    Args:
        experiments: The subject's.
        split: Whose gradient is a sum of the micro-batches' own.
        evidence: Of it.
        **changes: The settings that it was run under.

    Returns:
        None unless there are at least `MIN_KINDS` different weights.
    """
    sizes = {len(micro_batch) for micro_batch in split}
    if experiments.subject.uniform and len(sizes) > 1:
        return None  # a smaller one cannot come first
    if not evidence.independent:
        return None
    turned = split[::-1]
    alone = evidence.alone[::-1]
    whole = experiments.small_gradient(merged(turned), **changes)
    found = [
        _weights(least_squares(gradient, own), least_squares(of_whole, own))
        for gradient, of_whole, own in (
            (evidence.split, evidence.whole, evidence.alone),
            (experiments.small_gradient(turned, **changes), whole, alone),
        )
    ]
    for before, after in zip(*found, strict=True):
        if before is not None and after is not None and _same(before, after):
            if _kinds(before) < MIN_KINDS:
                return None
            shown = " ".join(f"{weight:.4g}" for weight in before)
            text = f"the micro-batches weigh {shown} in this order, whichever of them comes first"
            return Diagnosis("weighted-by-place", 0.0, text)
    return None


def _weights(split: LeastSquares, whole: LeastSquares) -> list[list[float] | None]:
    """Of the micro-batches' own gradients, and those over the whole's; none where it lacks one."""
    own = list(split.coefficients)
    if any(abs(weight) < 1e-9 for weight in whole.coefficients):
        return [own, None]
    return [own, [a / b for a, b in zip(own, whole.coefficients, strict=True)]]


def _same(one: Sequence[float], other: Sequence[float]) -> bool:
    largest = max(map(abs, (*one, *other)))
    return all(abs(a - b) <= SAME * largest for a, b in zip(one, other, strict=True))


def _kinds(weights: Sequence[float]) -> int:
    """How many different weights there are."""
    largest = max(map(abs, weights))
    ranked = sorted(weights)
    gaps = (b - a > SAME * largest for a, b in pairwise(ranked))
    return 1 + sum(gaps)
