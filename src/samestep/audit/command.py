"""`samestep check` as a command: runs the subject in a child, shows and saves the report."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from samestep.audit.baseline import (
    Comparison,
    Known,
    compare,
    read_baseline,
    subject_in,
    updated,
    write_baseline,
)
from samestep.audit.formats import junit, junit_error, sarif, sarif_error
from samestep.audit.report import print_report, render_page
from samestep.audit.source import NO_FILE
from samestep.errors import CheckError, ConfigError
from samestep.utils.extras import REPORT_PACKAGES, require_extra
from samestep.utils.files import check_room, write_atomically
from samestep.utils.plugins import find_place
from samestep.utils.text import printable

TEMPLATE = Path(__file__).with_name("template.py")


@dataclass(frozen=True)
class CheckArguments:
    """Audit a training loop: does its step depend on how the batch was split, and why?

    Exit code 0: exact, or with --baseline no fault but known ones; 1: inexact; 2: the subject could
    not be run.
    """

    subject: Annotated[str | None, tyro.conf.Positional] = None
    """FILE.py or FILE.py:NAME: the names of a custom loop."""
    axes: str | None = None
    """Axes to run, with commas between; by default all but dropout and low-precision. There are
    micro-batch, order, padding, packing, short-window, next-step (what leaks into the step after),
    knobs (sizes of the loop's own), loader (its own loader deals the rows), zero-target, terms,
    ranks, reported, evaluation-batch, evaluation-ranks, evaluation-first, low-precision and
    dropout."""
    json: Path | None = None
    """Write the report to this file."""
    html: Path | None = None
    """Write a page with the report to this file (needs samestep[report])."""
    junit: Path | None = None
    """Write the axes as tests in JUnit's XML to this file."""
    sarif: Path | None = None
    """Write the inexact axes as results of a code scan, SARIF 2.1.0, to this file."""
    baseline: Path | None = None
    """The known faults: they are listed and pass, new ones fail, mended ones are named."""
    update_baseline: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write what is found to the file of --baseline as known."""
    verbose: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Say of each skipped axis why."""
    timeout: float = 300.0
    """Seconds after which a subject that hangs is stopped."""
    init: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write a commented subject file to start from, subject.py or the file named."""


def run(arguments: Sequence[str]) -> int:
    """Check as the arguments say.

    Args:
        arguments: ``FILE.py[:NAME] [--flag value ...]``.

    Returns:
        0 exact, or no fault that is not known; 1 inexact.

    Raises:
        CheckError: The subject could not be run.
        ConfigError: The baseline is missing or none, or a file cannot be written.
    """
    options = tyro.cli(CheckArguments, args=list(arguments), prog="samestep check")
    if options.init:
        return _init(Path(options.subject or "subject.py"))
    if options.subject is None:
        raise CheckError("which loop? `samestep check FILE.py`; `--init` writes one to start from")
    _check_outputs(options)
    known = _read_known(options)
    console = Console(stderr=True, highlight=False)
    axes = options.axes.split(",") if options.axes else []
    try:
        with console.status("starting", spinner="dots") as status:
            report = audit_in_child(
                options.subject, axes, timeout=options.timeout, progress=status.update
            )
    except CheckError as error:
        _write(options.junit, junit_error(options.subject, str(error)))
        _write(options.sarif, sarif_error(options.subject, str(error)))
        raise
    print_report(report, Console(highlight=False), verbose=options.verbose)
    compared = None if known is None else _compare(options, report, known)
    if options.json is not None:
        write_atomically(options.json, json.dumps(report, indent=2) + "\n")
    if options.html is not None:
        write_atomically(options.html, render_page(report))
    _write(options.junit, junit(options.subject, report, compared=compared))
    _write(options.sarif, sarif(options.subject, report, compared=compared))
    if compared is not None:
        return 1 if compared.new else 0
    return 0 if report["verdict"] == "exact" else 1


def _write(path: Path | None, text: str) -> None:
    if path is not None:
        write_atomically(path, text)


def _read_known(options: CheckArguments) -> Known | None:
    """The file of known faults, read before the work; None if none is named."""
    if options.baseline is None:
        if options.update_baseline:
            raise ConfigError("--update-baseline writes the file of --baseline: name one")
        return None
    return read_baseline(options.baseline, missing_is_empty=options.update_baseline)


def _compare(options: CheckArguments, report: dict[str, Any], known: Known) -> Comparison:
    """The report against the known faults, told; these are brought up to date if that is asked."""
    assert options.baseline is not None
    assert options.subject is not None
    subject = subject_in(options.baseline, options.subject)
    compared = compare(report, known.get(subject, {}))
    lines = compared.lines(str(options.baseline), written=options.update_baseline)
    if options.update_baseline:
        known[subject] = updated(report, known.get(subject, {}))
        write_baseline(options.baseline, known)
        compared = compare(report, known[subject])
    print("\n".join(map(printable, lines)))
    report["baseline"] = compared.as_dict()
    return compared


def _check_outputs(options: CheckArguments) -> None:
    """Refuse, before the work, what could not be written after it."""
    if options.html is not None:
        require_extra("report", REPORT_PACKAGES, what="--html")
    names = ("json", "html", "junit", "sarif")
    given = [(name, getattr(options, name)) for name in names]
    if options.update_baseline:
        given.append(("baseline", options.baseline))
    problems = [
        f"--{name} {path}: {problem}"
        for name, path in given
        if path is not None
        for problem in ["this is a folder" if path.is_dir() else check_room(path.absolute().parent)]
        if problem
    ]
    paths = [path.absolute() for _, path in given if path is not None]
    twice = sorted({str(path) for path in paths if paths.count(path) > 1})
    problems += [f"{path}: two reports cannot be written to one file" for path in twice]
    if problems:
        raise ConfigError("\n".join(problems))


class SubjectError(Exception):
    """The traceback of an error in the process of a subject, as text."""


def _init(path: Path) -> int:
    if path.exists():
        raise CheckError(f"{path} is there already: name another file")
    path.write_text(TEMPLATE.read_text(encoding="utf-8"), encoding="utf-8")
    print(f"wrote {path}; edit it, then: samestep check {path}")
    return 0


def audit_in_child(
    reference: str, axes: Sequence[str], *, timeout: float, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Audit a subject in a child process that is always ended, whatever it does.

    Args:
        reference: ``FILE.py[:NAME]`` or ``package.module[:NAME]``.
        axes: Names; none: those that run by default.
        timeout: Seconds after which it is stopped.
        progress: Called with what it is about.

    Returns:
        `samestep.audit.check.CheckReport.as_dict`, with ``source`` beside it: see
        `samestep.audit.source.describe_source`.

    Raises:
        CheckError: The subject could not be run.
    """
    find_place(reference, what="subject", error=CheckError, hint=NO_FILE)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "report.json"
        errors = Path(folder) / "stderr"
        command = [sys.executable, "-m", "samestep.audit.worker", reference, str(result), *axes]
        with errors.open("w") as stderr:
            child = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True
            )
        hung = threading.Event()

        def stop() -> None:
            hung.set()
            _end(child)

        timer = threading.Timer(timeout, stop)
        timer.start()
        last = "starting"
        try:
            assert child.stdout is not None
            for line in child.stdout:
                last = line.strip()
                progress(last)
            code = child.wait()
        finally:
            timer.cancel()
            _end(child)
            if child.stdout is not None:
                child.stdout.close()
        if hung.is_set():
            raise CheckError(f"{reference} was stopped after {timeout:g} s, in: {last}")
        if not result.exists():
            tail = "\n".join(errors.read_text(errors="replace").splitlines()[-8:])
            raise CheckError(f"{reference} ended with code {code}, in: {last}\n{tail}")
        report: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    if "error" in report:
        cause = report.get("traceback")
        raise CheckError(report["error"]) from (SubjectError(f"\n{cause}") if cause else None)
    return report


def _end(child: subprocess.Popen[str]) -> None:
    """End the child and whatever it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
