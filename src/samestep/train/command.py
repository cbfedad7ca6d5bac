"""`samestep train` as a command: settings from YAML and flags, a run, a line with its result."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from samestep.errors import ConfigError
from samestep.train.launch import launch, process_group, ranks_to_launch
from samestep.train.settings.base import RENAMED_FIELDS, TrainSettings, finalize
from samestep.train.settings.objectives import settings_class
from samestep.utils.messages import read_yaml

_REQUIRED = ("model", "data", "out")


def run(arguments: Sequence[str]) -> int:
    """Train as the arguments say.

    Args:
        arguments: ``[run.yaml] [--flag value ...]``.

    Returns:
        The exit code: 0, or that of the ranks that were started.

    Raises:
        SamestepError: As `samestep.train.trainer.train`.
    """
    settings = read_settings(arguments)
    ranks = ranks_to_launch(settings.ranks)
    if ranks is not None:
        return launch(ranks, ["train", *arguments])
    # After the arguments are known to be good: this import loads PyTorch.
    from transformers.utils import logging as transformers_logging

    from samestep.engine.collectives import rank
    from samestep.train.trainer import train

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with process_group():
        summary = train(settings)
        if rank() > 0:
            return 0
    print(f"{summary['steps']} steps, {summary['tokens']:,} tokens, {summary['seconds']:.1f} s")
    if summary["evaluation_after"] is not None:
        before, after = summary["evaluation_before"], summary["evaluation_after"]
        change = "" if before is None else f"{before:.4f} -> "
        print(f"evaluation loss {change}{after:.4f}")
    print(f"model in {summary['model']}")
    return 0


def read_settings(arguments: Sequence[str]) -> TrainSettings:
    """The settings that a command line names: flags over YAML over defaults.

    Args:
        arguments: ``[run.yaml] [--flag value ...]``.

    Returns:
        The settings, finalized.

    Raises:
        ConfigError: Everything that is wrong with the file or with the combination.
        SystemExit: The flags cannot be parsed (2), or help was shown (0).
    """
    arguments = list(arguments)
    fields: dict[str, Any] = {}
    path = None
    if arguments and not arguments[0].startswith("-"):
        path = Path(arguments.pop(0))
        fields = read_yaml(path)
    _refuse_renamed_flags(arguments)
    objective = _flag(arguments, "--objective") or str(fields.get("objective", "causal_lm"))
    kind = settings_class(objective)
    values = _validated(path, kind=kind, fields=fields) if path else {}
    missing = {name: tyro.MISSING for name in _REQUIRED if name not in values}
    start = kind.model_construct(**{**values, "objective": objective}, **missing)
    settings = tyro.cli(kind, args=arguments, default=start, prog="samestep train [RUN.YAML]")
    return finalize(settings)


def _flag(arguments: Sequence[str], flag: str) -> str | None:
    """The value of a flag that decides which other flags there are; None without it."""
    for at, argument in enumerate(arguments):
        if argument == flag and arguments[at + 1 :]:
            return arguments[at + 1]
        if argument.startswith(f"{flag}="):
            return argument.partition("=")[2]
    return None


def _refuse_renamed_flags(arguments: Sequence[str]) -> None:
    names = {argument.partition("=")[0].removeprefix("--") for argument in arguments}
    for old, new in RENAMED_FIELDS.items():
        if names & {old, old.replace("_", "-")}:
            raise ConfigError(f"--{old.replace('_', '-')} is called --{new.replace('_', '-')} now")


def _validated(path: Path, *, kind: type[TrainSettings], fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a file, each checked; those that are required may come by flags."""
    placeholders = {name: "" for name in _REQUIRED if name not in fields}
    try:
        validated = kind(**placeholders, **fields)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return {name: getattr(validated, name) for name in fields}
