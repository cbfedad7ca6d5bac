"""`samestep doctor` as a command: what is installed, what is known of it, a live check, advice."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from samestep.doctor.advice import advise
from samestep.doctor.environment import installed
from samestep.doctor.known import line_on_class, lines_on
from samestep.doctor.report import print_doctor
from samestep.doctor.run import MODEL, TRAINER, run_all
from samestep.errors import ConfigError
from samestep.utils.files import check_room, write_atomically


@dataclass(frozen=True)
class DoctorArguments:
    """Is the training step of what is installed here exact, and if not, what to do?

    Exit code 0: exact, or nothing to check; 1: something is inexact; 2: something could not be run.
    """

    model: str | None = None
    """A class of transformers, or a model's folder: that class at reduced size, alone."""
    trainer: str | None = None
    """FILE.py or FILE.py:NAME: your own factory of trainers, or loop, alone."""
    json: Path | None = None
    """Write the report to this file."""
    timeout: float = 180.0
    """Seconds after which a probe that hangs is stopped."""


def run(arguments: Sequence[str]) -> int:
    """Examine what is installed, as the arguments say.

    Args:
        arguments: ``[--flag value ...]``.

    Returns:
        0 exact, or nothing to check; 1 inexact; 2 something could not be run.

    Raises:
        ConfigError: The report could not be written.
    """
    options = tyro.cli(DoctorArguments, args=list(arguments), prog="samestep doctor")
    if options.json is not None:
        problem = check_room(options.json.absolute().parent)
        if options.json.is_dir() or problem:
            raise ConfigError(f"--json {options.json}: {problem or 'this is a folder'}")
    console = Console(stderr=True, highlight=False)
    with console.status("looking", spinner="dots") as status:
        report = examine(
            options.model, options.trainer, seconds=options.timeout,
            progress=lambda name: status.update(f"trying {name}"),
        )  # fmt: skip
    print_doctor(report, Console(highlight=False))
    if options.json is not None:
        write_atomically(options.json, json.dumps(report, indent=2) + "\n")
    return {"exact": 0, "inexact": 1, "not run": 2}[report["verdict"]]


def examine(
    model: str | None = None,
    trainer: str | None = None,
    *,
    seconds: float,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Look at what is installed.

    Args:
        model: A class of transformers or a folder, instead of the table of probes.
        trainer: A file with a subject, instead of the table too.
        seconds: How long a probe may take.
        progress: Called with the name of each.

    Returns:
        ``versions``, ``known`` (lines), ``probes``, ``advice`` (lines), and ``verdict``: "exact",
        "inexact", or "not run" if something could not be run and all else is exact.
    """
    versions = installed()
    names = [f"{kind}{name}" for kind, name in ((MODEL, model), (TRAINER, trainer)) if name]
    if not names:
        # Reading the table loads PyTorch, which a wrong flag is not to wait for.
        from samestep.doctor.probes import PROBES

        names = [name for name, probe in PROBES.items() if probe.possible()]
    transformers = versions["transformers"]
    known = [] if transformers is None or trainer else lines_on(transformers)
    if model is not None:
        line = line_on_class(model)
        known = [line] if line else []
    probes = run_all(names, seconds=seconds, progress=progress)
    verdicts = {probe["verdict"] for probe in probes}
    verdict = next((one for one in ("inexact", "not run") if one in verdicts), "exact")
    return {
        "verdict": verdict,
        "versions": versions,
        "known": known,
        "probes": probes,
        "advice": advise(probes, versions),
    }
