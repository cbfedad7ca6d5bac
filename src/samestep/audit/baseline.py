"""Known faults: a file that says which there are, so that a check fails by new ones alone.

A fault is an axis with its cause. Numbers beside it are for the reader and may change.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from samestep.audit.source import portable
from samestep.errors import ConfigError
from samestep.utils.files import write_atomically

FORMAT = "samestep baseline 1"


@dataclass(frozen=True)
class Fault:
    """An inexact axis.

    Attributes:
        axis: Its name.
        cause: The name of its cause.
        difference: The relative difference that was measured; None: none could be.
    """

    axis: str
    cause: str
    difference: float | None = None

    def __str__(self) -> str:
        size = "" if self.difference is None else f", differs by {self.difference:.1e}"
        return f"{self.axis} ({self.cause}{size})"


@dataclass(frozen=True)
class Comparison:
    """A report against the known faults.

    Attributes:
        known: Faults that are still there.
        new: Faults that are not known, or have another cause than the known one.
        mended: Known ones whose axis is exact now, or has another cause.
        unchecked: Known ones whose axis was not run.
    """

    known: tuple[Fault, ...]
    new: tuple[Fault, ...]
    mended: tuple[Fault, ...]
    unchecked: tuple[Fault, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def status(self, axis: str) -> str:
        """Whether the fault of an axis is known or new; empty if it has none."""
        for name in ("known", "new"):
            if any(fault.axis == axis for fault in getattr(self, name)):
                return name
        return ""

    def lines(self, file: str, *, written: bool = False) -> list[str]:
        """What to tell of it, a line each.

        Args:
            file: The file of the known faults.
            written: Whether it has been brought up to date since.
        """
        new = f"now known in {file}" if written else "NEW"
        mended = f"mended, and taken out of {file}" if written else "remove me"
        how = "" if written else f" is mended; --update-baseline takes it out of {file}"
        told = [f"known: {fault}" for fault in self.known]
        told += [f"{new}: {fault}" for fault in self.new]
        told += [f"{mended}: {fault}{how}" for fault in self.mended]
        told += [f"not checked: {fault}" for fault in self.unchecked]
        return told or ["no fault is known, none was found"]


Known = dict[str, dict[str, Fault]]
"""Faults by their axis, by subject."""


def faults_of(report: Mapping[str, Any]) -> dict[str, Fault]:
    """The faults in a report, by their axis."""
    return {
        axis["name"]: Fault(axis["name"], axis["cause"], axis["relative_difference"])
        for axis in report["axes"]
        if axis["verdict"] == "inexact"
    }


def compare(report: Mapping[str, Any], known: Mapping[str, Fault]) -> Comparison:
    """Tell known faults from new and mended ones.

    Args:
        report: `samestep.audit.check.CheckReport.as_dict`.
        known: The known faults of its subject, by their axis.

    Returns:
        Each fault of either, once; a changed cause is a new fault and a mended one.
    """
    found = faults_of(report)
    same = {
        axis for axis, fault in found.items() if axis in known and known[axis].cause == fault.cause
    }
    run = {axis["name"] for axis in report["axes"] if axis["verdict"] != "skipped"}
    return Comparison(
        known=tuple(found[axis] for axis in found if axis in same),
        new=tuple(found[axis] for axis in found if axis not in same),
        mended=tuple(known[axis] for axis in known if axis in run - same),
        unchecked=tuple(known[axis] for axis in known if axis not in run),
    )


def updated(report: Mapping[str, Any], known: Mapping[str, Fault]) -> dict[str, Fault]:
    """The known faults after a report: its own, and those of axes that were not run."""
    kept = {fault.axis: fault for fault in compare(report, known).unchecked}
    return kept | faults_of(report)


def read_baseline(path: Path, *, missing_is_empty: bool = False) -> Known:
    """The known faults in a file.

    Args:
        path: Written by `write_baseline`, or by hand.
        missing_is_empty: Whether no file is a file without faults.

    Returns:
        Faults by axis, by subject; subjects are named from the file's folder.

    Raises:
        ConfigError: There is no such file, or it is no baseline: all that is wrong with it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if missing_is_empty:
            return {}
        raise ConfigError(
            f"--baseline {path}: there is no such file; --update-baseline writes it"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--baseline {path}: it cannot be read: {error}") from error
    problems: list[str] = []
    known = _parsed(text, problems)
    if problems:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise ConfigError(f"--baseline {path} is no baseline:\n{lines}")
    return known


def write_baseline(path: Path, known: Mapping[str, Mapping[str, Fault]]) -> None:
    """Write the known faults; subjects without any are left out."""
    subjects = {
        subject: {
            fault.axis: {"cause": fault.cause, "difference": fault.difference}
            for fault in faults.values()
        }
        for subject, faults in sorted(known.items())
        if faults
    }
    content = {"format": FORMAT, "subjects": subjects}
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def subject_in(path: Path, reference: str) -> str:
    """What a subject is called in a baseline: its reference, as from the baseline's folder."""
    return portable(reference, path.absolute().parent)


def _parsed(text: str, problems: list[str]) -> Known:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        problems.extend(f"{name!r} is given twice" for name in twice)
        return dict(pairs)

    try:
        content = json.loads(text, object_pairs_hook=once)
    except ValueError as error:
        problems.append(f"no JSON: {error}")
        return {}
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        problems.append(f'it does not say "format": "{FORMAT}"')
        return {}
    subjects = content.get("subjects")
    if not isinstance(subjects, dict):
        problems.append(f"subjects: {subjects!r} is no object of subjects")
        return {}
    return {name: _faults(name, axes, problems) for name, axes in subjects.items()}


def _faults(subject: str, axes: Any, problems: list[str]) -> dict[str, Fault]:
    if not isinstance(axes, dict):
        problems.append(f"subjects, {subject}: {axes!r} is no object of axes")
        return {}
    faults = {}
    for axis, fields in axes.items():
        cause = fields.get("cause") if isinstance(fields, dict) else None
        difference = fields.get("difference") if isinstance(fields, dict) else None
        where = f"subjects, {subject}, {axis}"
        if not isinstance(cause, str) or not cause:
            problems.append(f"{where}: cause must be the name of a cause, not {cause!r}")
        elif not (difference is None or _is_number(difference)):
            problems.append(f"{where}: difference must be a number or null, not {difference!r}")
        else:
            faults[axis] = Fault(axis, cause, difference)
    return faults


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
