"""What an axis is: how something that may not change the step is tried, judged and named."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from samestep.audit.blame import blamed
from samestep.audit.causes import UNEXPLAINED, Diagnosis, advice_for
from samestep.audit.diagnose.state import LeftDifference
from samestep.audit.experiments import Experiments
from samestep.audit.gradients import GradientDifference
from samestep.audit.subject import Capability
from samestep.errors import CheckError

Verdict = Literal["exact", "inexact", "skipped"]

MAX_SINGLE = 1e-3
"""Relative difference from which on nobody looks whether it is the rounding of float32."""


@dataclass(frozen=True)
class Measurement:
    """What an axis saw, before it is judged.

    Attributes:
        reason: What was compared.
        relative_difference: Norm of the difference over the reference's; None: nothing to compare.
        ratio: Norm of the gradient, or the number, over the reference's.
        cosine: Of the angle between the gradients.
        worst: The weights that differ most, with their relative differences.
        exact: The verdict; None: whether the relative difference is within the tolerance, a small
            multiple of the noise that was measured on the subject.
        noise_floor: None: the subject's.
        evidence: Numbers that are shown whatever the cause.
        diagnose: Names the cause, called only if the axis is inexact; None: the axis's own cause.

    Example:
        >>> from samestep import Measurement
        >>> measurement = Measurement("chunks of 3 against 8", relative_difference=0.25)
        >>> measurement.is_exact(tolerance=1e-12)
        False
    """

    reason: str
    relative_difference: float | None = None
    ratio: float | None = None
    cosine: float | None = None
    worst: tuple[tuple[str, float], ...] = ()
    exact: bool | None = None
    noise_floor: float | None = None
    evidence: str = ""
    diagnose: Callable[[], Diagnosis] | None = None

    @classmethod
    def of_left(
        cls,
        left: LeftDifference,
        reason: str,
        *,
        diagnose: Callable[[], Diagnosis] | None = None,
    ) -> "Measurement":
        """The measurement of what a step leaves beside its gradient, where that differs.

        Args:
            left: From `samestep.audit.diagnose.state.compare_left`.
            reason: What was compared.
            diagnose: Names the cause; None: as ``left`` does.
        """
        return cls(
            reason,
            relative_difference=left.size,
            worst=left.worst,
            exact=False,
            diagnose=diagnose or left.diagnosis,
        )

    @classmethod
    def of(
        cls,
        difference: GradientDifference,
        reason: str,
        *,
        diagnose: Callable[[], Diagnosis] | None = None,
        exact: bool | None = None,
        noise_floor: float | None = None,
        evidence: str = "",
    ) -> "Measurement":
        """The measurement of one gradient against another.

        Args:
            difference: Of the two, from `samestep.audit.gradients.compare_gradients`.
            reason: What was compared.
            diagnose: Names the cause.
            exact: The verdict, if it is no matter of the tolerance.
            noise_floor: If it is not the subject's.
            evidence: Numbers that are shown whatever the cause.
        """
        return cls(
            reason,
            relative_difference=difference.relative_difference,
            ratio=difference.ratio,
            cosine=difference.cosine,
            worst=difference.worst,
            exact=exact,
            noise_floor=noise_floor,
            evidence=evidence,
            diagnose=diagnose,
        )

    def is_exact(self, tolerance: float) -> bool:
        """The verdict."""
        if self.exact is not None:
            return self.exact
        return self.relative_difference is None or self.relative_difference <= tolerance

    @property
    def size(self) -> float:
        """The relative difference, for ranking: what is not finite is the largest."""
        difference = self.relative_difference or 0.0
        return difference if math.isfinite(difference) else math.inf


def within_noise(difference: GradientDifference, *measured: Experiments) -> bool:
    """Whether a difference is no more than the noise of any of several ways to run a subject.

    Args:
        difference: Of two gradients.
        *measured: The experiments of each way, whose tolerance follows from their noise.

    Returns:
        Whether; never with NaN. Later ways are measured only if the earlier ones do not explain it.
    """
    return any(difference.relative_difference <= each.tolerance for each in measured)


@dataclass(frozen=True)
class Axis:
    """Something that may not change the step.

    Attributes:
        name: In reports and on the command line; lower case, with hyphens.
        invariance: What may not change the step, a line for the documentation.
        measure: Runs experiments and compares them. It raises `samestep.CheckError` where the axis
            has no meaning for the subject: the axis is then skipped, with that reason.
        needs: What the subject must be able to do; else the axis is skipped.
        cause: The cause to name where the measurement has no diagnosis of its own.
        on_request: Run only if it is named.

    Example:
        >>> from samestep import Axis, Measurement
        >>> from samestep.audit.gradients import compare_gradients
        >>> def measure(experiments):
        ...     batch = experiments.whole_batch
        ...     again = experiments.rerun(batch).gradient
        ...     difference = compare_gradients(again, experiments.run(batch).gradient)
        ...     return Measurement.of(difference, "the same step twice")
        >>> Axis("repeat", "running the step again", measure, cause="rng").name
        'repeat'
    """

    name: str
    invariance: str
    measure: Callable[[Experiments], Measurement]
    needs: tuple[Capability, ...] = ()
    cause: str = UNEXPLAINED
    on_request: bool = False


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
        cause: The name of a cause, "unexplained", or None.
        residual: How far the cause's prediction is from what was seen.
        evidence: Numbers behind the cause.
        advice: What the cause is and what to change.
        also: Causes that are true beside it.
    """

    name: str
    verdict: Verdict
    reason: str = ""
    ratio: float | None = None
    cosine: float | None = None
    relative_difference: float | None = None
    noise_floor: float | None = None
    worst: tuple[tuple[str, float], ...] = ()
    cause: str | None = None
    residual: float | None = None
    evidence: str = ""
    advice: str = ""
    also: tuple[str, ...] = ()


def run_axis(axis: Axis, experiments: Experiments) -> AxisResult:
    """Measure an axis, judge it, and name the cause if it is inexact.

    Args:
        axis: The axis.
        experiments: The subject's.

    Returns:
        The verdict; "skipped" with the reason where the subject cannot run it.

    Raises:
        CheckError: The axis names a cause that there is not.
    """
    missing = experiments.subject.missing()
    for capability in axis.needs:
        if capability in missing:
            return AxisResult(axis.name, "skipped", missing[capability])
    try:
        measurement, exact = _judged(axis, experiments)
    except CheckError as error:
        return AxisResult(axis.name, "skipped", str(error))
    except Exception as error:  # the subject ran by default, but not under this axis
        return AxisResult(axis.name, "skipped", blamed(error))
    diagnosis = None if exact else _diagnosis(axis, measurement)
    cause = None if diagnosis is None else diagnosis.cause
    also = () if diagnosis is None else diagnosis.also
    evidence = [measurement.evidence, "" if diagnosis is None else diagnosis.evidence]
    noise_floor = measurement.noise_floor
    if noise_floor is None and measurement.relative_difference is not None:
        noise_floor = experiments.noise_floor
    return AxisResult(
        name=axis.name,
        verdict="exact" if exact else "inexact",
        reason=measurement.reason,
        ratio=measurement.ratio,
        cosine=measurement.cosine,
        relative_difference=measurement.relative_difference,
        noise_floor=noise_floor,
        worst=() if exact else measurement.worst,
        cause=cause,
        residual=None if diagnosis is None else diagnosis.residual,
        evidence="; ".join(filter(None, evidence)),
        advice=" ".join(advice_for(name, experiments.causes) for name in (cause, *also)),
        also=also,
    )


def _judged(axis: Axis, experiments: Experiments) -> tuple[Measurement, bool]:
    """What an axis saw, and whether it is exact: up to the rounding of float32, if there is any.

    A float64 model may hold constants that are made in float32, such as rotations, so that moving
    a row turns it by that rounding. Then the axis is exact once they are made in float64.
    """
    measurement = axis.measure(experiments)
    if measurement.is_exact(experiments.tolerance):
        return measurement, True
    # The limit saves time: float32 could not make a larger difference.
    small = 0 < measurement.size < MAX_SINGLE
    if not small or experiments.settings.dtype != torch.float64:
        return measurement, False
    wide = experiments.with_wide_constants
    try:
        again = axis.measure(wide)
        exact = again.is_exact(wide.tolerance)
    except Exception:  # not every subject computes in float64 throughout
        return measurement, False
    if not exact:
        return measurement, False
    text = f"in float32, in which parts are computed, {measurement.size:.1e}: its rounding"
    return replace(again, evidence="; ".join(filter(None, [again.evidence, text]))), True


def _diagnosis(axis: Axis, measurement: Measurement) -> Diagnosis:
    """A diagnosis; a subject that fails on the way to it is no less inexact."""
    difference = measurement.relative_difference or 0.0
    if measurement.diagnose is None:
        return Diagnosis(axis.cause, difference, "")
    try:
        return measurement.diagnose()
    except Exception as error:  # the subject is the user's code: anything may come
        return Diagnosis(UNEXPLAINED, difference, f"in a run of the diagnosis {blamed(error)}")
