"""Settings from outside: YAML read, and pydantic's errors as lines that a user can act on."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samestep.errors import ConfigError
from samestep.utils.plugins import nearest
from samestep.utils.yaml_files import load_yaml

if TYPE_CHECKING:
    from pydantic import ValidationError


def read_yaml(path: Path) -> dict[str, Any]:
    """The fields of a YAML file, hyphens made underscores; their values are not checked.

    Args:
        path: The file.

    Returns:
        Values by field.

    Raises:
        ConfigError: It cannot be read, or holds no fields.
    """
    content = load_yaml(path)
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold 'field: value' lines, not {type(content).__name__}")
    fields: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name in fields:
            raise ConfigError(f"{path}: {name} is given twice, with a hyphen and without: keep one")
        fields[name] = value
    return fields


def describe_validation_errors(
    error: "ValidationError",
    known_fields: Iterable[str],
    *,
    nested_fields: Mapping[str, Iterable[str]] | None = None,
    renamed: Mapping[str, str] | None = None,
    elsewhere: Mapping[str, str] | None = None,
) -> list[str]:
    """One line a wrong field: where it is, what is wrong, the value, the nearest valid name.

    Args:
        error: What pydantic raised.
        known_fields: Names of the fields of the settings that were checked.
        nested_fields: For each field that holds settings of its own, the names of those.
        renamed: Former names of fields, and what they are called now.
        elsewhere: Names that other programs use, and what they are here, in words.

    Returns:
        The lines, without a bullet, in pydantic's order.
    """
    valid_names = list(known_fields)
    nested = {name: list(fields) for name, fields in (nested_fields or {}).items()}
    by_location: dict[tuple[str | int, ...], list[Any]] = {}
    for problem in error.errors():
        by_location.setdefault(_without_union_members(problem["loc"]), []).append(problem)
    lines = []
    for location, problems in by_location.items():
        names = nested.get(str(location[0]), valid_names) if location[1:] else valid_names
        path = ".".join(map(str, location)) or "the settings"
        name = str(location[-1]) if location else ""
        if problems[0]["type"] == "extra_forbidden" and name in (elsewhere or {}):
            text = f"no such field; {(elsewhere or {})[name]}"
        else:
            text = _describe(name, problems, valid_names=names, renamed=renamed or {})
        lines.append(f"{path}: {text}")
    return lines


def _without_union_members(location: Sequence[str | int]) -> tuple[str | int, ...]:
    """A path of fields and indices; pydantic names the member of a union behind its field."""
    kept: list[str | int] = []
    for part in location:
        if isinstance(part, int) or not kept or isinstance(kept[-1], int):
            kept.append(part)
    return tuple(kept)


_SHOWN = 200
"""Characters of a wrong value that a message shows."""


def _describe(
    name: str,
    problems: Sequence[Any],
    *,
    valid_names: Iterable[str],
    renamed: Mapping[str, str],
) -> str:
    """What is wrong in one place; several problems are those of the members of a union."""
    first = problems[0]
    kind, value = first["type"], first["input"]
    if kind == "extra_forbidden" and name in renamed:
        return f"no such field; it is called {renamed[name]!r} now"
    if kind == "extra_forbidden":
        return f"no such field{nearest(name, valid_names, cutoff=0.4)}"
    if kind == "missing":
        return f"is missing (in the file, or as --{name.replace('_', '-')})"
    messages: list[str] = [problem["msg"].removeprefix("Value error, ") for problem in problems]
    if kind == "value_error" and isinstance(value, Mapping):  # of several fields together
        return ", or ".join(messages)
    text = ", or ".join(f"{message[0].lower()}{message[1:]}" for message in messages)
    expected = " ".join(problem.get("ctx", {}).get("expected", "") for problem in problems)
    choices = re.findall(r"'([^']+)'", expected)
    found = repr(value)
    if len(found) > _SHOWN:
        found = f"{found[:_SHOWN]} …"
    return f"{text}; found {found}{nearest(str(value)[:_SHOWN], choices, cutoff=0.4)}"
