"""Axes that are judged by numbers: what a loop reports, and what an evaluation says."""

import math
from collections.abc import Mapping, Sequence

from samestep.audit.axes import AxisResult, shape
from samestep.audit.causes import advice
from samestep.audit.runs import MULTIPLE, Runs, cuts

EPSILON = {"float64": 2.2e-16, "float32": 1.2e-7}


def evaluation_batch(runs: Runs) -> AxisResult:
    """The evaluation batch size: loss and every metric, at the same weights."""
    size = runs.subject.size
    sizes = (size, 1, 2, 3)
    found = {one: runs.subject.evaluate(one, runs.plain) for one in sizes}
    return _judge(
        "evaluation-batch",
        runs,
        reference=found[size],
        others=[found[one] for one in sizes[1:]],
        reason=f"evaluation at batch {', '.join(map(str, sizes[1:]))} against {size}",
        loss_cause="eval-mean-of-means",
    )


def reported(runs: Runs) -> AxisResult:
    """The loss and the metrics that the loop reports, under another split."""
    tried = cuts(runs.subject.size, uniform=runs.subject.uniform)
    whole = runs.run(runs.whole).reported
    if not whole:
        return AxisResult("reported", "skipped", "the loop reports no numbers")
    return _judge(
        "reported",
        runs,
        reference=whole,
        others=[runs.run(cut).reported for cut in tried],
        reason=f"what is reported at {', '.join(shape(cut) for cut in tried)} against the whole",
        loss_cause="reported-not-optimised",
    )


def _judge(
    name: str,
    runs: Runs,
    *,
    reference: Mapping[str, float],
    others: Sequence[Mapping[str, float]],
    reason: str,
    loss_cause: str,
) -> AxisResult:
    """The worst relative change of any number; numbers that only time or count are left out."""
    floor = max(runs.run(runs.whole).rounding, runs.floor)
    changes = {
        key: max((_relative(other[key], value) for other in others if key in other), default=0.0)
        for key, value in reference.items()
    }
    worst = max(changes, key=lambda key: changes[key])
    exact = changes[worst] <= MULTIPLE * floor
    cause = loss_cause if worst.endswith("loss") else "metric-mean-of-means"
    shown = ", ".join(f"{other[worst]:.6g}" for other in others if worst in other)
    return AxisResult(
        name=name,
        verdict="exact" if exact else "inexact",
        reason=reason,
        ratio=others[0].get(worst, math.nan) / reference[worst] if reference[worst] else None,
        relative_difference=changes[worst],
        noise_floor=floor,
        cause=None if exact else cause,
        residual=None if exact else changes[worst],
        evidence=f"{worst}: {reference[worst]:.6g} against {shown}",
        advice="" if exact else advice(cause),
    )


def _relative(found: float, reference: float) -> float:
    if math.isnan(found) or math.isnan(reference):
        return 0.0 if math.isnan(found) and math.isnan(reference) else math.inf
    return abs(found - reference) / max(abs(reference), 1e-12)
