"""Text in rows: read where tokenizers can read it, and values shortened for messages."""

from collections.abc import Mapping
from typing import Any

from samestep.data.rows import RowError, describe_columns

_LONGEST_VALUE = 60
"""Characters of a row's value in a message."""


def shortened(value: Any) -> str:
    """A value of a row for a message, not longer than a line."""
    shown = repr(value)
    return shown if len(shown) <= _LONGEST_VALUE else f"{shown[: _LONGEST_VALUE - 3]}..."


def read_text(values: Mapping[str, Any], column: str) -> str:
    """The text of a column.

    Args:
        values: The columns.
        column: The one to read.

    Returns:
        Text that tokenizers can read.

    Raises:
        RowError: It is missing, or not such text.
    """
    value = values.get(column)
    if value is None:
        raise RowError(f"has no {column}; {describe_columns(values)}")
    return check_text(value, column)


def check_text(value: Any, what: str) -> str:
    """A value as text.

    Args:
        value: Any.
        what: What it is called, for messages.

    Returns:
        The value.

    Raises:
        RowError: It is no text, or has half of a surrogate pair, which JSON can hold and tokenizers
            crash on without naming the row.
    """
    if not isinstance(value, str):
        raise RowError(f"{what} must be text, found {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        place = f"character {error.start} of {what}"
        raise RowError(f"{place} is half of a surrogate pair, which is no text") from None
    return value
