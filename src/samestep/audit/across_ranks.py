"""The axis of ranks: the same effective batch on two processes, and the law behind a difference."""

from collections.abc import Iterator, Sequence

from samestep.audit.axes import AxisResult, judge
from samestep.audit.causes import Diagnosis, advice
from samestep.audit.laws import closeness
from samestep.audit.neighbours import coupled
from samestep.audit.runs import Runs
from samestep.audit.subject import Cut, Gradient, Observation
from samestep.audit.vectors import combine, compare, fit
from samestep.errors import HungError

WORLD = 2


def ranks(runs: Runs) -> AxisResult:
    """Two ranks with different counts; the first way of sharing that is inexact speaks.

    One micro-batch a rank shows the law of the ranks alone; two a rank add the accumulation; then
    a rank without targets, and the examples as the subject's own sampler deals them.
    """
    size, uniform = runs.subject.size, runs.subject.uniform
    one, two = (shares(size, micros=micros, uniform=uniform) for micros in (1, 2))
    result = _try(runs, one, "1 micro-batch a rank")
    if result.verdict == "exact":
        result = _try(runs, two, "2 micro-batches a rank")
    if result.verdict == "exact" and "zero-target" not in runs.subject.skips():
        result = _try(runs, one, "the last rank without targets", masked=one[-1][0])
    odd = runs.subject.size - 1 + runs.subject.size % 2
    dealt = runs.subject.sharded(odd, WORLD)
    if result.verdict == "exact" and dealt is not None:
        result = _try(runs, [(share,) for share in dealt], f"{odd} examples as the sampler deals")
    return result


def shares(size: int, *, micros: int, uniform: bool = False) -> list[Cut]:
    """The micro-batches of each rank: fewer examples on the first.

    Args:
        size: Examples of the effective batch.
        micros: Micro-batches a rank; 1 where a rank has too few examples for 2.
        uniform: All micro-batches must be of one size: as many examples on each.
    """
    border = size // 2 if uniform else max(1, size * 3 // 8)
    found: list[Cut] = []
    for first, last in ((0, border), (border, size)):
        at = first + (last - first + 1) // 2
        two = micros == 2 and border >= 2
        bounds = [(first, at), (at, last)] if two else [(first, last)]
        found.append(tuple(tuple(range(a, b)) for a, b in bounds))
    return found


def _try(
    runs: Runs, given: Sequence[Cut], what: str, *, masked: tuple[int, ...] = ()
) -> AxisResult:
    everything = tuple(sorted({index for share in given for micro in share for index in micro}))
    whole = runs.run((everything,), masked=masked).gradient
    sizes = " and ".join("+".join(str(len(micro)) for micro in share) for share in given)
    reason = f"{WORLD} ranks with {sizes} examples against 1 with all: {what}"
    try:
        seen = runs.run_ranks(given, masked=masked)
    except HungError as error:
        if not masked:
            raise
        cause = "ranks-not-synchronised"
        return AxisResult(
            "ranks", "inexact", reason, cause=cause, evidence=str(error), advice=advice(cause)
        )
    apart = _apart(seen)
    if apart > runs.tolerance:
        evidence = f"the ranks' own results differ by {apart:.1e} after the step"
        diagnosis = Diagnosis("ranks-not-synchronised", 0.0, evidence)
        comparison = compare(seen[-1].gradient, seen[0].gradient)
        return judge("ranks", runs, comparison, reason=reason, diagnose=lambda: diagnosis)
    found = seen[0].gradient
    natural = compare(found, whole)
    if runs.clips:
        found = runs.gradient_of_ranks(given, masked=masked)
        whole = runs.gradient((everything,), masked=masked)
        free = compare(found, whole)
        if free.relative_difference > runs.small_tolerance:
            natural = free
            reason += ", with gradients too small to be clipped"
        elif natural.relative_difference > runs.tolerance:
            evidence = f"with gradients too small to be clipped: {free.relative_difference:.1e}"
            clipped = Diagnosis("clip-per-micro-batch", free.relative_difference, evidence)
            return judge("ranks", runs, natural, reason=reason, diagnose=lambda: clipped)
    return judge(
        "ranks",
        runs,
        natural,
        reason=reason,
        diagnose=lambda: diagnose_ranks(runs, given, found, whole, masked),
    )


def _apart(seen: Sequence[Observation]) -> float:
    """The largest difference between ranks: of gradients, or of the weights that they moved."""
    first = seen[0]
    found = []
    for other in seen[1:]:
        found.append(compare(other.gradient, first.gradient).relative_difference)
        if first.after is not None and other.after is not None:
            found.append(compare(other.after, first.after).relative_difference)
    return max(found)


def diagnose_ranks(
    runs: Runs, given: Sequence[Cut], found: Gradient, whole: Gradient, masked: tuple[int, ...]
) -> Diagnosis:
    """Why the ranks together give another gradient than one alone.

    Args:
        runs: The subject.
        given: The micro-batches of each rank.
        found: The gradient after the step, the same on all ranks.
        whole: The gradient of all examples, undivided, on one.
        masked: Examples without targets.

    Returns:
        The law that predicts the gradient.
    """
    close = closeness(runs)
    if not all(bool(tensor.isfinite().all()) for tensor in found.values()):
        return Diagnosis("rank-local-count", 0.0, "the rank without targets divides 0 by 0")
    own = [runs.clear(share, masked=masked) for share in given]
    law = fit(found, own)
    evidence = (
        f"on the ranks' own gradients: {' '.join(f'{one:.4g}' for one in law.coefficients)} "
        f"(residual {law.residual:.0e})"
    )
    predictions = [*_scaled(runs, whole), *_repeated(runs, given, masked), *_local(given, own)]
    scored = [(compare(guess, found).relative_difference, name) for name, guess in predictions]
    best, name = min(scored)
    if best > close:
        return Diagnosis("unexplained", best, evidence)
    if name in ("rank-local-count", "world-scaled") and fit(whole, own).residual > close:
        apart = coupled(runs, given[0] + given[-1], masked=masked)
        if apart is None or apart > close:
            return Diagnosis("batch-coupled-term", best, evidence)
    return Diagnosis(name, best, evidence)


def _scaled(runs: Runs, whole: Gradient) -> Iterator[tuple[str, Gradient]]:
    yield "world-scaled", combine([whole], [float(WORLD)])
    yield "world-divided", combine([whole], [1 / WORLD])


def _repeated(
    runs: Runs, given: Sequence[Cut], masked: tuple[int, ...]
) -> Iterator[tuple[str, Gradient]]:
    """Examples that several ranks, or one twice, were dealt."""
    dealt = tuple(index for share in given for micro in share for index in micro)
    if len(set(dealt)) < len(dealt):
        yield "duplicated-examples", runs.clear((dealt,), masked=masked)


def _local(given: Sequence[Cut], own: Sequence[Gradient]) -> Iterator[tuple[str, Gradient]]:
    """Each rank's own result, averaged, added up, or divided once more."""
    yield "rank-local-count", combine(own, [1 / WORLD] * len(own))
    yield "world-scaled", combine(own, [1.0] * len(own))
    yield "world-divided", combine(own, [1 / WORLD**2] * len(own))
    examples = [sum(len(micro) for micro in share) for share in given]
    yield "rank-local-count", combine(own, [one / sum(examples) for one in examples])
    for gradient in own:
        yield "ranks-not-synchronised", gradient
