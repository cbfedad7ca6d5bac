"""Whether examples that share a batch affect each other: directly, by padding, or in a pack."""

from dataclasses import replace

from samestep.audit.causes import Diagnosis
from samestep.audit.diagnose.draws import drawn_otherwise
from samestep.audit.diagnose.examples import cut_by_neighbours
from samestep.audit.experiments import Experiments
from samestep.audit.gradients import (
    GradientDifference,
    compare_gradients,
    global_norm,
    least_squares,
    linear_combination,
    relative_difference,
    subtract,
)
from samestep.audit.subject import Side, Split

PADDING_COLUMNS = 5
"""Of padding that are added to see whether it matters."""

WIDER = (3, 5)
"""Widths of a batch of padding that are added to see whether more of it still matters."""


def coupling(experiments: Experiments, split: Split, **changes: object) -> float | None:
    """How far two examples of equal counts are from the sum of the two alone, relative.

    An example and a copy of it with other inputs count the same in every unit. So however many
    terms there are, if each is a sum over examples the pair's gradient is parallel to the sum of
    the two's own.

    Returns:
        The largest of the pairs tried, or None if the subject's inputs cannot be changed.
    """
    changes = {key: value for key, value in changes.items() if key != "masked_examples"}
    residuals = []
    for example in {split[0][0], split[-1][-1]}:
        try:
            pair = experiments.small_gradient(((example, example),), **changes, alter_repeats=True)
            own = experiments.small_gradient(((example,),), **changes)
            altered = experiments.small_gradient(
                ((example,),), **changes, altered_examples=(example,)
            )
        except Exception:  # the subject is the user's code: it may refuse changed inputs
            continue
        if global_norm(subtract(own, altered)) > 1e-6 * global_norm(own):
            both = linear_combination([own, altered], [1.0, 1.0])
            residuals.append(least_squares(pair, [both]).residual)
    return max(residuals, default=None)


def leak_in_row(experiments: Experiments, split: Split, **changes: object) -> str | None:
    """The leak between sequences that lie in one row, or None if each has a row of its own."""
    first, last = split[0][0], split[-1][-1]
    shape = experiments.subject.batch_shape((first, last))
    if not changes.get("packed") and (shape is None or shape[0] != 1):
        return None
    moved = _moved_by_neighbour(experiments, neighbour=first, kept=last, **changes)
    no_attention = moved is not None and moved <= experiments.residual_tolerance
    return "position-leak" if no_attention else "attention-leak"


def _moved_by_neighbour(
    experiments: Experiments, *, neighbour: int, kept: int, **changes: object
) -> float | None:
    """How much the tokens of a neighbour without targets change the gradient, relative."""
    changes = {**changes, "masked_examples": (neighbour,)}
    split = ((neighbour, kept),)
    try:
        base = experiments.small_gradient(split, **changes)
        changed = experiments.small_gradient(split, **changes, altered_examples=(neighbour,))
    except Exception:  # the subject has no tokens to change, or no targets to mask
        return None
    return relative_difference(changed, base)


def diagnose_padding(experiments: Experiments, *, side: Side) -> Diagnosis:
    """Why padding changes the gradient: it is counted, it is attended to, or it shifts positions.

    Args:
        experiments: The subject's.
        side: Of the columns that are added.
    """
    whole = experiments.whole_batch
    added = {"extra_padding": PADDING_COLUMNS, "padding_side": side}
    padded = experiments.small_gradient(whole, **added)
    difference = compare_gradients(padded, experiments.small_gradient(whole))
    evidence = f"{PADDING_COLUMNS} columns on the {side}: {_scale_and_direction(difference)}"
    if experiments.seed_sensitivity(whole) > experiments.small_tolerance:
        return Diagnosis("rng", difference.relative_difference, evidence)
    if _same_direction(experiments, difference):
        return Diagnosis("padding-counted", 1 - difference.cosine, evidence)
    labels = experiments.number_of_labels(whole[0], extra_padding=0, padding_side=side)
    if experiments.number_of_labels(whole[0], **added) > labels:
        return Diagnosis("padding-counted", 0.0, f"{evidence}; padding has labels of its own")
    drawn = drawn_otherwise(experiments, (whole, added), (whole, {}))
    if drawn is not None:
        text = f"{evidence}; random numbers are drawn for them, and others change it by {drawn:.1e}"
        return Diagnosis("rng", drawn, text)
    other_token = experiments.small_gradient(whole, **added, padding_offset=1)
    moved = relative_difference(other_token, padded)
    evidence += f"; another padding token moves it by {moved:.1e}"
    unread = moved <= experiments.residual_tolerance
    cut = None
    if unread and side == "right":
        cut = cut_by_neighbours(experiments) or _cut_by_width(experiments)
    if cut is not None:  # the width of the batch says how much of a row is kept
        return replace(cut, evidence=f"{evidence}; {cut.evidence}")
    shifts = side == "left" and unread
    cause = "position-leak" if shifts else "padding-attended"
    return Diagnosis(cause, difference.relative_difference, evidence)


def _cut_by_width(experiments: Experiments) -> Diagnosis | None:
    """Whether padding changes the gradient only until the rows are wide enough.

    So it does where how much of a row is kept depends on the width of the batch; where padding
    enters a mean or a position, it changes the gradient without an end.
    """
    shape = experiments.subject.batch_shape(experiments.whole_batch[0])
    if shape is None:
        return None
    try:
        wide, wider = (
            experiments.small_gradient(experiments.whole_batch, extra_padding=times * shape[1])
            for times in WIDER
        )
    except Exception:  # the subject is the user's code: its rows may have a longest length
        return None
    if relative_difference(wider, wide) > experiments.residual_tolerance:
        return None
    text = (
        f"rows {1 + WIDER[0]} and {1 + WIDER[1]} times as wide give one gradient: how much of a "
        "row is kept depends on the width of its batch"
    )
    return Diagnosis("dropped-examples", 0.0, text)


def diagnose_seen_padding(experiments: Experiments) -> Diagnosis | None:
    """Why padding changes more than the scale of the gradient; None if it does not."""
    if "padding" in experiments.subject.missing():
        return None
    for side in experiments.subject.padding_sides():
        try:
            difference = _of_padding(experiments, side=side)
        except Exception:  # the subject is the user's code: it may refuse more padding
            continue
        changed = difference.relative_difference > experiments.small_tolerance
        if changed and not _same_direction(experiments, difference):
            return diagnose_padding(experiments, side=side)
    return None


def _of_padding(experiments: Experiments, *, side: Side) -> GradientDifference:
    """What more padding does to the gradient of the whole batch."""
    whole = experiments.whole_batch
    padded = experiments.small_gradient(whole, extra_padding=PADDING_COLUMNS, padding_side=side)
    return compare_gradients(padded, experiments.small_gradient(whole))


def _same_direction(experiments: Experiments, difference: GradientDifference) -> bool:
    return difference.perpendicular <= experiments.residual_tolerance


def _scale_and_direction(difference: GradientDifference) -> str:
    return f"x {difference.ratio:.6g}, cosine {difference.cosine:.6f}"


def diagnose_pack(experiments: Experiments) -> Diagnosis:
    """Why a pack of all examples gives another gradient than a row each."""
    whole = experiments.whole_batch
    rows = experiments.small_gradient(whole)
    difference = compare_gradients(experiments.small_gradient(whole, packed=True), rows)
    evidence = _scale_and_direction(difference)
    if experiments.seed_sensitivity(whole) > experiments.small_tolerance:
        return Diagnosis("rng", difference.relative_difference, evidence)
    if _same_direction(experiments, difference):
        return Diagnosis(_count_of_pack(experiments), 0.0, f"another scale only: {evidence}")
    masked = _with_masked_boundaries(experiments)
    if masked is not None and _same_direction(experiments, masked):
        evidence += "; without the labels at the borders only the scale is left"
        return Diagnosis("boundary-target", masked.relative_difference, evidence)
    moved = _moved_by_neighbour(
        experiments,
        neighbour=whole[0][0],
        kept=whole[0][-1],
        packed=True,
        mask_boundaries=masked is not None,
    )
    if moved is None:
        return Diagnosis("attention-leak", difference.relative_difference, evidence)
    evidence += f"; a neighbour's tokens move a sequence's gradient by {moved:.1e}"
    cause = "position-leak" if moved <= experiments.residual_tolerance else "attention-leak"
    return Diagnosis(cause, difference.relative_difference, evidence)


def _with_masked_boundaries(experiments: Experiments) -> GradientDifference | None:
    """The pack without the labels of first tokens, against the rows; None if it cannot be run."""
    whole = experiments.whole_batch
    try:
        packed = experiments.small_gradient(whole, packed=True, mask_boundaries=True)
    except Exception:  # the subject's packs may not be rows of tokens
        return None
    return compare_gradients(packed, experiments.small_gradient(whole))


def _count_of_pack(experiments: Experiments) -> str:
    """What the scale of a pack says of the denominator: padding, that it lacks, or labels."""
    subject = experiments.subject
    if "padding" not in subject.missing():
        difference = _of_padding(experiments, side=subject.padding_sides()[0])
        if difference.relative_difference > experiments.small_tolerance:
            return "padding-counted"
    return "unshifted-count"
