"""Two laws at once: one weights the micro-batches, another one scales or loses some of them."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from samestep.audit.causes import Diagnosis
from samestep.audit.diagnose.sizes import is_proportional, units_of
from samestep.audit.diagnose.ties import Scored
from samestep.audit.gradients import relative_difference, scale
from samestep.audit.hypotheses import SplitEvidence

MIN_LEFT = 1e-6
"""Weight below which a micro-batch is lost."""


def scaled_too(
    evidence: SplitEvidence, scored: Sequence[Scored], *, bound: float
) -> Diagnosis | None:
    """A law whose result is multiplied, or divided, by the accumulation besides.

    Args:
        evidence: Of a split that no law explains by itself.
        scored: The laws.
        bound: The residual that counts as explained.

    Returns:
        None unless one pair of causes explains the split, and no other.
    """
    number = len(evidence.alone)
    found: dict[tuple[str, str], Diagnosis] = {}
    laws = [law for _, law in scored if not law.scales_whole and "alone" not in law.weighting]
    for law in laws:
        for factor, beside in ((1 / number, "divided-twice"), (float(number), "unscaled-sum")):
            if law.cause == beside:
                continue
            residual = relative_difference(scale(law.gradient, factor), evidence.split)
            if residual <= bound:
                text = f"micro-batches weighted {law.weighting}, and the sum times {factor:.4g}"
                found.setdefault(
                    (law.cause, beside), Diagnosis(law.cause, residual, text, (beside,))
                )
    return next(iter(found.values())) if len(found) == 1 else None


def weighted_too(
    diagnosis: Diagnosis, evidence: SplitEvidence, *, split: Sequence[float], whole: Sequence[float]
) -> Diagnosis:
    """A diagnosis of lost micro-batches, with the law that weights the others beside it.

    Args:
        diagnosis: Of the lost ones.
        evidence: Of the split.
        split: The weights of the micro-batches' own gradients in it.
        whole: Those in the undivided batch.
    """
    kept = [at for at, weight in enumerate(split) if abs(weight) > MIN_LEFT]
    own = [split[at] for at in kept]
    if len(kept) < 2 or is_proportional(own, [whole[at] for at in kept]):
        return diagnosis
    causes = {
        cause
        for cause, counts in _laws(evidence)
        if is_proportional(own, [counts[at] for at in kept])
    }
    return replace(diagnosis, also=tuple(causes)) if len(causes) == 1 else diagnosis


def _laws(evidence: SplitEvidence) -> Iterator[tuple[str, Sequence[float]]]:
    yield "mean-of-means", [1.0] * len(evidence.alone)
    for unit in units_of(evidence):
        yield unit.cause, unit.counts
