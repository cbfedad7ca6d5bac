"""The axes that are judged by the gradient of the step."""

from collections.abc import Sequence

import torch

from samestep.audit.axes.axis import Measurement
from samestep.audit.causes import UNEXPLAINED, Diagnosis
from samestep.audit.diagnose.coupling import PADDING_COLUMNS, diagnose_pack, diagnose_padding
from samestep.audit.diagnose.reported import diagnose_objective, recomputed_differently
from samestep.audit.diagnose.split import diagnose_empty, diagnose_split
from samestep.audit.diagnose.state import compare_left, moves_beside
from samestep.audit.experiments import Experiments
from samestep.audit.gradients import (
    GradientDifference,
    compare_gradients,
    global_norm,
    relative_difference,
)
from samestep.audit.splits import candidate_splits, sizes_of, uneven_split
from samestep.audit.subject import Split

COPIES = 64
"""Of one example, to add up: a power of two, so that a share of the batch has the same digits."""

MAX_GROWTH = 1.5
"""How much the error may grow with the copies: not at all where sums are wide, since all copies
have the same error; in bfloat16 each addition rounds anew."""


def micro_batch(experiments: Experiments) -> Measurement:
    """The micro-batch size, at the same effective batch."""
    splits, batch = experiments.splits, experiments.whole_batch
    whole = experiments.run(batch).gradient
    differences = [
        (compare_gradients(experiments.run(split).gradient, whole), split) for split in splits
    ]
    worst, at = max(differences, key=lambda pair: pair[0].size)
    note = ""
    if worst.relative_difference <= experiments.tolerance and experiments.keeps_scale:
        # A final clip to one norm hides a wrong scale; small gradients are not clipped.
        small = compare_gradients(
            experiments.small_gradient(splits[0]), experiments.small_gradient(batch)
        )
        if small.relative_difference > experiments.small_tolerance:
            worst, at, note = small, splits[0], ", with gradients too small to be clipped"

    if worst.relative_difference <= experiments.tolerance and not note:
        left = _left_otherwise(experiments, splits)
        if left is not None:
            return left

    def diagnose() -> Diagnosis:
        # A ragged split tells bugs apart that coincide where all micro-batches are of one size.
        subject = experiments.subject
        ragged = uneven_split(subject.size) if subject.uniform else splits[0]
        shows = relative_difference(experiments.run(ragged).gradient, whole) > experiments.tolerance
        worse = ragged if shows or note else at
        diagnosis = moves_beside(experiments, worse, diagnose_split(experiments, worse))
        if diagnosis.cause != UNEXPLAINED or "loss" not in experiments.run(batch).reported:
            return diagnosis
        return diagnose_objective(experiments) or diagnosis

    tried = ", ".join(map(sizes_of, splits))
    reason = f"{sizes_of(at)} against {sizes_of(batch)}, the worst of {tried}{note}"
    return Measurement.of(worst, reason, diagnose=diagnose)


def _left_otherwise(experiments: Experiments, splits: Sequence[Split]) -> Measurement | None:
    """What a split leaves otherwise than the whole batch, though its gradient is the same."""
    batch = experiments.whole_batch
    for split in splits:
        left = compare_left(experiments, experiments.run(split), experiments.run(batch))
        if left is not None:
            return Measurement.of_left(
                left, f"what is left after {sizes_of(split)} and {sizes_of(batch)}"
            )
    return None


def order(experiments: Experiments) -> Measurement:
    """The order of the micro-batches, and of the examples of the undivided batch."""
    split, whole = experiments.mixed_split, experiments.whole_batch
    pairs: list[tuple[Split, Split]] = [(whole, (whole[0][::-1],))]
    # A smaller last micro-batch cannot come first where sizes must be uniform.
    if not experiments.subject.uniform or len({len(each) for each in split}) == 1:
        pairs.append((split, split[::-1]))
    worst, at = max(
        ((_difference(experiments, after, reference=before), before) for before, after in pairs),
        key=lambda pair: pair[0].size,
    )

    def diagnose() -> Diagnosis:
        diagnosis = diagnose_split(experiments, split)
        if diagnosis.cause != UNEXPLAINED or experiments.subject.uniform:
            return diagnosis
        # In this order the fault may not show: the first row of each may be the longest.
        turned = tuple(micro_batch[::-1] for micro_batch in split[::-1])
        backwards = diagnose_split(experiments, turned)
        return diagnosis if backwards.cause == UNEXPLAINED else backwards

    return Measurement.of(worst, f"{sizes_of(at)} forwards and backwards", diagnose=diagnose)


def _difference(
    experiments: Experiments, split: Split, *, reference: Split, **changes: object
) -> GradientDifference:
    """Of two splits' gradients under the same settings."""
    return compare_gradients(
        experiments.run(split, **changes).gradient, experiments.run(reference, **changes).gradient
    )


def padding(experiments: Experiments) -> Measurement:
    """Longer rows: more padding on the right; on the left where there is an attention mask."""
    batch = experiments.whole_batch
    whole = experiments.run(batch).gradient
    sides = experiments.subject.padding_sides()
    padded = [
        experiments.run(batch, extra_padding=PADDING_COLUMNS, padding_side=side) for side in sides
    ]
    differences = [compare_gradients(observation.gradient, whole) for observation in padded]
    worst, at = max(zip(differences, sides, strict=True), key=lambda pair: pair[0].size)
    return Measurement.of(
        worst,
        f"{PADDING_COLUMNS} more columns on the {at}",
        diagnose=lambda: diagnose_padding(experiments, side=at),
    )


def packing(experiments: Experiments) -> Measurement:
    """Sequences side by side in one row against rows of their own."""
    batch = experiments.whole_batch
    packed = experiments.run(batch, packed=True).gradient
    return Measurement.of(
        compare_gradients(packed, experiments.run(batch).gradient),
        "all examples in one pack against a row each",
        diagnose=lambda: diagnose_pack(experiments),
    )


def short_window(experiments: Experiments) -> Measurement:
    """The end of the data: a window with fewer micro-batches, and a smaller last micro-batch."""
    fewer = _fewer_micro_batches(experiments)
    if not fewer.is_exact(experiments.tolerance) or not experiments.subject.uniform:
        return fewer  # where sizes are free, smaller ones are tried under micro-batch
    split = uneven_split(experiments.subject.size)
    return Measurement.of(
        _difference(experiments, split, reference=experiments.whole_batch),
        f"{fewer.reason}; and {sizes_of(split)}, where the last micro-batch is smaller",
        diagnose=lambda: diagnose_split(experiments, split),
    )


def _fewer_micro_batches(experiments: Experiments) -> Measurement:
    split = candidate_splits(experiments.subject.size, uniform=True)[1]
    held, window = len(split), len(split) + 1
    observed, whole = (
        experiments.run(split, window=window),
        experiments.run(experiments.whole_batch),
    )
    reason = f"{held} micro-batches where a full window has {window}"
    left = compare_left(experiments, observed, whole)
    if left is not None and left.cause == "dropped-examples":
        return Measurement.of_left(left, reason)
    short = observed.gradient

    def diagnose() -> Diagnosis:
        full = compare_gradients(short, experiments.run(split).gradient)
        if full.relative_difference <= experiments.tolerance:
            return diagnose_split(experiments, split)  # as in full windows: the same cause
        expected = held / window
        return Diagnosis(
            "short-window",
            abs(full.ratio - expected),
            f"{held} micro-batches in a window of {window} against a window of {held}: "
            f"x {full.ratio:.6g}, {held}/{window} = {expected:.6g}",
        )

    return Measurement.of(
        compare_gradients(short, whole.gradient),
        reason,
        diagnose=diagnose,
    )


def zero_target(experiments: Experiments) -> Measurement:
    """A micro-batch without any target."""
    split = experiments.mixed_split
    masked = split[1]
    return Measurement.of(
        _difference(experiments, split, reference=experiments.whole_batch, masked_examples=masked),
        f"{sizes_of(split)}, the second micro-batch without targets, against the whole",
        diagnose=lambda: diagnose_empty(experiments, split, masked_examples=masked),
    )


def terms(experiments: Experiments) -> Measurement:
    """Each loss term by itself; the worst is reported."""
    split = experiments.splits[0]

    def of_term(term: str) -> Measurement:
        return Measurement.of(
            _difference(experiments, split, reference=experiments.whole_batch, term=term),
            f"term {term!r} alone, {sizes_of(split)} against the whole",
            diagnose=lambda: diagnose_split(experiments, split, term=term),
        )

    measured = [of_term(term) for term in experiments.subject.terms]
    return max(measured, key=lambda each: (not each.is_exact(experiments.tolerance), each.size))


def evaluation_first(experiments: Experiments) -> Measurement:
    """An evaluation before the step."""
    batch = experiments.whole_batch
    after = experiments.run(batch, evaluate_first=True).gradient
    difference = compare_gradients(after, experiments.run(batch).gradient)
    return Measurement.of(difference, "the step after an evaluation against the step alone")


def dropout(experiments: Experiments) -> Measurement:
    """The split with dropout on, from the same seed."""
    split = experiments.splits[-1]
    difference = _difference(experiments, split, reference=experiments.whole_batch, dropout=True)
    again = recomputed_differently(experiments)
    if again is not None:
        reason = "the gradient against the loss that it is of, with dropout on, same seed"
        return Measurement(reason, again.residual, exact=False, diagnose=lambda: again)

    def diagnose() -> Diagnosis:
        dropped = experiments.run(split, dropout=True).gradient
        moved = relative_difference(dropped, experiments.run(split).gradient)
        if moved <= experiments.tolerance:
            return diagnose_split(experiments, split)  # there is no dropout: the same cause
        return Diagnosis("rng", difference.relative_difference, "the masks follow the split")

    reason = f"{sizes_of(split)} against the whole with dropout on, same seed"
    return Measurement.of(difference, reason, diagnose=diagnose)


def low_precision(experiments: Experiments) -> Measurement:
    """Whether rounding grows with the number of micro-batches, in bfloat16 weights.

    Copies of one example have one gradient, with one error; only adding them up can enlarge it.
    """

    def size(index: int) -> float:
        return global_norm(experiments.run(((index,),)).gradient)

    def error(split: Split) -> GradientDifference:
        narrow = experiments.rerun(split, dtype=torch.bfloat16).gradient
        return compare_gradients(narrow, experiments.rerun(split).gradient)

    example = max(range(experiments.subject.size), key=size)
    of_one, of_many = error(((example,),)), error(((example,),) * COPIES)
    growth = of_many.relative_difference / of_one.relative_difference
    return Measurement.of(
        of_many,
        f"error of bfloat16 against float64, 1 micro-batch and {COPIES} copies of it",
        diagnose=lambda: Diagnosis("accumulation-dtype", 0.0, ""),
        exact=growth <= MAX_GROWTH,
        noise_floor=of_one.relative_difference,
        evidence=f"the error grows x {growth:.3g} from 1 to {COPIES} micro-batches",
    )
