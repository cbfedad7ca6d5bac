"""Rows, and reading something of each: all problems are raised at once, each with its place."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ParamSpec, TypeVar

from samestep.errors import DataError, is_no_fault_of_input

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_Arguments = ParamSpec("_Arguments")


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source.

    Attributes:
        values: The columns by name.
        origin: Where the row is from, for messages: "train.jsonl:17" (a line, from 1) or
            "train.parquet row 17" (from 1).
        converted: The name of the format that it was converted from, and the columns that it had
            there; None: it is as the source has it.
        source: Which of several sources it is of, from 0.
    """

    values: dict[str, Any]
    origin: str
    converted: tuple[str, tuple[str, ...]] | None = field(default=None, compare=False)
    source: int = field(default=0, compare=False)

    def with_values(self, changes: Mapping[str, Any]) -> "Row":
        """The row with other values in some columns.

        Args:
            changes: By column.

        Returns:
            A new row.
        """
        return replace(self, values={**self.values, **changes})


class RowError(Exception):
    """One row cannot be used; becomes a line of a `DataError` that names the row."""


class RowTally(Counter[str]):
    """How many rows, by what is said of them, and which.

    Attributes:
        rows: By reason the indices of the rows in their source, from 0; a reason that was only
            counted has none.
    """

    def __init__(
        self, counts: Mapping[str, int] | None = None, rows: Mapping[str, list[int]] | None = None
    ) -> None:
        super().__init__(counts or {})
        self.rows: dict[str, list[int]] = dict(rows or getattr(counts, "rows", {}))

    def add(self, reason: str, row: int) -> None:
        """Count a row.

        Args:
            reason: What is said of it.
            row: Its index.
        """
        self[reason] += 1
        self.rows.setdefault(reason, []).append(row)

    def add_all(self, other: "RowTally", indices: Sequence[int]) -> None:
        """Count the rows of a tally over a selection of the source.

        Args:
            other: Its rows count from 0 in the selection.
            indices: The index in the source of each row of the selection.
        """
        for reason, rows in other.rows.items():
            for row in dict.fromkeys(indices[at] for at in rows):
                self.add(reason, row)


class RowDropped(Exception):  # noqa: N818 - no error: the row is left out and counted
    """One row has nothing to learn from; its message is the reason that it is counted under."""


_SHOWN = 10
"""How many problems one error lists."""


def raise_problems(problems: Sequence[str], *, hint: str = "") -> None:
    """Raise all problems at once, the first ten in full.

    Args:
        problems: A line each; none is fine.
        hint: A last line that tells how to fix them.

    Raises:
        DataError: There is a problem.
    """
    if not problems:
        return
    lines = list(problems[:_SHOWN])
    if len(problems) > _SHOWN:
        lines.append(f"and {len(problems) - _SHOWN} more")
    if hint:
        lines.append(hint)
    raise DataError("\n".join(lines))


def iter_rows(
    rows: Iterable[Row],
    read: Callable[[int, Row], _Result],
    *,
    hint: str = "",
    dropped: RowTally | None = None,
) -> Iterator[tuple[int, _Result]]:
    """Read every row, one after another, and raise the problems of all of them at the end.

    Args:
        rows: The rows.
        read: Maps the index of a row, from 0, and the row to what is read; raises `RowError` where
            the row cannot be used, and `RowDropped` where it is to be left out.
        hint: A last line of the error, that tells how to fix the rows.
        dropped: Counts the rows that are left out, by reason; needed if any can be.

    Yields:
        The index of each row that is kept, and what was read.

    Raises:
        DataError: Rows cannot be used; lists them.
    """
    problems = []
    for index, row in enumerate(rows):
        try:
            result = read(index, row)
        except RowDropped as reason:
            assert dropped is not None
            dropped.add(str(reason), index)
            continue
        except Exception as error:
            problems.append(f"{row.origin}: {_unexpected(error)}")
            continue
        yield index, result
    raise_problems(problems, hint=hint)


def map_rows(
    rows: Iterable[Row], read: Callable[[Row], _Result], *, hint: str = ""
) -> list[_Result]:
    """Read every row; none is left out.

    Args:
        rows: The rows.
        read: Maps a row to what is read; raises `RowError` where it cannot be used.
        hint: As for `iter_rows`.

    Returns:
        What was read of each row, in order.

    Raises:
        DataError: Rows cannot be used; lists them.
    """
    return [result for _, result in iter_rows(rows, lambda _, row: read(row), hint=hint)]


def _unexpected(error: Exception) -> RowError:
    """What a reader tripped over, as an error of its row.

    The values of a row may be anything that a format holds, and so may what libraries raise on
    them. Nothing but these errors comes out of reading a row; what is no row's fault stays as it
    is: errors of samestep's own, memory that ran out, a broken invariant.

    Args:
        error: Any.

    Returns:
        The error of the row.
    """
    if isinstance(error, RowError):
        return error
    if is_no_fault_of_input(error):
        raise error
    reason = (str(error).splitlines() or [""])[0][:_LONGEST_REASON]
    return RowError(f"cannot be used ({type(error).__name__}: {reason})")


_LONGEST_REASON = 200
"""Characters of what a library says of a row."""


def result_or_error(
    function: Callable[_Arguments, _Result], *args: _Arguments.args, **keywords: _Arguments.kwargs
) -> _Result | RowError:
    """Call a function of one row.

    Args:
        function: May raise a `RowError`.
        args: Its arguments.
        keywords: Its keywords.

    Returns:
        What it returns, or the `RowError` that it raises, or that says what else it raised.
    """
    try:
        return function(*args, **keywords)
    except Exception as error:
        return _unexpected(error)


def map_valid(
    items: Sequence[_Item | RowError],
    function: Callable[[list[_Item]], Iterable[_Result | RowError]],
) -> list[_Result | RowError]:
    """Apply a function of a batch to the items that are no errors; errors keep their places.

    Args:
        items: Items, or why there is none.
        function: Gives one result for each item, in order.

    Returns:
        One for each of ``items``.
    """
    results = iter(function([item for item in items if not isinstance(item, RowError)]))
    return [item if isinstance(item, RowError) else next(results) for item in items]


def describe_dropped(dropped: Mapping[str, int]) -> str:
    """How many rows were left out, for a message.

    Args:
        dropped: The numbers by reason.

    Returns:
        Such as "2 rows: no target; 1 rows: an empty text".
    """
    return "; ".join(f"{count} rows: {reason}" for reason, count in dropped.items())


def describe_columns(values: Mapping[str, Any]) -> str:
    """Which columns a row has, for a message.

    Args:
        values: The columns; one that is None counts as absent.

    Returns:
        Such as "found the columns text, label".
    """
    present = ", ".join(name for name, value in values.items() if value is not None)
    return f"found the columns {present or 'none'}"


WEIGHS_NOTHING = "weight 0"
"""Why a row is dropped that has the weight 0, as a turn of weight 0 is not learned."""


def rows_with_weight(rows: Sequence[Row], kept: Sequence[int], dropped: RowTally) -> list[int]:
    """Those rows that are not dropped for the weight 0.

    Args:
        rows: All rows.
        kept: Indices of those to look at.
        dropped: Counts the others of them.

    Returns:
        Indices.

    Raises:
        DataError: A weight is no such number.
    """
    weights = map_rows([rows[at] for at in kept], lambda row: read_weight(row.values))
    for at, weight in zip(kept, weights, strict=True):
        if not weight:
            dropped.add(WEIGHS_NOTHING, at)
    return [at for at, weight in zip(kept, weights, strict=True) if weight]


def tally_missing(reason: str, kept: Sequence[int], *, total: int) -> RowTally:
    """The rows that were not kept.

    Args:
        reason: Why.
        kept: Indices.
        total: How many rows there are.

    Returns:
        The others.
    """
    tally = RowTally()
    for row in sorted(set(range(total)) - set(kept)):
        tally.add(reason, row)
    return tally


def tally_cut(
    lengths: Sequence[int], max_length: int | None, *, whole_length: Callable[[int], int]
) -> RowTally:
    """The rows that a tokenizer truncated.

    Args:
        lengths: The tokens of each row, as they were truncated.
        max_length: The limit; None cuts nothing.
        whole_length: The tokens that a row has without it; asked only where it may be cut.

    Returns:
        Those of which tokens are missing.
    """
    cut = RowTally()
    for at, length in enumerate(lengths):
        if length == max_length and whole_length(at) > length:
            cut.add(f"cut at {max_length} tokens", at)
    return cut


def read_weight(values: Mapping[str, Any]) -> float:
    """The weight of a row in the loss.

    Args:
        values: The columns. ``weight`` may be a number, or its text, as CSV has it.

    Returns:
        A finite number of at least 0; 1.0 without the column. A row of weight 0 is not learned:
        `WEIGHS_NOTHING` is the reason to drop it under.

    Raises:
        RowError: It is not such a number.
    """
    value = values.get("weight")
    if value is None:
        return 1.0
    weight = math.nan if isinstance(value, bool) else _to_float(value)
    if not (math.isfinite(weight) and weight >= 0):
        raise RowError(f"weight must be a finite number of at least 0, found {value!r}")
    return weight


def read_number(values: Mapping[str, Any], column: str, *, booleans: bool = True) -> float:
    """The number of a column.

    Args:
        values: The columns. The number may be text, as CSV has it.
        column: The one to read.
        booleans: Whether true and false count as 1 and 0.

    Returns:
        A finite number.

    Raises:
        RowError: It is missing, or not such a number.
    """
    value = values.get(column)
    number = math.nan if isinstance(value, bool) and not booleans else _to_float(value)
    if not math.isfinite(number):
        raise RowError(f"{column} must be a finite number, found {value!r}")
    return number


def _to_float(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
