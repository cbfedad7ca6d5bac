"""A spec from plain values, with every problem in one message."""

import difflib
import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from samestep.errors import ConfigError
from samestep.study.spec import AXES, Axes, Block, StudySpec


def parse(values: Mapping[str, Any], *, source: str) -> StudySpec:
    """A spec from plain values.

    Args:
        values: Fields by name; hyphens and underscores are the same.
        source: Where they are from, for the message.

    Returns:
        The spec, with its defaults filled in.

    Raises:
        ConfigError: Every problem, with the nearest valid name.
    """
    given = _underscored(values)
    problems: list[str] = []
    if isinstance(given.get("arms"), list | tuple):
        problems = _without_effect(given)
        inherited = {axis: given[axis] for axis in AXES if _is_good(axis, given)}
        given["arms"] = [_block(one, inherited) for one in given["arms"]]
        # The study's own split need not fit its batch when the blocks bring theirs.
        given.pop("split", None)
    try:
        spec = StudySpec.model_validate(given)
    except ValidationError as error:
        problems += [_describe(problem) for problem in error.errors()]
    if problems:
        raise ConfigError("\n  - ".join([f"{source}:", *problems]))
    return spec


def _without_effect(given: Mapping[str, Any]) -> list[str]:
    """The study's own axes that every block sets anew."""
    blocks = [_underscored(one) for one in given["arms"] if isinstance(one, Mapping)]
    return [
        f"{axis}: every block of arms sets its own, so this one has no effect"
        for axis in AXES
        if axis in given and blocks and all(axis in block for block in blocks)
    ]


def _is_good(axis: str, given: Mapping[str, Any]) -> bool:
    """Whether blocks can take an axis over; a wrong one is named once, not in each of them."""
    if axis not in given or axis == "split":
        return axis in given
    try:
        Axes.model_validate({axis: given[axis]})
    except ValidationError:
        return False
    return True


def _underscored(values: Mapping[str, Any]) -> dict[str, Any]:
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def _block(value: Any, shared: Mapping[str, Any]) -> Any:
    return {**shared, **_underscored(value)} if isinstance(value, Mapping) else value


def _describe(problem: Any) -> str:
    where = [str(part) for part in problem["loc"]]
    path = ".".join(where) or "study"
    if problem["type"] == "extra_forbidden":
        model = Block if where[0] == "arms" else StudySpec
        return f"{path}: no such field{_nearest(where[-1], model.model_fields)}"
    if problem["type"] == "missing":
        return f"{path}: is missing (in the file, or as --{where[-1].replace('_', '-')})"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error" and isinstance(problem["input"], Mapping):
        return f"{path}: {message}"
    if problem["type"] == "literal_error":
        accepted = re.findall(r"'([^']+)'", problem["ctx"]["expected"])
        message = f"{message[0].lower()}{message[1:]}"
        return (
            f"{path}: {message}; found {problem['input']!r}{_nearest(problem['input'], accepted)}"
        )
    return f"{path}: {message[0].lower()}{message[1:]}; found {problem['input']!r}"


def _nearest(name: Any, accepted: Any) -> str:
    near = difflib.get_close_matches(str(name), list(accepted), n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else ""
