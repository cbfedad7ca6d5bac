"""`samestep certificate` as a command: a check written as a file and a badge, and verified."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from samestep.audit.certificate import badge, certificate, changes_since, read_certificate
from samestep.audit.command import audit_in_child
from samestep.audit.report import print_report
from samestep.errors import CheckError, ConfigError
from samestep.utils.files import check_room, write_atomically
from samestep.utils.text import printable


@dataclass(frozen=True)
class CertificateArguments:
    """Check a training loop, and write what was found of which code as a file and as a badge.

    Exit code 0: exact, or with --verify nothing has changed; 1: inexact (which is certified too),
    or something has changed; 2: the subject could not be run.
    """

    subject: Annotated[str | None, tyro.conf.Positional] = None
    """FILE.py or FILE.py:NAME, as for `samestep check`."""
    out: Path = Path("certificate.json")
    """The file to write."""
    badge: Path = Path("certificate.svg")
    """The picture to write."""
    axes: str | None = None
    """Axes to run, with commas between; by default those of `samestep check`."""
    timeout: float = 300.0
    """Seconds after which a subject that hangs is stopped."""
    verify: Path | None = None
    """Run nothing: say whether the code and the versions are those of this certificate."""


def run(arguments: Sequence[str]) -> int:
    """Certify, or verify, as the arguments say.

    Args:
        arguments: ``FILE.py[:NAME] [--flag value ...]``.

    Returns:
        0 exact or unchanged, 1 inexact or changed.

    Raises:
        CheckError: The subject could not be run.
        ConfigError: A file cannot be written, or is no certificate.
    """
    options = tyro.cli(CertificateArguments, args=list(arguments), prog="samestep certificate")
    if options.verify is not None:
        return _verify(options.verify)
    if options.subject is None:
        raise CheckError("of which loop? `samestep certificate FILE.py`")
    _check_outputs(options)
    console = Console(stderr=True, highlight=False)
    axes = options.axes.split(",") if options.axes else []
    with console.status("starting", spinner="dots") as status:
        report = audit_in_child(
            options.subject, axes, timeout=options.timeout, progress=status.update
        )
    found = certificate(report, options.subject, options.out.absolute().parent)
    print_report(report, Console(highlight=False))
    write_atomically(options.out, json.dumps(found, indent=2) + "\n")
    write_atomically(options.badge, badge(found))
    print(f"wrote {options.out} and {options.badge}")
    return 0 if report["verdict"] == "exact" else 1


def _verify(path: Path) -> int:
    found = read_certificate(path)
    changes = changes_since(found, path.absolute().parent)
    if changes:
        print("\n".join(printable(f"changed: {line}") for line in changes))
        print(f"{path} speaks of another state; samestep certificate makes a new one")
        return 1
    print(printable(f"{found['subject']} is as certified: {found['verdict']}"))
    return 0


def _check_outputs(options: CertificateArguments) -> None:
    """Refuse, before the work, what could not be written after it."""
    given = (("out", options.out), ("badge", options.badge))
    problems = [
        f"--{name} {path}: {problem}"
        for name, path in given
        for problem in ["this is a folder" if path.is_dir() else check_room(path.absolute().parent)]
        if problem
    ]
    if options.out.absolute() == options.badge.absolute():
        problems.append(f"--badge {options.badge}: this is the file of --out")
    if problems:
        raise ConfigError("\n".join(problems))
