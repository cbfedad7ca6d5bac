"""The audit from Python: one call, or one assertion in a test."""

from collections.abc import Sequence
from typing import Any

from samestep.audit.check import CheckReport, check_subject
from samestep.audit.load import as_subject, load_subject


def check(subject: Any, axes: Sequence[str] | None = None) -> CheckReport:
    """Audit a training loop: does its step depend on how the batch was split, and why?

    Args:
        subject: ``"FILE.py"`` or ``"FILE.py:NAME"``; or a module, class, object or mapping with
            ``model``, ``examples``, ``collate`` and ``step`` or ``train``.
        axes: Names of `samestep.audit.check.AXES`; None: all but those that change the loop itself
            (dropout, low precision).

    Returns:
        The report: a verdict for each axis, and a cause with its evidence where it is inexact.

    Raises:
        CheckError: The subject cannot be run; its own error is shown.
    """
    found = load_subject(subject) if isinstance(subject, str) else as_subject(subject)
    return check_subject(found, axes)


def assert_same_step(subject: Any, axes: Sequence[str] | None = None) -> None:
    """Fail a test unless a training loop's step is the same under every split.

    Args:
        subject: As for `check`.
        axes: As for `check`.

    Raises:
        AssertionError: An axis is inexact; names each with its cause and what to change.
        CheckError: The subject cannot be run.
    """
    report = check(subject, axes)
    lines = [
        f"{axis.name}: {axis.cause} (relative difference {axis.relative_difference:.2e}, "
        f"noise {axis.noise_floor:.0e}). {axis.advice} [{axis.evidence}]"
        for axis in report.axes
        if axis.verdict == "inexact"
    ]
    if lines:
        raise AssertionError(f"{report.subject} depends on the split:\n" + "\n".join(lines))
