"""Bugs that hit some weights only: the others are exact, and these follow a law of their own."""

from collections.abc import Callable, Iterable, Sequence

from samestep.audit.causes import Cause, Diagnosis
from samestep.audit.diagnose.ties import Scored, fit_alike, is_tied, undecided
from samestep.audit.gradients import compare_gradients, global_norm, least_squares, subtract
from samestep.audit.hypotheses import SplitEvidence, hypotheses, only_weights
from samestep.audit.subject import Gradient

Part = Callable[[Sequence[Scored], Sequence[str]], list[Scored]]
"""`samestep.audit.diagnose.ties.tell_apart` for a split: of the fits, and the weights' names."""

SHOWN = 3
"""Names of weights in a line of evidence."""


def by_weights(evidence: SplitEvidence, causes: Iterable[Cause], *, part: Part) -> Diagnosis | None:
    """The law of the weights that are inexact, where others are exact.

    Args:
        evidence: Of an inexact split.
        causes: Those that could be named, the user's own too.
        part: Tells hypotheses apart that fit alike.

    Returns:
        None unless some weights are exact, some are not, and those follow a known law.
    """
    every = compare_gradients(evidence.split, evidence.whole, most=len(evidence.whole) + 1).worst
    bound = evidence.residual_tolerance
    at_fault = [name for name, difference in every if not difference <= bound]
    size = global_norm(evidence.whole)
    exact = [
        name
        for name, difference in every
        if difference <= bound and float(evidence.whole[name].norm()) > 1e-6 * size
    ]
    if not at_fault or not exact:
        return None
    own = only_weights(evidence, at_fault)
    shown = _shown(at_fault, exact)
    if not global_norm(own.split) or not global_norm(own.whole):
        which = "the split" if not global_norm(own.split) else "the undivided batch"
        return Diagnosis("weights-left-out", 0.0, f"no gradient in {which}: {shown}")
    return _law(own, causes, shown, part=part)


def _law(
    own: SplitEvidence, causes: Iterable[Cause], shown: str, *, part: Part
) -> Diagnosis | None:
    """The hypothesis that predicts the weights at fault, or the one micro-batch that they keep."""
    scored = [
        (compare_gradients(each.gradient, own.split).relative_difference, each)
        for each in hypotheses(own, causes)
    ]
    if own.of_whole.residual > own.residual_tolerance:
        return None  # the fault lies within micro-batches: no law of counts explains the whole
    difference = compare_gradients(own.split, own.whole).relative_difference
    best = min(residual for residual, _ in scored)
    if best <= min(own.residual_tolerance, 0.1 * difference):
        fits = fit_alike(scored, bound=own.residual_tolerance)
        fits = part(fits, list(own.whole)) if is_tied(fits) else fits
        if is_tied(fits):
            return undecided(fits)
        residual, hypothesis = fits[0]
        text = f"{shown}; there micro-batches are weighted {hypothesis.weighting}"
        return Diagnosis(hypothesis.cause, residual, text)
    for number, alone in enumerate(own.alone):
        if not global_norm(alone):
            continue
        fit = least_squares(own.split, [alone])
        if fit.residual <= own.residual_tolerance and _elements(own.split) > 1:
            text = f"{shown}; there micro-batch {number + 1} alone is kept"
            return Diagnosis("last-micro-batch-only", fit.residual, text)
    return None


def several_laws(
    evidence: SplitEvidence, causes: Iterable[Cause], *, part: Part
) -> Diagnosis | None:
    """Laws side by side, where every weight is exact or follows one, and not all the same.

    Args:
        evidence: Of an inexact split.
        causes: Those that could be named, the user's own too.
        part: Tells hypotheses apart that fit alike.

    Returns:
        The law of the weights that differ most, the others beside it.
    """
    every = compare_gradients(evidence.split, evidence.whole, most=len(evidence.whole) + 1).worst
    found: dict[str, list[str]] = {}
    size = global_norm(evidence.whole)
    for name, difference in every:
        if difference <= evidence.residual_tolerance:
            continue
        own = only_weights(evidence, [name])
        if global_norm(subtract(own.split, own.whole)) <= evidence.residual_tolerance * size:
            continue
        law = _law(own, causes, "", part=part) if _elements(own.split) > 1 else None
        if law is None:
            return None
        found.setdefault(law.cause, []).append(name)
    if len(found) < 2:
        return None
    ranked = sorted(found, key=lambda cause: -_difference(evidence, found[cause]))
    text = "; ".join(f"{cause}: {', '.join(found[cause][:SHOWN])}" for cause in ranked)
    return Diagnosis(ranked[0], 0.0, f"weights follow laws of their own: {text}", tuple(ranked[1:]))


def _difference(evidence: SplitEvidence, names: Sequence[str]) -> float:
    """How far these weights are from where they should be."""
    own = only_weights(evidence, names)
    return global_norm(subtract(own.split, own.whole))


def _elements(gradient: Gradient) -> int:
    return sum(tensor.numel() for tensor in gradient.values())


def _shown(at_fault: Sequence[str], exact: Sequence[str]) -> str:
    rest = f" and {len(at_fault) - SHOWN} more" if len(at_fault) > SHOWN else ""
    return f"{', '.join(at_fault[:SHOWN])}{rest} (the other {len(exact)} weights are exact)"
