"""Problems of rows: found one by one, shown together, never more than a screen of them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from samestep.errors import DataError


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source.

    Attributes:
        values: The columns by name.
        origin: Where the row is from, for messages: "train.jsonl:17" (a line, from 1) or
            "train.parquet row 17" (from 1).
    """

    values: dict[str, Any]
    origin: str


SHOWN = 10
"""How many problems one error lists."""


class RowError(Exception):
    """One row cannot be used; becomes a line of a `DataError` that names the row."""


def raise_all(problems: Sequence[str], *, hint: str = "") -> None:
    """Raise every problem at once.

    Args:
        problems: One line each; none is fine.
        hint: A last line that tells how to mend them.

    Raises:
        DataError: There is a problem.
    """
    if not problems:
        return
    lines = list(problems[:SHOWN])
    if len(problems) > SHOWN:
        lines.append(f"and {len(problems) - SHOWN} more")
    if hint:
        lines.append(hint)
    raise DataError("\n".join(lines))


Read = TypeVar("Read")


def map_rows(rows: Sequence[Row], read: Callable[[Row], Read], wanted: str) -> list[Read]:
    """What is read of every row, or every problem."""
    found: list[Read] = []
    problems = []
    for row in rows:
        try:
            weight_of(row.values)
            one = read(row)
        except RowError as error:
            problems.append(f"{row.origin}: {error}")
            continue
        found.append(one)
    raise_all(problems, hint=f"accepted columns: {wanted}; each row may add weight")
    return found


def weight_of(values: Mapping[str, Any]) -> float:
    """The weight of a row.

    Args:
        values: The columns. ``weight`` may be a number, or its text, as CSV has it.

    Returns:
        A finite number above 0; 1.0 without the column.

    Raises:
        RowError: It is not such a number.
    """
    given = values.get("weight")
    if given is None:
        return 1.0
    try:
        weight = math.nan if isinstance(given, bool) else float(given)
    except (TypeError, ValueError):
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        raise RowError(f"weight must be a finite number above 0, found {given!r}")
    return weight
