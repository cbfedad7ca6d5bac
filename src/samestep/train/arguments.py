"""The settings of a run: from YAML, from flags, or both; checked all at once."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro
import yaml

from samestep.errors import ConfigError
from samestep.train.checked import checked
from samestep.train.config import TrainConfig
from samestep.train.objectives import config_class

REQUIRED = ("model", "data", "out")


def read_config(arguments: Sequence[str]) -> TrainConfig:
    """The configuration that a command line asks for: flags over YAML over defaults.

    Args:
        arguments: ``[run.yaml] [--flag value ...]``.

    Returns:
        The configuration, checked.

    Raises:
        ConfigError: Everything that is wrong with the file or with the combination.
        SystemExit: The flags cannot be parsed (2), or help was asked for (0).
    """
    arguments = list(arguments)
    given: dict[str, Any] = {}
    path = None
    if arguments and not arguments[0].startswith("-"):
        path = Path(arguments.pop(0))
        given = read_yaml(path)
    objective = _objective(arguments) or str(given.get("objective", "causal_lm"))
    kind = config_class(objective)
    values = _validated(path, kind, given) if path else {}
    missing = {name: tyro.MISSING for name in REQUIRED if name not in values}
    start = kind.model_construct(**{**values, "objective": objective}, **missing)
    config = tyro.cli(kind, args=arguments, default=start, prog="samestep train [RUN.YAML]")
    return checked(config)


def _objective(arguments: Sequence[str]) -> str | None:
    """The objective that the flags name; it decides which other flags there are."""
    for at, flag in enumerate(arguments):
        if flag == "--objective" and arguments[at + 1 :]:
            return arguments[at + 1]
        if flag.startswith("--objective="):
            return flag.partition("=")[2]
    return None


def read_yaml(path: Path) -> dict[str, Any]:
    """The fields of a YAML file, hyphens made underscores; their values are not checked.

    Raises:
        ConfigError: It cannot be read, or holds no fields.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold 'field: value' lines, not {type(content).__name__}")
    return {str(key).replace("-", "_"): value for key, value in content.items()}


def _validated(path: Path, kind: type[TrainConfig], given: dict[str, Any]) -> dict[str, Any]:
    placeholders = {name: "" for name in REQUIRED if name not in given}
    try:
        validated = kind(**placeholders, **given)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return {name: getattr(validated, name) for name in given}
