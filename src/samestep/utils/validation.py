"""Pydantic's validation errors as lines that a user can act on."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError


def describe_validation_errors(
    error: ValidationError,
    known_fields: Iterable[str],
    *,
    nested_fields: Mapping[str, Iterable[str]] | None = None,
) -> list[str]:
    """One line a wrong field: where it is, what is wrong, the value, the nearest valid name.

    Args:
        error: What pydantic raised.
        known_fields: Names of the fields of the settings that were checked.
        nested_fields: For each field that holds settings of its own, the names of those.

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
        lines.append(f"{path}: {_describe(problems, location, valid_names=names)}")
    return lines


def _without_union_members(location: Sequence[str | int]) -> tuple[str | int, ...]:
    """A path of fields and indices; pydantic names the member of a union behind its field."""
    kept: list[str | int] = []
    for part in location:
        if isinstance(part, int) or not kept or isinstance(kept[-1], int):
            kept.append(part)
    return tuple(kept)


def _describe(
    problems: Sequence[Any], location: Sequence[str | int], *, valid_names: Iterable[str]
) -> str:
    """What is wrong in one place; several problems are those of the members of a union."""
    first = problems[0]
    kind, value = first["type"], first["input"]
    name = str(location[-1]) if location else ""
    if kind == "extra_forbidden":
        return f"no such field{_nearest(name, valid_names)}"
    if kind == "missing":
        return f"is missing (in the file, or as --{name.replace('_', '-')})"
    messages = [problem["msg"].removeprefix("Value error, ") for problem in problems]
    if kind == "value_error" and isinstance(value, Mapping):  # of several fields together
        return ", or ".join(messages)
    text = ", or ".join(f"{message[0].lower()}{message[1:]}" for message in messages)
    expected = " ".join(
        problem["ctx"]["expected"] for problem in problems if problem["type"] == "literal_error"
    )
    choices = re.findall(r"'([^']+)'", expected)
    return f"{text}; found {value!r}{_nearest(value, choices)}"


def _nearest(name: Any, valid_names: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), list(valid_names), n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else ""
