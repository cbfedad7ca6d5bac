"""`samestep train` as a command: settings from YAML and flags, a run, a line with its result."""

import os
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import tyro

from samestep.errors import ConfigError
from samestep.train.launch import launch, process_group, ranks_to_launch, under_torchrun
from samestep.train.optim import OPTIMIZERS
from samestep.train.run_folder import RunFolder
from samestep.train.settings.base import TrainSettings, finalize, with_current_names
from samestep.train.settings.command_line import arities, train_help, unknown_names
from samestep.train.settings.objectives import settings_class
from samestep.train.settings.paths import hub_names, missing_paths
from samestep.utils.extras import require_available, require_extra
from samestep.utils.flags import CommandLine, split_command_line
from samestep.utils.messages import read_yaml
from samestep.utils.text import printable

_REQUIRED = ("model", "data", "out")


def run(arguments: Sequence[str]) -> int:
    """Train as the arguments say.

    Args:
        arguments: ``[--flag value ...]``, and a YAML file anywhere among them.

    Returns:
        The exit code: 0, or that of the ranks that were started.

    Raises:
        SamestepError: As `samestep.train.trainer.train`.
    """
    settings = read_settings(arguments)
    check_paths(settings)
    if settings.dry_run:
        return _dry_run(settings)
    ranks = ranks_to_launch(settings.ranks)
    if ranks is not None:
        return launch(ranks, ["train", *arguments])
    # After the arguments are known to be good: this import loads PyTorch.
    from samestep.engine.collectives import rank
    from samestep.train.trainer import train

    with process_group():
        summary = train(settings)
        if rank() > 0:
            return 0
    print(f"{summary['steps']} steps, {summary['tokens']:,} tokens, {summary['seconds']:.1f} s")
    for line in _evaluation_lines(summary):
        print(line)
    print(f"model in {summary['model']}")
    return 0


def _evaluation_lines(summary: dict[str, Any]) -> list[str]:
    """The loss of each evaluation set before and after, and what was chosen."""
    before, after, best = (
        summary[name] for name in ("evaluation_before", "evaluation_after", "best")
    )
    if after is None:
        return []
    sets = after if isinstance(after, dict) else {"": after}
    earlier = before if isinstance(before, dict) else {"": before}
    lines = []
    for name, value in sets.items():
        first = earlier.get(name)
        change = "" if first is None else f"{first:.4f} -> "
        lines.append(f"evaluation loss{name and f' of {name}'} {change}{value:.4f}")
    if best is not None:
        early = ", where the run stopped early" if summary["stopped_early"] else ""
        lines.append(
            f"best {best['metric']} {best['value']:.6g} after step {best['step']} of "
            f"{summary['steps']}{early}"
        )
    return [printable(line) for line in lines]


def _dry_run(settings: TrainSettings) -> int:
    """Say what a run would read, and what it would take, and end there."""
    from transformers.utils import logging as transformers_logging

    from samestep.train.forecast import forecast
    from samestep.train.run_data import check_references, load_data, what_is_learned

    if os.environ.get("RANK", "0") != "0":  # under torchrun one says it for all
        return 0
    transformers_logging.set_verbosity_error()
    encoding = sys.stdout.encoding or "utf-8"
    loaded = load_data(check_references(settings))
    for text in chain(what_is_learned(settings, loaded[1]), forecast(settings, loaded)):
        print(printable(text).encode(encoding, "backslashreplace").decode(encoding), flush=True)
    return 0


def read_settings(arguments: Sequence[str]) -> TrainSettings:
    """The settings that a command line names: flags over YAML over defaults.

    Args:
        arguments: ``[--flag value ...]``, and a YAML file anywhere among them.

    Returns:
        The settings, finalized.

    Raises:
        ConfigError: Everything that is wrong with the file or with the combination.
        SystemExit: The flags cannot be parsed (2), or help was shown (0).
    """
    line = split_command_line(arguments, arities())
    path = None if line.file is None else Path(line.file)
    fields = _fields_of_file(path, line.flags)
    objective = _flag(line.flags, "--objective") or str(fields.get("objective", "causal_lm"))
    kind = settings_class(objective)
    if {"-h", "--help"} & set(line.flags):
        print(train_help(kind, objective), end="")
        raise SystemExit(0)
    negated = {f"no_{name}" for name, arity in arities().items() if arity == "none"}
    names = [name for name in line.names if name not in negated]
    problems = unknown_names(names, kind, objective, flag=True)
    values: dict[str, Any] = {}
    if fields:
        unknown = unknown_names(fields, kind, objective, flag=False)
        known = {name: value for name, value in fields.items() if name in kind.model_fields}
        values, wrong = _validated(kind=kind, fields=known)
        where = path or "config.yaml"
        problems = [*(f"{where}: {problem}" for problem in [*unknown, *wrong]), *problems]
    missing = [name for name in _REQUIRED if name not in {**fields, **dict.fromkeys(names)}]
    if missing:
        problems.append(_missing(missing, line))
    if problems:
        raise ConfigError("\n  - ".join(["the settings are wrong:", *problems]))
    required = {name: tyro.MISSING for name in _REQUIRED if name not in values}
    start = kind.model_construct(**{**values, "objective": objective}, **required)
    # What is left to find are values of flags: tyro names the flag and the value.
    settings = tyro.cli(
        kind,
        args=_merge_repeated(line.flags, kind),
        default=start,
        prog="samestep train [RUN.YAML]",
    )
    settings.model_fields_set.intersection_update({*values, *names, *_REQUIRED, "objective"})
    return finalize(settings)


def _fields_of_file(path: Path | None, flags: Sequence[str]) -> dict[str, Any]:
    """The fields of the file; of a run that is to be resumed, without one, all of its settings.

    With a file, the learning rate that the run had stands in for one that nobody gives.
    """
    fields = {} if path is None else read_yaml(path)
    out = _flag(flags, "--out") or fields.get("out")
    if "--resume" not in flags or not isinstance(out, str):
        return fields
    config = Path(out) / "config.yaml"
    if not config.exists():
        if path is None:
            raise ConfigError(f"resume: there is no run in {out} (no {config})")
        return fields
    saved = with_current_names(read_yaml(config))
    if path is None:
        return saved
    return {**{name: saved[name] for name in ("lr",) if name in saved}, **fields}


def _missing(names: Sequence[str], line: CommandLine) -> str:
    flags = " ".join(f"--{name} {name.upper()}" for name in names)
    where = f"{line.file} lacks {', '.join(names)}" if line.file else f"needed: {', '.join(names)}"
    return f"{where}; as flags: {flags}"


def check_paths(settings: TrainSettings) -> None:
    """Refuse what is missing or in the way on disk, before anything heavy is imported.

    Args:
        settings: Finalized settings.

    Raises:
        ConfigError: Everything that is missing; or ``out`` must not be written to.
    """
    problems = missing_paths(settings)
    problems = problems or _missing_on_hub(settings)
    try:
        if not under_torchrun():  # there several ranks would ask for the folder's lock
            RunFolder(Path(settings.out)).check(settings)
    except ConfigError as error:
        problems.append(str(error))
    if settings.track:
        try:
            require_extra("track", settings.track, what="track")
        except ConfigError as error:
            problems.append(str(error))
    few_bits = [] if settings.quantization is None else ["bitsandbytes", "accelerate"]
    row = OPTIMIZERS.get(settings.optimizer)
    needs = list(dict.fromkeys([*few_bits, *(row.needs if row else ())]))
    try:
        what = "quantization" if few_bits else f"optimizer {settings.optimizer}"
        require_available("quant", needs, what=what)
    except ConfigError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))


def _missing_on_hub(settings: TrainSettings) -> list[str]:
    """A line for each name of the Hub that cannot be loaded: the Hub is asked once for each."""
    names = hub_names(settings)
    if not names:
        return []
    from samestep.utils.hub import find_on_hub, is_offline

    problems = []
    for field, name, kind in names:
        if kind == "dataset" and is_offline():  # the library's own cache may have it
            continue
        try:
            find_on_hub(name, kind=kind)
        except LookupError as error:
            here = "folder" if kind == "model" else "file or folder"
            problems.append(f"{field}: {name} is no {here} here, and {error}")
    return problems


def _flag(arguments: Sequence[str], flag: str) -> str | None:
    """The value of a flag that has to be known before all are parsed; None without it."""
    for at, argument in enumerate(arguments):
        if argument == flag and arguments[at + 1 :]:
            return arguments[at + 1]
        if argument.startswith(f"{flag}="):
            return argument.partition("=")[2]
    return None


def _merge_repeated(arguments: Sequence[str], kind: type[TrainSettings]) -> list[str]:
    """The arguments with each flag once: values of a flag that takes several one after another.

    Raises:
        ConfigError: A flag of one value is given twice; the parser would take the last in silence.
    """
    groups: dict[str, list[str]] = {}
    counts: dict[str, int] = {}
    flag = ""
    for argument in arguments:
        if argument.startswith("--"):
            name, has_value, value = argument.partition("=")
            flag = name.replace("_", "-")
            counts[flag] = counts.get(flag, 0) + 1
            groups.setdefault(flag, []).extend([value] if has_value else [])
        else:
            groups.setdefault(flag, []).append(argument)
    problems = []
    for flag, values in groups.items():
        field = kind.model_fields.get(flag.removeprefix("--").replace("-", "_"))
        several = field is not None and "tuple" in str(field.annotation)
        if counts.get(flag, 0) > 1 and values and not several:
            problems.append(f"{flag} is given {counts[flag]} times: {', '.join(values)}")
    if problems:
        raise ConfigError("\n".join(problems))
    return [part for flag, values in groups.items() for part in ([flag] if flag else []) + values]


def _validated(
    *, kind: type[TrainSettings], fields: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """The fields of a file, each checked, and what is wrong; the required may come by flags."""
    placeholders = {name: "" for name in _REQUIRED if name not in fields}
    try:
        validated = kind(**placeholders, **fields)
    except ConfigError as error:
        return {}, str(error).split("\n  - ")[1:]
    return {name: getattr(validated, name) for name in fields}, []
