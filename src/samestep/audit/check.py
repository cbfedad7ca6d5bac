"""The audit: every axis that a subject can run, and one verdict."""

import importlib.util
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, Literal

from samestep.audit import across_ranks, scalars
from samestep.audit import axes as by_gradient
from samestep.audit.axes import AxisResult
from samestep.audit.runs import Runs
from samestep.audit.subject import Subject
from samestep.errors import CheckError

AXES: dict[str, Callable[[Runs], AxisResult]] = {
    "micro-batch": by_gradient.micro_batch,
    "order": by_gradient.order,
    "padding": by_gradient.padding,
    "packing": by_gradient.packing,
    "short-window": by_gradient.short_window,
    "zero-target": by_gradient.zero_target,
    "terms": by_gradient.terms,
    "ranks": across_ranks.ranks,
    "reported": scalars.reported,
    "evaluation-batch": scalars.evaluation_batch,
    "evaluation-first": by_gradient.evaluation_first,
    "low-precision": by_gradient.low_precision,
    "dropout": by_gradient.dropout,
}
"""The axes by name, in the order of the report."""

ON_REQUEST = ("dropout", "low-precision")
"""Axes that are run only when they are asked for by name."""

PACKAGES = ("samestep", "torch", "transformers", "trl", "accelerate", "lightning")


@dataclass(frozen=True)
class CheckReport:
    """What an audit found.

    Attributes:
        subject: Its name.
        verdict: "exact" if no axis is inexact.
        axes: The results, in the order of `AXES`.
        examples: Examples of the effective batch.
        dtype: What the gradients were computed in.
        seed: Of the weights and of every run.
        versions: Of Python and of the packages that are installed.
    """

    subject: str
    verdict: Literal["exact", "inexact"]
    axes: tuple[AxisResult, ...]
    examples: int
    dtype: str
    seed: int
    versions: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def check_subject(
    subject: Subject,
    axes: Sequence[str] | None = None,
    *,
    progress: Callable[[str], None] = lambda _: None,
) -> CheckReport:
    """Audit a subject.

    Args:
        subject: Made by an adapter of `samestep.audit.adapters`.
        axes: Names of `AXES`; None: all but those of `ON_REQUEST`.
        progress: Called with the name of each axis before it runs.

    Returns:
        The report. An axis that the subject cannot run is "skipped" with the reason.

    Raises:
        CheckError: An unknown axis, or the subject cannot be run at all.
    """
    wanted = [name for name in AXES if name not in ON_REQUEST] if axes is None else list(axes)
    unknown = [name for name in wanted if name not in AXES]
    if unknown:
        raise CheckError(f"no such axis: {', '.join(unknown)}; there are {', '.join(AXES)}")
    progress("first run")
    runs = Runs.start(subject)
    results = []
    for name in wanted:
        progress(name)
        results.append(_run_axis(name, runs))
    inexact = any(result.verdict == "inexact" for result in results)
    return CheckReport(
        subject=subject.name,
        verdict="inexact" if inexact else "exact",
        axes=tuple(results),
        examples=subject.size,
        dtype="native" if runs.plain.dtype is None else "float64",
        seed=runs.plain.seed,
        versions=_versions(),
    )


def _run_axis(name: str, runs: Runs) -> AxisResult:
    reason = runs.subject.skips().get(name)
    if reason is not None:
        return AxisResult(name, "skipped", reason)
    try:
        return AXES[name](runs)
    except CheckError as error:
        return AxisResult(name, "skipped", str(error))
    except Exception as error:  # the subject ran plain, but not under this axis
        return AxisResult(name, "skipped", f"the subject failed: {type(error).__name__}: {error}")


def _versions() -> dict[str, str]:
    installed = [name for name in PACKAGES if importlib.util.find_spec(name) is not None]
    return {"python": platform.python_version(), **{name: version(name) for name in installed}}
