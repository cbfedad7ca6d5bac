"""A verdict on one axis: what differs, by how much, and why."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from samestep.audit.causes import Diagnosis, advice
from samestep.audit.runs import Runs
from samestep.audit.vectors import Comparison

Verdict = Literal["exact", "inexact", "skipped"]


@dataclass(frozen=True)
class AxisResult:
    """The verdict on one axis.

    Attributes:
        name: The axis.
        verdict: "exact", "inexact" or "skipped".
        reason: What was compared, or why it was skipped.
        ratio: Norm of the gradient over the reference's.
        cosine: Of the angle between them.
        relative_difference: Norm of their difference over the reference's norm.
        noise_floor: What arithmetic alone makes.
        worst: The weights that differ most, with their relative differences.
        cause: A name in `samestep.audit.causes.CAUSES`, "unexplained", or None.
        residual: How far the cause's prediction is from what was seen.
        evidence: Numbers behind the cause.
        advice: What the cause is and what to change.
    """

    name: str
    verdict: Verdict
    reason: str = ""
    ratio: float | None = None
    cosine: float | None = None
    relative_difference: float | None = None
    noise_floor: float | None = None
    worst: tuple[tuple[str, float], ...] = field(default=())
    cause: str | None = None
    residual: float | None = None
    evidence: str = ""
    advice: str = ""


def judge(
    name: str,
    runs: Runs,
    seen: Comparison,
    *,
    reason: str,
    diagnose: Callable[[], Diagnosis],
    tolerance: float | None = None,
) -> AxisResult:
    """A verdict from a comparison; the diagnosis is asked for only if it is needed."""
    exact = seen.relative_difference <= (tolerance or runs.tolerance)
    diagnosis = None if exact else _asked(diagnose, seen)
    return AxisResult(
        name=name,
        verdict="exact" if exact else "inexact",
        reason=reason,
        ratio=seen.ratio,
        cosine=seen.cosine,
        relative_difference=seen.relative_difference,
        noise_floor=runs.floor,
        worst=() if exact else seen.worst,
        cause=diagnosis.cause if diagnosis else None,
        residual=diagnosis.residual if diagnosis else None,
        evidence=diagnosis.evidence if diagnosis else "",
        advice=advice(diagnosis.cause if diagnosis else None),
    )


def _asked(diagnose: Callable[[], Diagnosis], seen: Comparison) -> Diagnosis:
    """A diagnosis; a subject that fails on the way to it is no less inexact."""
    try:
        return diagnose()
    except Exception as error:  # the subject is the user's code: anything may come
        reason = f"the subject failed in a run of the diagnosis: {type(error).__name__}: {error}"
        return Diagnosis("unexplained", seen.relative_difference, reason)
