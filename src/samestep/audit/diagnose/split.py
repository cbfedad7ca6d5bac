"""Names the bug behind a split's difference: predict the gradient of each bug, and score it.

No reference is needed. The micro-batches of a split are run alone, each as if it were the effective
batch; known bugs combine those gradients in known ways. The whole batch run undivided shows what
the loop itself takes for the answer.
"""

from collections.abc import Sequence

from samestep.audit.causes import UNEXPLAINED, Diagnosis
from samestep.audit.diagnose.coupling import coupling, diagnose_seen_padding, leak_in_row
from samestep.audit.diagnose.draws import drawn_otherwise
from samestep.audit.diagnose.examples import (
    by_example,
    cut_by_neighbours,
    fits_by_example,
    has_two_units,
    other_cuts,
)
from samestep.audit.diagnose.overlaps import scaled_too, weighted_too
from samestep.audit.diagnose.places import by_place
from samestep.audit.diagnose.sizes import (
    by_size,
    by_two_units,
    of_one_length,
    shortened_after_adding,
    whole_follows_a_count,
    whole_follows_a_unit,
)
from samestep.audit.diagnose.state import (
    carried_over,
    moved_between,
    moved_without_gradient,
    order_dependence,
)
from samestep.audit.diagnose.ties import Scored, fit_alike, is_tied, tell_apart, undecided
from samestep.audit.diagnose.weights import by_weights, several_laws
from samestep.audit.experiments import Experiments
from samestep.audit.gradients import (
    LeastSquares,
    compare_gradients,
    is_finite,
    least_squares,
    relative_difference,
)
from samestep.audit.hypotheses import SplitEvidence, collect_evidence, hypotheses
from samestep.audit.splits import merged
from samestep.audit.subject import Split


def diagnose_split(experiments: Experiments, split: Split, **changes: object) -> Diagnosis:
    """Why a split gives another gradient than the whole batch.

    Args:
        experiments: The subject's.
        split: The split at fault.
        **changes: The settings that it was run under.

    Returns:
        The cause that predicts the gradient best, if it predicts it at all.
    """
    if not experiments.is_deterministic:
        return Diagnosis("rng", 0.0, "the same run from the same seed gives another gradient")
    stepped = _by_updates(experiments, split, **changes)
    if stepped is not None:
        return stepped
    evidence = collect_evidence(experiments, split, **changes)
    difference = relative_difference(evidence.split, evidence.whole)
    if difference <= experiments.small_tolerance:
        # With small gradients the split is exact: what remains is what is done to large ones.
        natural, bound = experiments.natural_gradient(split, **changes), evidence.residual_tolerance
        whole = experiments.natural_gradient(merged(split), **changes)
        if relative_difference(natural, whole) <= experiments.tolerance:
            moved = moved_without_gradient(experiments, split, **changes)
            return moved or _of_order(experiments, split, evidence=evidence, **changes)
        partial = shortened_after_adding(natural, evidence.split, bound=bound)
        return partial or Diagnosis("clip-per-micro-batch", difference, _shown(evidence))
    diagnosis = moved_between(experiments, split, **changes)

    def part(fits: Sequence[Scored], names: Sequence[str]) -> list[Scored]:
        return tell_apart(experiments, split, fits, names=names, **changes)

    diagnosis = diagnosis or of_one_length(evidence)
    diagnosis = diagnosis or by_weights(evidence, experiments.causes.values(), part=part)
    diagnosis = diagnosis or _by_hypothesis(
        experiments, split, evidence=evidence, difference=difference, **changes
    )
    diagnosis = _confirmed(experiments, split, diagnosis, evidence=evidence, **changes)
    if diagnosis.cause in (UNEXPLAINED, "second-term-per-micro-batch"):
        diagnosis = several_laws(evidence, experiments.causes.values(), part=part) or diagnosis
    if _bends_large_gradients(experiments, split, **changes):
        text = f"gradients are cut short before they are added; besides, {diagnosis.cause}: "
        beside = () if diagnosis.cause == UNEXPLAINED else (diagnosis.cause, *diagnosis.also)
        return Diagnosis("clip-per-micro-batch", 0.0, text + diagnosis.evidence, beside)
    return diagnosis


def _confirmed(
    experiments: Experiments,
    split: Split,
    diagnosis: Diagnosis,
    *,
    evidence: SplitEvidence,
    **changes: object,
) -> Diagnosis:
    """The diagnosis, or that of another cut if this one fits by an accident of its own.

    A whole that is no sum of the micro-batches' own may be one where these happen to hold groups in
    equal shares.
    """
    if diagnosis.cause != "example-weighted" or whole_follows_a_unit(evidence):
        return diagnosis
    other = next(other_cuts(split))
    try:
        there = collect_evidence(experiments, other, **changes)
        difference = relative_difference(there.split, there.whole)
        if difference <= experiments.small_tolerance:
            return diagnosis
        found = _by_hypothesis(experiments, other, evidence=there, difference=difference, **changes)
    except Exception:  # the subject is the user's code: it may refuse another cut
        return diagnosis
    return diagnosis if found.cause == UNEXPLAINED else found


def _of_order(
    experiments: Experiments, split: Split, *, evidence: SplitEvidence, **changes: object
) -> Diagnosis:
    """Why another order changes a step that no split of one order changes."""
    moved = experiments.seed_sensitivity(split, **changes)
    if moved > experiments.small_tolerance:
        text = f"another seed changes the gradient by {moved:.1e}, another split does not: "
        return Diagnosis("rng", moved, f"{text}random numbers are drawn example after example")
    text = "this split gives the gradient of the whole; only another order does not; "
    return Diagnosis(UNEXPLAINED, 0.0, text + _shown(evidence))


def is_faulty(experiments: Experiments, split: Split) -> bool:
    """Whether the split is inexact by itself; then it has the same fault under any settings."""
    whole = merged(split)
    natural = relative_difference(experiments.run(split).gradient, experiments.run(whole).gradient)
    if natural > experiments.tolerance:
        return True
    small = experiments.small_gradient(split), experiments.small_gradient(whole)
    return relative_difference(*small) > experiments.small_tolerance


def diagnose_empty(
    experiments: Experiments, split: Split, *, masked_examples: tuple[int, ...]
) -> Diagnosis:
    """Why a micro-batch without targets changes the step."""
    if is_faulty(experiments, split):
        return diagnose_split(experiments, split)
    if not is_finite(experiments.run(split, masked_examples=masked_examples).gradient):
        return Diagnosis("mean-of-means", 0.0, "the empty micro-batch divides 0 by 0")
    return diagnose_split(experiments, split, masked_examples=masked_examples)


def _bends_large_gradients(experiments: Experiments, split: Split, **changes: object) -> bool:
    """Whether large gradients point elsewhere than small ones in the split, not in the whole."""
    if not experiments.keeps_scale:
        return False
    of_split, of_whole = (
        compare_gradients(
            experiments.run(each, **changes).gradient, experiments.small_gradient(each, **changes)
        ).perpendicular
        for each in (split, merged(split))
    )
    return of_split > experiments.residual_tolerance >= of_whole


def _by_updates(experiments: Experiments, split: Split, **changes: object) -> Diagnosis | None:
    """Whether weights move between the micro-batches."""
    cause = "optimizer-step-per-micro-batch"
    observed = experiments.run(split, **changes)
    if observed.updates > experiments.run(merged(split), **changes).updates:
        text = f"{observed.updates} optimizer steps for {len(split)} micro-batches"
        return Diagnosis(cause, 0.0, text)
    if observed.updates:
        return None
    as_steps = experiments.run_as_steps(split, **changes)
    if as_steps is None:
        return None
    residual = relative_difference(as_steps.gradient, observed.gradient)
    alone = [experiments.run((micro,), **changes).gradient for micro in split]
    as_sum = least_squares(observed.gradient, alone).residual
    if residual > experiments.residual_tolerance or residual > 0.1 * as_sum:
        return None
    text = "the micro-batches as steps of their own, one after another, give this update"
    return Diagnosis(cause, residual, text)


def _by_hypothesis(
    experiments: Experiments,
    split: Split,
    *,
    evidence: SplitEvidence,
    difference: float,
    **changes: object,
) -> Diagnosis:
    """The hypothesis that fits, or a cause that is no combination of the micro-batches' own."""
    causes = experiments.causes.values()
    scored = [
        (relative_difference(hypothesis.gradient, evidence.split), hypothesis)
        for hypothesis in hypotheses(evidence, causes)
    ]
    best = min(residual for residual, _ in scored)
    bound = min(evidence.residual_tolerance, 0.1 * difference)
    if best > bound:
        twofold = scaled_too(evidence, scored, bound=bound)
        if twofold is not None:
            return twofold
        return _nonlinear(experiments, split, evidence=evidence, best=best, **changes)
    fits = fit_alike(scored, bound=evidence.residual_tolerance)
    diagnosis = _checked(experiments, split, evidence=evidence, fit=fits[0], **changes)
    if diagnosis.cause != fits[0][1].cause or not is_tied(fits):
        return diagnosis
    left = tell_apart(experiments, split, fits, names=None, **changes)
    if is_tied(left):
        return undecided(left)
    return _checked(experiments, split, evidence=evidence, fit=left[0], **changes)


def _checked(
    experiments: Experiments,
    split: Split,
    *,
    evidence: SplitEvidence,
    fit: Scored,
    **changes: object,
) -> Diagnosis:
    """A hypothesis that fits, unless the micro-batches' own gradients already hold the fault."""
    residual, hypothesis = fit
    text = f"micro-batches weighted {hypothesis.weighting}{_in_words(evidence)}; {_shown(evidence)}"
    whole = evidence.of_whole
    if not hypothesis.scales_whole and whole.residual > evidence.residual_tolerance:
        inside = _inside(experiments, split, evidence=evidence, **changes)
        if inside is not None:
            return inside
    if not hypothesis.scales_whole and not whole_follows_a_count(evidence):
        # What weights the micro-batches' own gradients says nothing of a whole that no count makes.
        known = by_size(evidence) or by_two_units(evidence)
        if known is not None:
            return known
        coupled = coupling(experiments, split, **changes)
        if coupled is not None and coupled > evidence.residual_tolerance:
            return Diagnosis("batch-coupled-term", coupled, text)
        if whole.residual > evidence.residual_tolerance and has_two_units(
            experiments, split, **changes
        ):
            return Diagnosis(hypothesis.cause, residual, f"{text}; the loss has two units")
        unknown = Diagnosis(UNEXPLAINED, residual, f"the whole follows no count; {text}")
        return by_example(experiments, split, evidence=evidence, **changes) or unknown
    if hypothesis.cause == "example-weighted":
        # The unit of the whole may be no count but a size of the micro-batch as a whole.
        coupled = coupling(experiments, split, **changes)
        if coupled is not None and coupled > evidence.residual_tolerance:
            return Diagnosis("batch-coupled-term", coupled, text)
    return Diagnosis(hypothesis.cause, residual, text)


def _nonlinear(
    experiments: Experiments,
    split: Split,
    *,
    evidence: SplitEvidence,
    best: float,
    **changes: object,
) -> Diagnosis:
    """Causes that are no known combination of the micro-batches' own gradients."""
    moved = experiments.seed_sensitivity(split, **changes)
    if moved > experiments.small_tolerance:
        text = f"the same cut from another seed differs by {moved:.1e}"
        draws = experiments.run(split, **changes, watch_moves=True).draws
        return Diagnosis("rng", moved, text, ("recomputed-differently",) if draws else ())
    whole = evidence.of_whole
    parts = evidence.of_split
    residual = max(whole.residual, parts.residual)
    if residual <= evidence.residual_tolerance:
        known = by_size(evidence) or by_place(experiments, split, evidence=evidence, **changes)
        known = known or _lost_or_repeated(whole, parts, evidence=evidence)
        if known is not None:
            return known
    drawn = drawn_otherwise(experiments, (split, changes), (merged(split), changes))
    if drawn is not None:
        text = (
            f"micro-batches draw random numbers in turn; others change the gradient by {drawn:.1e}"
        )
        return Diagnosis("rng", drawn, text)
    inside = _inside(experiments, split, evidence=evidence, **changes)
    if inside is not None:
        return inside
    ordered = order_dependence(experiments, split, **changes) or 0.0
    if ordered > evidence.residual_tolerance:
        text = f"the order of the micro-batches changes the gradient by {ordered:.1e}; "
        carried = carried_over(experiments, split, **changes)
        cause = UNEXPLAINED if carried is None else "state-per-micro-batch"
        return Diagnosis(cause, best, f"{text}{_and(carried)}{_shown(evidence)}")
    explained = fits_by_example(experiments, split, evidence=evidence, **changes)
    if residual > evidence.residual_tolerance and not explained:
        text = (
            f"{residual:.1e} of the gradient is no sum of the micro-batches' own, though examples "
            f"of equal counts add up; {_shown(evidence)}"
        )
        return Diagnosis("second-term-per-micro-batch", residual, text)
    return Diagnosis(UNEXPLAINED, best, _shown(evidence))


def _inside(
    experiments: Experiments, split: Split, *, evidence: SplitEvidence, **changes: object
) -> Diagnosis | None:
    """A fault within micro-batches: repeats, padding that is seen, examples that are coupled."""
    diagnosis = _by_labels(experiments, evidence, **changes)
    diagnosis = diagnosis or by_example(experiments, split, evidence=evidence, **changes)
    if diagnosis is None and not changes:
        diagnosis = diagnose_seen_padding(experiments)
    if diagnosis is not None:
        return diagnosis
    coupled = coupling(experiments, split, **changes)
    if coupled is not None and coupled <= evidence.residual_tolerance:
        return cut_by_neighbours(experiments, **changes)
    leak = leak_in_row(experiments, split, **changes)
    if leak is not None:
        return Diagnosis(leak, coupled or 0.0, _shown(evidence))
    text = "" if coupled is None else f"two equal examples miss the sum by {coupled:.1e}; "
    return Diagnosis("batch-coupled-term", coupled or 0.0, text + _shown(evidence))


def _by_labels(
    experiments: Experiments, evidence: SplitEvidence, **changes: object
) -> Diagnosis | None:
    """Labels that the collator loses or repeats where examples share a batch."""
    if changes.get("packed") or "labels" not in evidence.denominators[-1]:
        return None
    singles, (whole,) = experiments.single_examples, experiments.whole_batch
    shapes = [experiments.subject.batch_shape(micro_batch) for micro_batch in singles]
    if any(shape is not None and shape[0] != 1 for shape in shapes):
        return None  # even alone they are not what they are
    alone = sum(experiments.number_of_labels(micro, **changes) for micro in singles)
    together = experiments.number_of_labels(whole, **changes)
    padded = experiments.number_of_labels(whole, **changes, extra_padding=1)
    if padded != together or alone == together:  # padding that has labels is another fault
        return None
    text = f"the examples hold {alone:g} labels one by one, {together:g} in one batch"
    cause = "dropped-examples" if together < alone else "duplicated-examples"
    return Diagnosis(cause, 0.0, text)


def _lost_or_repeated(
    whole: LeastSquares, split: LeastSquares, *, evidence: SplitEvidence
) -> Diagnosis | None:
    """Micro-batches that do not reach the update, or that reach it more than once."""
    if not evidence.independent:
        return None
    pairs = zip(split.coefficients, whole.coefficients, strict=True)
    times = [own / of_whole if abs(of_whole) > 1e-9 else 1.0 for own, of_whole in pairs]
    kept = sum(abs(each) > 1e-6 for each in times)
    if kept == len(evidence.alone):
        least = min(times)
        multiples = [each / least for each in times] if least > 0 else [0.5]
        whole_numbers = all(abs(each - round(each)) < 1e-6 for each in multiples)
        if not whole_numbers or max(multiples) < 1.5:
            return None
        text = ", ".join(f"micro-batch {at + 1} x {each:.3g}" for at, each in enumerate(multiples))
        return Diagnosis("duplicated-examples", split.residual, f"{text}; {_shown(evidence)}")
    cause = "last-micro-batch-only" if kept <= 1 else "dropped-examples"
    lost = Diagnosis(cause, split.residual, _shown(evidence))
    return weighted_too(lost, evidence, split=split.coefficients, whole=whole.coefficients)


def _and(text: str | None) -> str:
    return "" if text is None else f"{text}; "


def _in_words(evidence: SplitEvidence) -> str:
    """What each micro-batch weighs, and would by its targets; empty if it cannot be said."""
    parts = evidence.of_split
    targets = evidence.targets
    if targets is None or not sum(targets) or parts.residual > evidence.residual_tolerance:
        return ""
    if not evidence.independent:
        return ""
    weights = " ".join(f"{weight:.3g}" for weight in parts.coefficients)
    shares = " ".join(f"{count / sum(targets):.3g}" for count in targets)
    return f": they weigh {weights}, by targets it would be {shares}"


def _shown(evidence: SplitEvidence) -> str:
    """The coefficients of both gradients on the micro-batches' own, for the reader."""
    whole = evidence.of_whole
    split = evidence.of_split
    targets = evidence.targets
    counts = "" if targets is None else f"; targets {' '.join(map(str, targets))}"
    if not evidence.independent:
        counts += "; these gradients depend on each other, so other weights fit as well"
    return (
        f"on the micro-batches' own gradients: whole = [{whole}] "
        f"(residual {whole.residual:.0e}), split = [{split}] "
        f"(residual {split.residual:.0e}); examples {' '.join(map(str, evidence.examples))}{counts}"
    )
