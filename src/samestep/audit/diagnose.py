"""Names the law behind a split's difference: predict the gradient of each bug, and score it.

No reference is needed. The micro-batches of a cut are run alone, each as if it were the effective
batch; known bugs combine those gradients in known ways. The whole batch run undivided tells what
the loop itself thinks the answer is.
"""

from statistics import median

from samestep.audit.causes import Diagnosis
from samestep.audit.laws import Case, Law, case_of, closeness, laws
from samestep.audit.layout import padding_seen
from samestep.audit.neighbours import coupled, leak
from samestep.audit.runs import Runs
from samestep.audit.subject import Cut
from samestep.audit.vectors import Fit, across, compare, fit


def diagnose_split(runs: Runs, cut: Cut, **changes: object) -> Diagnosis:
    """Why a cut gives another gradient than the whole batch.

    Args:
        runs: The subject.
        cut: The cut at fault.
        **changes: The setting that it was run under.

    Returns:
        The cause that predicts the gradient best, if it predicts it at all.
    """
    if not runs.repeats:
        return Diagnosis("rng", 0.0, "the same run from the same seed gives another gradient")
    stepped = _by_updates(runs, cut, **changes)
    if stepped is not None:
        return stepped
    case = case_of(runs, cut, **changes)
    difference = compare(case.split, case.whole).relative_difference
    if difference <= runs.small_tolerance:
        # With small gradients the cut is exact: what remains is what is done to large ones.
        return Diagnosis("clip-per-micro-batch", difference, _evidence(case))
    if _bent(runs, cut, **changes):
        also = _by_law(runs, cut, case, difference, **changes)
        evidence = f"gradients are cut short before they are added; besides, {also.cause}: "
        return Diagnosis("clip-per-micro-batch", 0.0, evidence + also.evidence)
    return _by_law(runs, cut, case, difference, **changes)


def _bent(runs: Runs, cut: Cut, **changes: object) -> bool:
    """Whether large gradients point elsewhere than small ones in the cut, but not in the whole."""
    if not runs.scalable:
        return False
    whole = tuple(index for micro in cut for index in micro)
    turned = [
        across(compare(runs.run(one, **changes).gradient, runs.gradient(one, **changes)))
        for one in (cut, (whole,))
    ]
    return turned[0] > closeness(runs) >= turned[1]


def _by_law(runs: Runs, cut: Cut, case: Case, difference: float, **changes: object) -> Diagnosis:
    best = min(
        ((compare(law.gradient, case.split).relative_difference, law) for law in laws(case)),
        key=lambda pair: pair[0],
    )
    if best[0] <= min(case.close, 0.1 * difference):
        residual, law = _first_of_equals(case, best[0])
        return _checked(runs, cut, case, residual, law, **changes)
    return _nonlinear(runs, cut, case, best[0], **changes)


def _first_of_equals(case: Case, best: float) -> tuple[float, Law]:
    """The first law in the list wins among equals, as where all micro-batches are of one size."""
    allowed = max(10 * best, 1e-3 * case.close)
    scored = ((compare(law.gradient, case.split).relative_difference, law) for law in laws(case))
    return next((residual, law) for residual, law in scored if residual <= allowed)


def _by_updates(runs: Runs, cut: Cut, **changes: object) -> Diagnosis | None:
    """Whether weights move between the micro-batches."""
    whole = tuple(index for micro in cut for index in micro)
    split, undivided = runs.run(cut, **changes), runs.run((whole,), **changes)
    if split.updates > undivided.updates:
        evidence = f"{split.updates} optimizer steps for {len(cut)} micro-batches"
        return Diagnosis("optimizer-step-per-micro-batch", 0.0, evidence)
    if split.updates:
        return None
    chained = runs.chained(cut, **changes)
    if chained is None:
        return None
    residual = compare(chained.gradient, split.gradient).relative_difference
    alone = [runs.run((micro,), **changes).gradient for micro in cut]
    straight = fit(split.gradient, alone).residual
    if residual > closeness(runs) or residual > 0.1 * straight:
        return None
    evidence = "the micro-batches as steps of their own, one after another, give this update"
    return Diagnosis("optimizer-step-per-micro-batch", residual, evidence)


def _checked(
    runs: Runs, cut: Cut, case: Case, residual: float, law: Law, **changes: object
) -> Diagnosis:
    """A law that fits, unless the micro-batches' own gradients already hold the fault."""
    evidence = f"micro-batches weighted {law.words}; {_evidence(case)}"
    if not law.of_whole and fit(case.whole, case.alone).residual > case.close:
        inner = _inside(runs, cut, case, **changes)
        if inner is not None:
            return inner
    if law.cause == "example-weighted":
        # The unit of the whole may be no count but a size of the micro-batch as a whole.
        apart = coupled(runs, cut, **changes)
        if apart is not None and apart > case.close:
            return Diagnosis("batch-coupled-term", apart, evidence)
    return Diagnosis(law.cause, residual, evidence)


def _nonlinear(runs: Runs, cut: Cut, case: Case, best: float, **changes: object) -> Diagnosis:
    """Causes that are no known combination of the micro-batches' own gradients."""
    moved = runs.moved_by_seed(cut, **changes)
    if moved > runs.small_tolerance:
        return Diagnosis("rng", moved, f"the same cut from another seed differs by {moved:.1e}")
    whole, split = fit(case.whole, case.alone), fit(case.split, case.alone)
    if whole.residual <= case.close and split.residual <= case.close:
        lost = _lost(whole, split, case)
        if lost is not None:
            return lost
    inner = _inside(runs, cut, case, **changes)
    if inner is not None:
        return inner
    residual = max(whole.residual, split.residual)
    if residual > case.close:
        return Diagnosis(
            "second-term-per-micro-batch",
            residual,
            f"{residual:.1e} of the gradient is no sum of the micro-batches' own, though examples "
            f"of equal counts add up; {_evidence(case)}",
        )
    return Diagnosis("unexplained", best, _evidence(case))


def _inside(runs: Runs, cut: Cut, case: Case, **changes: object) -> Diagnosis | None:
    """A fault within micro-batches: repeats, padding that is seen, examples that feel others."""
    kept = _by_labels(runs, case, **changes)
    if kept is not None:
        return kept
    repeated = _by_example(runs, cut, case, **changes)
    if repeated is not None:
        return repeated
    padded = None if changes else padding_seen(runs)
    if padded is not None:
        return padded
    apart = coupled(runs, cut, **changes)
    if apart is not None and apart <= case.close:
        return None
    if leak(runs, cut, **changes) is not None:
        return Diagnosis(str(leak(runs, cut, **changes)), apart or 0.0, _evidence(case))
    evidence = "" if apart is None else f"two equal examples miss the sum by {apart:.1e}; "
    return Diagnosis("batch-coupled-term", apart or 0.0, evidence + _evidence(case))


def _by_labels(runs: Runs, case: Case, **changes: object) -> Diagnosis | None:
    """Labels that the collator loses or repeats where examples share a batch."""
    if changes.get("packed") or "labels" not in case.counts[-1]:
        return None
    shapes = [runs.subject.shape(micro) for micro in runs.singles]
    if any(shape is not None and shape[0] != 1 for shape in shapes):
        return None  # even alone they are not what they are
    alone = sum(runs.counts(one, **changes)["labels"][1] for one in runs.singles)
    together = runs.counts(runs.whole[0], **changes)["labels"][1]
    padded = runs.counts(runs.whole[0], **changes, padding=1).get("labels", ("", 0.0))[1]
    if padded != together or alone == together:  # padding that has labels is another fault
        return None
    evidence = f"the examples hold {alone:g} labels one by one, {together:g} in one batch"
    cause = "dropped-examples" if together < alone else "duplicated-examples"
    return Diagnosis(cause, 0.0, evidence)


def _lost(whole: Fit, split: Fit, case: Case) -> Diagnosis | None:
    """Micro-batches that do not reach the update."""
    kept = [
        number
        for number, (s, w) in enumerate(zip(split.coefficients, whole.coefficients, strict=True))
        if abs(w) < 1e-9 or abs(s / w) > 1e-6
    ]
    if len(kept) == len(case.alone):
        return None
    cause = "last-micro-batch-only" if len(kept) <= 1 else "dropped-examples"
    return Diagnosis(cause, split.residual, _evidence(case))


def _by_example(runs: Runs, cut: Cut, case: Case, **changes: object) -> Diagnosis | None:
    """Examples that weigh more or less than those that share their micro-batch."""
    members = [index for micro in cut for index in micro]
    own = [runs.gradient(((index,),), **changes) for index in members]
    whole, split = fit(case.whole, own), fit(case.split, own)
    if max(whole.residual, split.residual) > case.close:
        return None
    ratios = {
        index: s / w if abs(w) > 1e-9 else 1.0
        for index, s, w in zip(members, split.coefficients, whole.coefficients, strict=True)
    }
    off = [
        (index, ratios[index] / median(ratios[other] for other in micro))
        for micro in cut
        for index in micro
        if median(ratios[other] for other in micro)
    ]
    odd = [(index, times) for index, times in off if abs(times - 1) > 1e-4]
    if not odd:
        return None
    words = ", ".join(f"example {index} x {times:.4g}" for index, times in odd)
    cause = "dropped-examples" if all(abs(t) < 1e-6 for _, t in odd) else "duplicated-examples"
    return Diagnosis(cause, split.residual, f"within their micro-batch: {words}")


def _evidence(case: Case) -> str:
    """The coefficients of both gradients on the micro-batches' own, for the reader."""
    whole, split = fit(case.whole, case.alone), fit(case.split, case.alone)

    def shown(found: Fit) -> str:
        return " ".join(f"{one:.4g}" for one in found.coefficients)

    counts = "" if case.targets is None else f"; targets {' '.join(map(str, case.targets))}"
    return (
        f"on the micro-batches' own gradients: whole = [{shown(whole)}] "
        f"(residual {whole.residual:.0e}), split = [{shown(split)}] "
        f"(residual {split.residual:.0e}); examples {' '.join(map(str, case.examples))}{counts}"
    )


def diagnose_empty(runs: Runs, cut: Cut, masked: tuple[int, ...]) -> Diagnosis:
    """Why a micro-batch without targets changes the step."""
    found = runs.run(cut, masked=masked).gradient
    if not all(bool(tensor.isfinite().all()) for tensor in found.values()):
        return Diagnosis("mean-of-means", 0.0, "the empty micro-batch divides 0 by 0")
    return (
        diagnose_split(runs, cut) if faulty(runs, cut) else diagnose_split(runs, cut, masked=masked)
    )


def faulty(runs: Runs, cut: Cut) -> bool:
    """Whether the cut is inexact by itself; then it has the same fault under any setting."""
    whole = (tuple(index for micro in cut for index in micro),)
    gradients = (
        (runs.run(cut).gradient, runs.run(whole).gradient, runs.tolerance),
        (runs.gradient(cut), runs.gradient(whole), runs.small_tolerance),
    )
    return any(compare(a, b).relative_difference > most for a, b, most in gradients)
