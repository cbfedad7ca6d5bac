"""`samestep study` and `samestep report` as commands."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import tyro
import yaml
from pydantic.fields import FieldInfo

from samestep.errors import ConfigError
from samestep.study.parse import parse
from samestep.study.spec import StudySpec

INTERRUPTED = 130


def read_study(arguments: Sequence[str]) -> tuple[StudySpec, Path, int]:
    """The study that a command line asks for: flags over YAML over defaults.

    Args:
        arguments: ``[STUDY.yaml] --out DIR [--jobs N] [--field value ...]``.

    Returns:
        The spec, the folder, and how many runs go at a time.

    Raises:
        ConfigError: Everything that is wrong with the file and the flags together.
        SystemExit: The flags cannot be parsed (2), or help was asked for (0).
    """
    arguments = list(arguments)
    values: dict[str, Any] = {}
    source = "study"
    if arguments and not arguments[0].startswith("-"):
        source = arguments.pop(0)
        values = _read_yaml(Path(source))
        values.setdefault("name", Path(source).stem)
    flags = dataclasses.asdict(
        tyro.cli(_flags(), args=arguments, prog="samestep study [STUDY.YAML]")
    )
    out, jobs = flags.pop("out"), flags.pop("jobs")
    values.update({name: value for name, value in flags.items() if value is not None})
    if jobs < 1:
        raise ConfigError(f"jobs: at least 1, not {jobs}")
    return parse(values, source=source), Path(out), jobs


def _flags() -> type:
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
        about = tyro.conf.arg(
            help=(field.description or "").replace("\n", " "),
            help_behavior_hint=_hint(field),
            metavar=_metavar(name, field.annotation),
        )
        kind: Any = field.annotation
        flag = (name, Annotated[kind | None, about], dataclasses.field(default=None))
        fields.append(flag)
    return dataclasses.make_dataclass("Study", fields, frozen=True)


def _metavar(name: str, annotation: Any) -> str:
    """The values to choose from, or the field's name."""
    inner = get_args(annotation)
    if inner and get_origin(inner[0]) is Literal:  # a tuple of them
        inner = get_args(inner[0])
    choices = [one for one in inner if isinstance(one, str)]
    return "{" + ",".join(choices) + "}" if choices else name.upper()


def _hint(field: FieldInfo) -> str:
    if field.is_required():
        return "(here or in the file)"
    default = field.default
    if default is None or default == ():
        return ""
    values = default if isinstance(default, tuple) else [default]
    return f"(default: {' '.join(map(str, values))})"


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold 'field: value' lines, not {type(content).__name__}")
    return {str(key).replace("-", "_"): value for key, value in content.items()}


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
    # After the arguments are known to be good: these imports load PyTorch.
    from samestep.study.report import write_report
    from samestep.study.results import load_results, save_results
    from samestep.study.run import run_study

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out: {out} cannot be a folder ({error.strerror})") from None
    try:
        results = run_study(spec, out, jobs=jobs, say=_say)
    except KeyboardInterrupt:
        _say("samestep: interrupted; finished runs are kept, the same command continues")
        return INTERRUPTED
    save_results(out / "results.json", results)
    write_report(load_results(out / "results.json"), out)
    _print_verdicts(out)
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
    from samestep.study.report import write_report
    from samestep.study.results import load_results

    out = Path(arguments[0])
    write_report(load_results(out / "results.json"), out)
    _print_verdicts(out)
    return 0


def _print_verdicts(out: Path) -> None:
    from samestep.study.compare import compare
    from samestep.study.results import load_results

    for one in compare(load_results(out / "results.json")):
        print(f"{one.arm} [{one.group}]: {one.verdict}")
    print(f"report in {out / 'report.html'}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
