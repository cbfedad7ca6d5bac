"""Axes that are judged by numbers: what a loop reports, and what an evaluation says."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from samestep.audit.axes import AxisResult, shape
from samestep.audit.causes import Diagnosis, advice
from samestep.audit.diagnose import diagnose_split, faulty
from samestep.audit.objective import report_of_another
from samestep.audit.runs import Runs, cuts
from samestep.audit.subject import Cut

Numbers = Mapping[str, float]


def evaluation_batch(runs: Runs) -> AxisResult:
    """The evaluation batch size: loss and every metric, at the same weights."""
    size = runs.subject.size
    sizes = (size, 1, 2, 3)
    found = {one: runs.subject.evaluate(one, runs.plain) for one in sizes}
    again = runs.subject.evaluate(size, runs.plain)
    steady = [
        key for key in found[size] if _change(again.get(key, math.nan), found[size][key]) == 0
    ]
    changes = {
        key: max(_change(found[one].get(key, math.nan), found[size][key]) for one in sizes[1:])
        for key in steady
        if not _counts(key, list(found.values()))
    }
    batches = [tuple(range(start, min(start + 3, size))) for start in range(0, size, 3)]

    def diagnose(key: str) -> Diagnosis:
        parts = [runs.subject.evaluate(len(one), runs.plain, one) for one in batches]
        values = [part.get(key, math.nan) for part in parts]
        name = "eval-mean-of-means" if _is_loss(key) else "metric-mean-of-means"
        apart = _apart(runs, key) if _is_loss(key) else 0.0
        if apart > max(runs.tolerance, 1e-9):
            evidence = f"two equal examples together miss the mean of the two by {apart:.1e}"
            return Diagnosis("batch-coupled-term", apart, evidence)
        return _by_parts(found[3][key], values, [len(one) for one in batches], name)

    return _result(
        "evaluation-batch",
        runs,
        changes,
        reference=found[size],
        others=[found[one] for one in sizes[1:]],
        reason=f"evaluation at batch {', '.join(map(str, sizes[1:]))} against {size}",
        diagnose=diagnose,
    )


def reported(runs: Runs) -> AxisResult:
    """What the loop reports of itself: is it the same under every split, and what was optimised?"""
    tried = cuts(runs.subject.size, uniform=runs.subject.uniform)
    whole = runs.run(runs.whole).reported
    if not whole:
        return AxisResult("reported", "skipped", "the loop reports no numbers")
    again = runs.again(runs.whole).reported
    steady = _steady(whole, again)
    found = {cut: runs.run(cut).reported for cut in tried}
    changes = {
        key: max(_change(one.get(key, math.nan), whole[key]) for one in found.values())
        for key in steady
        if not _counts(key, [whole, *found.values()])
    }
    result = _result(
        "reported",
        runs,
        changes,
        reference=whole,
        others=list(found.values()),
        reason=f"what is reported at {', '.join(shape(cut) for cut in tried)} against the whole",
        diagnose=lambda key: _of_report(runs, tried[0], key),
    )
    if result.verdict == "exact" and "loss" in steady:
        other = report_of_another(runs)
        if other is not None:
            return AxisResult(
                "reported",
                "inexact",
                "the change of the reported loss with the weights against the gradient",
                noise_floor=runs.floor,
                relative_difference=other.residual,
                cause=other.cause,
                residual=other.residual,
                evidence=other.evidence,
                advice=advice(other.cause),
            )
    return result


def _apart(runs: Runs, key: str) -> float:
    """How far an evaluation of two examples of equal counts is from the mean of the two's own."""
    found = []
    for changes in ({"twins": True}, {}, {"altered": (0,)}):
        setting = replace(runs.plain, **changes)
        examples = (0, 0) if "twins" in changes else (0,)
        try:
            found.append(runs.subject.evaluate(2, setting, examples)[key])
        except Exception:  # the subject is the user's code: it may refuse changed inputs
            return 0.0
    pair, own, twin = found
    return _change(pair, (own + twin) / 2)


def _of_report(runs: Runs, cut: Cut, key: str) -> Diagnosis:
    """Why a number that the loop reports changes with the split."""
    other = report_of_another(runs, cut) if key == "loss" else None
    if faulty(runs, cut) and other is None and _is_loss(key):
        return diagnose_split(runs, cut)  # it reports truly what it wrongly optimises
    alone = [runs.run((micro,)).reported.get(key, math.nan) for micro in cut]
    name = "reported-not-optimised" if _is_loss(key) else "metric-mean-of-means"
    seen = _by_parts(runs.run(cut).reported[key], alone, [len(micro) for micro in cut], name)
    if seen.cause != "unexplained":
        return seen
    if faulty(runs, cut):  # a number that follows from the gradient, such as its norm
        return diagnose_split(runs, cut)
    return Diagnosis(name, seen.residual, seen.evidence) if _is_loss(key) else seen


def _by_parts(
    found: float, parts: Sequence[float], examples: Sequence[int], name: str
) -> Diagnosis:
    """A number of the whole from those of the parts: their mean, their sum, the last one."""
    shown = " ".join(f"{one:.6g}" for one in parts)
    scored = [(_change(found, guess), words) for words, guess in _laws(parts, examples)]
    best, words = min(scored)
    if best > 1e-6:
        return Diagnosis("unexplained", best, f"of the parts alone: {shown}; together {found:.6g}")
    return Diagnosis(name, best, f"{words} of the parts' own {shown}")


def _laws(parts: Sequence[float], examples: Sequence[int]) -> Iterator[tuple[str, float]]:
    yield "the mean", sum(parts) / len(parts)
    weighted = sum(one * count for one, count in zip(parts, examples, strict=True))
    yield "the mean by examples", weighted / sum(examples)
    yield "the sum", sum(parts)
    yield "the last", parts[-1]
    yield "the first", parts[0]
    if all(one > 0 for one in parts):
        yield "the geometric mean", math.exp(sum(map(math.log, parts)) / len(parts))


def _result(
    name: str,
    runs: Runs,
    changes: Numbers,
    *,
    reference: Numbers,
    others: Sequence[Numbers],
    reason: str,
    diagnose: object,
) -> AxisResult:
    """The worst change of any number; a loss speaks before a metric."""
    inexact = [key for key, change in changes.items() if not change <= runs.tolerance]
    losses = [key for key in inexact if _is_loss(key)]
    worst = max(losses or inexact or changes, key=lambda key: changes[key], default=None)
    if worst is None:
        return AxisResult(name, "exact", f"{reason}: nothing but counts")
    assert callable(diagnose)
    found: Diagnosis | None = diagnose(worst) if inexact else None
    shown = ", ".join(f"{other[worst]:.6g}" for other in others if worst in other)
    evidence = f"{worst}: {reference[worst]:.6g} against {shown}"
    return AxisResult(
        name=name,
        verdict="inexact" if inexact else "exact",
        reason=reason,
        ratio=others[0].get(worst, math.nan) / reference[worst] if reference[worst] else None,
        relative_difference=changes[worst],
        noise_floor=runs.floor,
        cause=None if found is None else found.cause,
        residual=None if found is None else found.residual,
        evidence=evidence if found is None else f"{evidence}; {found.evidence}",
        advice=advice(None if found is None else found.cause),
    )


def _is_loss(key: str) -> bool:
    return key.endswith("loss")


def _steady(first: Numbers, again: Numbers) -> list[str]:
    """The numbers that are the same when nothing changed: times and rates are not."""
    return [key for key, value in first.items() if _change(again.get(key, math.nan), value) == 0]


def _counts(key: str, seen: Sequence[Numbers]) -> bool:
    """Whether a number only counts, as micro-batches or padded tokens: a whole number each time."""
    values = [one[key] for one in seen if key in one]
    whole = all(math.isfinite(value) and value == round(value) for value in values)
    return whole and not _is_loss(key) and max(map(abs, values), default=0.0) >= 1


def _change(found: float, reference: float) -> float:
    if math.isnan(found) or math.isnan(reference):
        return 0.0 if math.isnan(found) and math.isnan(reference) else math.inf
    return abs(found - reference) / max(abs(reference), 1e-12)
