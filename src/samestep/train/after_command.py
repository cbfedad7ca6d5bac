"""`samestep generate`, `samestep eval` and `samestep export`: what is done with a finished run."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import tyro

from samestep.errors import ConfigError
from samestep.train.finished import (
    EvalArguments,
    ExportArguments,
    GenerateArguments,
    model_of,
)
from samestep.utils.text import printable

_Arguments = TypeVar("_Arguments")


def _parse(kind: type[_Arguments], arguments: Sequence[str], *, name: str) -> _Arguments:
    return tyro.cli(kind, args=list(arguments), prog=f"samestep {name}")


def generate(arguments: Sequence[str]) -> int:
    """Print answers.

    Args:
        arguments: ``RUN --prompt TEXT ...``.

    Returns:
        0.

    Raises:
        ConfigError: There is no model, or an argument cannot be.
    """
    options = _parse(GenerateArguments, arguments, name="generate")
    problems = []
    if options.tokens < 1:
        problems.append(f"tokens: at least 1, not {options.tokens}")
    if options.temperature < 0:
        problems.append(f"temperature: at least 0, not {options.temperature}")
    if not options.prompt or not all(options.prompt):
        problems.append("prompt: give a text that is not empty")
    if problems:
        raise ConfigError("\n".join(problems))
    model_of(options.run)
    from samestep.train.after import answers_to  # loads PyTorch

    for text in answers_to(options):
        print(printable(text))
    return 0


def evaluate(arguments: Sequence[str]) -> int:
    """Print the loss and the metrics of a run's model on other rows.

    Args:
        arguments: ``RUN --data SOURCE ...``.

    Returns:
        0.

    Raises:
        ConfigError: There is no run, or its settings do not fit.
        DataError: The rows cannot be used.
    """
    options = _parse(EvalArguments, arguments, name="eval")
    model_of(options.run)
    from samestep.train.after import evaluate_run  # loads PyTorch

    report = evaluate_run(options)
    values = {"loss": report.loss, **report.terms}
    for name, value in values.items():
        print(printable(f"{name} {value:.6g}"))
    counts = ", ".join(f"{value:,.0f} {unit}" for unit, value in report.counts.items())
    print(printable(f"over {counts}"))
    return 0


def export(arguments: Sequence[str]) -> int:
    """Write a run's model to a folder.

    Args:
        arguments: ``RUN --out FOLDER``.

    Returns:
        0.

    Raises:
        ConfigError: There is no run, the folder cannot be written, or the Hub cannot be asked.
        SamestepError: The folder is written, but could not be uploaded.
    """
    options = _parse(ExportArguments, arguments, name="export")
    out = Path(options.out).expanduser()
    model_of(options.run)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out: {options.out} is there already: name a folder that is not")
    if options.private and options.push is None:
        raise ConfigError("private is given without push")
    if options.push is not None:
        from samestep.train.push import check_push, push  # waits for the Hub's client

        check_push(options.push)
    from samestep.train.after import export_model  # loads PyTorch

    export_model(options, out)
    print(printable(f"model in {out}"))
    if options.push is not None:
        print(printable(f"uploaded: {push(out, options.push, private=options.private)}"))
    return 0
