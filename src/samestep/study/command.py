"""`samestep study` and `samestep report` as commands."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import tyro
from pydantic.fields import FieldInfo

from samestep.errors import ConfigError
from samestep.study.results import load_results, save_results
from samestep.study.spec import StudySpec, parse_spec
from samestep.utils.extras import REPORT_PACKAGES, require_extra
from samestep.utils.files import check_room
from samestep.utils.messages import read_yaml
from samestep.utils.text import printable

_EXIT_INTERRUPTED = 130


def run(arguments: Sequence[str]) -> int:
    """Run a study and draw its report.

    Args:
        arguments: As for `read_study`.

    Returns:
        Exit code 0, or 130 after Ctrl-C.

    Raises:
        SamestepError: As `samestep.study.run.run_study`.
    """
    spec, out, jobs = read_study(arguments)
    # Hours of work are not to end in a report that cannot be drawn or written.
    require_extra("report", REPORT_PACKAGES, what="the report of a study")
    problem = check_room(out)
    if problem:
        raise ConfigError(f"out: {problem}")
    # After the arguments are known to be good: these imports load PyTorch.
    from samestep.study.run import run_study

    try:
        results = run_study(spec, out, jobs=jobs, on_progress=_print_progress)
    except KeyboardInterrupt:
        _print_progress("samestep: interrupted; finished runs are kept, the same command continues")
        return _EXIT_INTERRUPTED
    save_results(out / "results.json", results)
    _report(out)
    return 0


def report(arguments: Sequence[str]) -> int:
    """Draw the report of a finished study again.

    Args:
        arguments: ``DIR``, the study's folder.

    Returns:
        Exit code 0.

    Raises:
        ConfigError: There is no such study.
    """
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise ConfigError(f"usage: samestep report DIR; found {' '.join(arguments) or 'nothing'}")
    _report(Path(arguments[0]))
    return 0


def _report(out: Path) -> None:
    """Draw the report of the results in a folder, and print the verdicts."""
    from samestep.study.comparison import compare_arms
    from samestep.study.report import write_report

    results = load_results(out / "results.json")
    write_report(results, out)
    for comparison in compare_arms(results):
        print(printable(f"{comparison.arm} [{comparison.group}]: {comparison.verdict}"))
    print(f"report in {out / 'report.html'}")


def _print_progress(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)


def read_study(arguments: Sequence[str]) -> tuple[StudySpec, Path, int]:
    """The study that a command line describes: flags over YAML over defaults.

    Args:
        arguments: ``[STUDY.yaml] --out DIR [--jobs N] [--field value ...]``.

    Returns:
        The spec, the folder, and how many runs go at a time.

    Raises:
        ConfigError: Everything that is wrong with the file and the flags together.
        SystemExit: The flags cannot be parsed (2), or help was requested (0).
    """
    arguments = list(arguments)
    fields: dict[str, Any] = {}
    source = "study"
    if arguments and not arguments[0].startswith("-"):
        source = arguments.pop(0)
        fields = read_yaml(Path(source))
        fields.setdefault("name", Path(source).stem)
    flags = dataclasses.asdict(
        tyro.cli(_flags_class(), args=arguments, prog="samestep study [STUDY.YAML]")
    )
    out, jobs = flags.pop("out"), flags.pop("jobs")
    fields.update({name: value for name, value in flags.items() if value is not None})
    if jobs < 1:
        raise ConfigError(f"jobs: at least 1, not {jobs}")
    return parse_spec(fields, source=source), Path(out), jobs


def _flags_class() -> type:
    """A flag for each field of a study, unset by default, and those of the call itself."""
    fields: list[Any] = [
        ("out", Annotated[str, tyro.conf.arg(help="Folder for results, report and cache.")]),
        (
            "jobs",
            Annotated[int, tyro.conf.arg(help="Runs at a time, each in its own process.")],
            dataclasses.field(default=1),
        ),
    ]
    for name, field in StudySpec.model_fields.items():
        if name == "arms":
            continue
        argument = tyro.conf.arg(
            help=(field.description or "").replace("\n", " "),
            help_behavior_hint=_default_hint(field),
            metavar=_metavar(name, field.annotation),
        )
        annotation: Any = field.annotation
        flag = (name, Annotated[annotation | None, argument], dataclasses.field(default=None))
        fields.append(flag)
    return dataclasses.make_dataclass("Study", fields, frozen=True)


def _metavar(name: str, annotation: Any) -> str:
    """The values to choose from, or the field's name."""
    members = get_args(annotation)
    if members and get_origin(members[0]) is Literal:  # a tuple of them
        members = get_args(members[0])
    choices = [member for member in members if isinstance(member, str)]
    return "{" + ",".join(choices) + "}" if choices else name.upper()


def _default_hint(field: FieldInfo) -> str:
    if field.is_required():
        return "(here or in the file)"
    default = field.default
    if default is None or default == ():
        return ""
    values = default if isinstance(default, tuple) else [default]
    return f"(default: {' '.join(map(str, values))})"
