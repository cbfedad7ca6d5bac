"""Why the layout of the same examples changes the gradient: padding, or a pack."""

from samestep.audit.causes import Diagnosis
from samestep.audit.laws import closeness
from samestep.audit.neighbours import moved_by_neighbour
from samestep.audit.runs import Runs
from samestep.audit.vectors import Comparison, across, compare

COLUMNS = 5
"""Of padding that are added to see whether it matters."""


def diagnose_padding(runs: Runs, *, side: str) -> Diagnosis:
    """Why padding changes the gradient: it is counted, it is attended to, or it shifts positions.

    Args:
        runs: The subject.
        side: "right" or "left", of the columns that are added.
    """
    padded = runs.gradient(runs.whole, padding=COLUMNS, side=side)
    seen = compare(padded, runs.gradient(runs.whole))
    evidence = f"{COLUMNS} columns on the {side}: x {seen.ratio:.6g}, cosine {seen.cosine:.6f}"
    if runs.moved_by_seed(runs.whole) > runs.small_tolerance:
        return Diagnosis("rng", seen.relative_difference, evidence)
    if _same_direction(runs, seen):
        return Diagnosis("padding-counted", 1 - seen.cosine, evidence)
    plain, more = (
        runs.counts(runs.whole[0], padding=columns, side=side).get("labels", ("", 0.0))[1]
        for columns in (0, COLUMNS)
    )
    if more > plain:
        return Diagnosis("padding-counted", 0.0, f"{evidence}; padding has labels of its own")
    other = runs.gradient(runs.whole, padding=COLUMNS, side=side, filler=1)
    moved = compare(other, padded).relative_difference
    evidence += f"; another padding token moves it by {moved:.1e}"
    if side == "left" and moved <= closeness(runs):
        return Diagnosis("position-leak", seen.relative_difference, evidence)
    return Diagnosis("padding-attended", seen.relative_difference, evidence)


def padding_seen(runs: Runs) -> Diagnosis | None:
    """Why padding changes more than the scale of the gradient; None if it does not."""
    if "padding" in runs.subject.skips():
        return None
    for side in runs.subject.padding_sides():
        padded = runs.gradient(runs.whole, padding=COLUMNS, side=side)
        seen = compare(padded, runs.gradient(runs.whole))
        if seen.relative_difference > runs.small_tolerance and not _same_direction(runs, seen):
            return diagnose_padding(runs, side=side)
    return None


def _same_direction(runs: Runs, seen: Comparison) -> bool:
    return across(seen) <= closeness(runs)


def diagnose_pack(runs: Runs) -> Diagnosis:
    """Why a pack of all examples gives another gradient than a row each."""
    whole = runs.gradient(runs.whole)
    seen = compare(runs.gradient(runs.whole, packed=True), whole)
    evidence = f"x {seen.ratio:.6g}, cosine {seen.cosine:.6f}"
    if runs.moved_by_seed(runs.whole) > runs.small_tolerance:
        return Diagnosis("rng", seen.relative_difference, evidence)
    if _same_direction(runs, seen):
        return Diagnosis(_count_of_pack(runs), 0.0, f"another scale only: {evidence}")
    masked = _with_borders_masked(runs)
    if masked is not None and _same_direction(runs, masked):
        evidence += "; without the labels at the borders only the scale is left"
        return Diagnosis("boundary-target", masked.relative_difference, evidence)
    first, last = runs.whole[0][0], runs.whole[0][-1]
    moved = moved_by_neighbour(
        runs, neighbour=first, kept=last, packed=True, borders_masked=masked is not None
    )
    if moved is None:
        return Diagnosis("attention-leak", seen.relative_difference, evidence)
    evidence += f"; a neighbour's tokens move a sequence's gradient by {moved:.1e}"
    cause = "position-leak" if moved <= closeness(runs) else "attention-leak"
    return Diagnosis(cause, seen.relative_difference, evidence)


def _with_borders_masked(runs: Runs) -> Comparison | None:
    """The pack without the labels of first tokens, against the rows; None if it cannot be run."""
    try:
        packed = runs.gradient(runs.whole, packed=True, borders_masked=True)
    except Exception:  # the subject's packs may not be rows of tokens
        return None
    return compare(packed, runs.gradient(runs.whole))


def _count_of_pack(runs: Runs) -> str:
    """What the scale of a pack says of the denominator: padding, that it lacks, or labels."""
    padded = runs.subject.skips().get("padding") is None
    if padded:
        wider = compare(
            runs.gradient(runs.whole, padding=COLUMNS, side=runs.subject.padding_sides()[0]),
            runs.gradient(runs.whole),
        )
        if wider.relative_difference > runs.small_tolerance:
            return "padding-counted"
    return "unshifted-count"
