"""The axes of the audit: what may not change the step, each judged by itself."""

import math

from samestep.audit.causes import Diagnosis
from samestep.audit.diagnose import diagnose_empty, diagnose_split
from samestep.audit.layout import COLUMNS, diagnose_pack, diagnose_padding
from samestep.audit.runs import Runs, cuts, uneven
from samestep.audit.subject import Cut
from samestep.audit.vectors import Comparison, compare
from samestep.audit.verdict import AxisResult, judge


def shape(cut: Cut) -> str:
    """A cut in words: "2 x 4", or the sizes of a ragged one."""
    sizes = [len(micro) for micro in cut]
    if len(set(sizes)) == 1:
        return f"{sizes[0]} x {len(sizes)}"
    return "+".join(map(str, sizes))


def micro_batch(runs: Runs) -> AxisResult:
    """The micro-batch size, at the same effective batch."""
    whole = runs.run(runs.whole).gradient
    tried = cuts(runs.subject.size, uniform=runs.subject.uniform)
    # A ragged cut tells laws apart that coincide where all micro-batches are of one size.
    telling = uneven(runs.subject.size) if runs.subject.uniform else tried[0]
    seen = [(compare(runs.run(cut).gradient, whole), cut) for cut in tried]
    worst, cut = max(seen, key=lambda pair: _size(pair[0]))
    note = ""
    if worst.relative_difference <= runs.tolerance and runs.scalable:
        # A final clip to one norm hides a wrong scale; small gradients are not clipped.
        free = compare(runs.gradient(tried[0]), runs.gradient(runs.whole))
        if free.relative_difference > runs.small_tolerance:
            worst, cut, note = free, tried[0], ", with gradients too small to be clipped"

    def diagnose() -> Diagnosis:
        seen = compare(runs.run(telling).gradient, whole).relative_difference
        return diagnose_split(runs, telling if seen > runs.tolerance or note else cut)

    return judge(
        "micro-batch",
        runs,
        worst,
        reason=f"{shape(cut)} against {shape(runs.whole)}, the worst of "
        + ", ".join(shape(one) for one in tried)
        + note,
        diagnose=diagnose,
    )


def _size(seen: Comparison) -> float:
    return seen.relative_difference if math.isfinite(seen.relative_difference) else math.inf


def order(runs: Runs) -> AxisResult:
    """The order of the micro-batches, and of the examples of the undivided batch."""
    tried = cuts(runs.subject.size, uniform=runs.subject.uniform)
    cut = tried[1] if runs.subject.uniform else tried[0]
    pairs: list[tuple[Cut, Cut]] = [(runs.whole, (tuple(reversed(runs.whole[0])),))]
    if not runs.subject.uniform or len({len(micro) for micro in cut}) == 1:
        pairs.append((cut, tuple(reversed(cut))))
    seen = [(compare(runs.run(b).gradient, runs.run(a).gradient), a) for a, b in pairs]
    worst, at = max(seen, key=lambda pair: _size(pair[0]))
    return judge(
        "order",
        runs,
        worst,
        reason=f"{shape(at)} forwards and backwards",
        diagnose=lambda: diagnose_split(runs, cut),
    )


def padding(runs: Runs) -> AxisResult:
    """Longer rows: more padding on the right; on the left where there is an attention mask."""
    whole = runs.run(runs.whole).gradient
    seen = [
        (compare(runs.run(runs.whole, padding=COLUMNS, side=side).gradient, whole), side)
        for side in runs.subject.padding_sides()
    ]
    worst, side = max(seen, key=lambda pair: _size(pair[0]))
    return judge(
        "padding",
        runs,
        worst,
        reason=f"{COLUMNS} more columns on the {side}",
        diagnose=lambda: diagnose_padding(runs, side=side),
    )


def packing(runs: Runs) -> AxisResult:
    """Sequences side by side in one row against rows of their own."""
    whole = runs.run(runs.whole).gradient
    packed = runs.run(runs.whole, packed=True).gradient
    return judge(
        "packing",
        runs,
        compare(packed, whole),
        reason="all examples in one pack against a row each",
        diagnose=lambda: diagnose_pack(runs),
    )


def short_window(runs: Runs) -> AxisResult:
    """The end of the data: a window with fewer micro-batches, and a smaller last micro-batch."""
    result = _fewer_micro_batches(runs)
    if result.verdict == "inexact" or not runs.subject.uniform:
        return result  # where sizes are free, smaller ones are tried under micro-batch
    cut = uneven(runs.subject.size)
    return judge(
        "short-window",
        runs,
        compare(runs.run(cut).gradient, runs.run(runs.whole).gradient),
        reason=f"{result.reason}; and {shape(cut)}, where the last micro-batch is smaller",
        diagnose=lambda: diagnose_split(runs, cut),
    )


def _fewer_micro_batches(runs: Runs) -> AxisResult:
    cut = cuts(runs.subject.size, uniform=True)[1]
    window = len(cut) + 1
    found = runs.run(cut, window=window).gradient
    whole = runs.run(runs.whole).gradient
    seen = compare(found, whole)

    def diagnose() -> Diagnosis:
        full = compare(found, runs.run(cut).gradient)
        if full.relative_difference <= runs.tolerance:
            return diagnose_split(runs, cut)  # as in full windows: the same cause
        expected = len(cut) / window
        return Diagnosis(
            "short-window",
            abs(full.ratio - expected),
            f"{len(cut)} micro-batches in a window of {window} against a window of {len(cut)}: "
            f"x {full.ratio:.6g}, {len(cut)}/{window} = {expected:.6g}",
        )

    return judge(
        "short-window",
        runs,
        seen,
        reason=f"{len(cut)} micro-batches where a full window has {window}",
        diagnose=diagnose,
    )


def zero_target(runs: Runs) -> AxisResult:
    """A micro-batch without any target."""
    cut = cuts(runs.subject.size, uniform=runs.subject.uniform)[1 if runs.subject.uniform else 0]
    masked = cut[1]
    whole = runs.run(runs.whole, masked=masked).gradient
    found = runs.run(cut, masked=masked).gradient
    seen = compare(found, whole)
    return judge(
        "zero-target",
        runs,
        seen,
        reason=f"{shape(cut)}, the second micro-batch without targets, against the whole",
        diagnose=lambda: diagnose_empty(runs, cut, masked),
    )


def dropout(runs: Runs) -> AxisResult:
    """The split with dropout on, from the same seed."""
    cut = cuts(runs.subject.size, uniform=runs.subject.uniform)[-1]
    seen = compare(
        runs.run(cut, dropout=True).gradient, runs.run(runs.whole, dropout=True).gradient
    )

    def diagnose() -> Diagnosis:
        moved = compare(runs.run(cut, dropout=True).gradient, runs.run(cut).gradient)
        if moved.relative_difference <= runs.tolerance:
            return diagnose_split(runs, cut)  # there is no dropout: the same cause as without
        return Diagnosis("rng", seen.relative_difference, "the masks follow the split")

    return judge(
        "dropout",
        runs,
        seen,
        reason=f"{shape(cut)} against the whole with dropout on, same seed",
        diagnose=diagnose,
    )


def evaluation_first(runs: Runs) -> AxisResult:
    """An evaluation before the step."""
    seen = compare(
        runs.run(runs.whole, evaluate_first=True).gradient, runs.run(runs.whole).gradient
    )
    return judge(
        "evaluation-first",
        runs,
        seen,
        reason="the step after an evaluation against the step alone",
        diagnose=lambda: Diagnosis("evaluation-side-effect", seen.relative_difference, ""),
    )


def terms(runs: Runs) -> AxisResult:
    """Each loss term by itself; the worst one speaks."""
    cut = cuts(runs.subject.size, uniform=runs.subject.uniform)[0]
    results = []
    for term in runs.subject.terms:
        whole = runs.run(runs.whole, term=term).gradient
        results.append(
            judge(
                "terms",
                runs,
                compare(runs.run(cut, term=term).gradient, whole),
                reason=f"term {term!r} alone, {shape(cut)} against the whole",
                diagnose=lambda term=term: diagnose_split(runs, cut, term=term),  # type: ignore[misc]
            )
        )
    return max(results, key=lambda result: (result.verdict == "inexact", _number(result)))


def _number(result: AxisResult) -> float:
    return result.relative_difference or 0.0
