"""Rows of further formats, converted to columns that are known.

Which converter applies is recognised by the columns of each row, from the formats of
`samestep.data.row_formats.ROW_FORMATS` that are converted; or it is named: a function or a
`RowFormat` outside the package, by ``file.py:name`` or ``package.module:name``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from samestep.data.message_forms import normalize_messages
from samestep.data.row_formats import ROW_FORMATS, Columns, RowFormat, recognize_format
from samestep.data.rows import Row, RowError, map_rows
from samestep.errors import ConfigError
from samestep.utils.plugins import is_reference, load_object, nearest

Converter: TypeAlias = Callable[[dict[str, Any]], Columns]
"""Maps the columns of a row to those of another format."""


def resolve_row_format(reference: str | Converter | RowFormat) -> RowFormat:
    """The row format that a setting names.

    Args:
        reference: ``file.py:name`` or ``package.module:name`` of a function that maps the columns
            of a row (a dict) to columns of a known format, of a `RowFormat` that converts, or of
            a class that makes one of these without arguments; the name of a format of
            ``ROW_FORMATS`` that is converted; or the function or the format itself.

    Returns:
        A format that converts.

    Raises:
        ConfigError: The reference names no such thing; says what it has to be.
    """
    if isinstance(reference, str) and not is_reference(reference):
        return _by_name(reference)
    if isinstance(reference, str):
        converter, shown = load_object(reference, what="row_format"), reference
    else:
        converter, shown = reference, getattr(reference, "__name__", repr(reference))
    if isinstance(converter, type):
        try:
            converter = converter()
        except TypeError as error:
            raise ConfigError(f"row_format: {shown} must take no arguments: {error}") from error
    if isinstance(converter, RowFormat):
        if converter.convert is None:
            raise ConfigError(
                f"row_format: {shown} has no convert, which maps the columns of a row to those of "
                f"a known format ({', '.join(ROW_FORMATS)})"
            )
        return converter
    if not callable(converter):
        raise ConfigError(
            f"row_format: {shown} is {type(converter).__name__}; it must be a function that maps "
            "the columns of a row to those of a known format, or a samestep.data.RowFormat"
        )
    return RowFormat(name=shown, convert=converter)


def _by_name(name: str) -> RowFormat:
    converted = {each.name: each for each in ROW_FORMATS.values() if each.convert is not None}
    if name in converted:
        return converted[name]
    if name in ROW_FORMATS:
        raise ConfigError(
            f"row_format: rows of {name!r} are recognised by their columns "
            f"({', '.join(ROW_FORMATS[name].columns)}): leave row_format out"
        )
    hint = nearest(name, converted)
    names = ", ".join([*converted, "file.py:name or package.module:name of a converter"])
    raise ConfigError(f"row_format: there is no {name!r}{hint}. Accepted: {names}")


def convert_rows(rows: Sequence[Row], row_format: RowFormat | None = None) -> list[Row]:
    """Convert rows to columns that are known.

    A ``weight`` that a converter does not give is that of the row. Messages become what chat
    templates take, see `samestep.data.message_forms`.

    Args:
        rows: The rows.
        row_format: A format that converts, applied to every row; None: each row is converted by
            the format of ``ROW_FORMATS`` that its columns are recognised by, and stays as it is if
            there is none or it needs no conversion.

    Returns:
        A row for each row, of the same origin.

    Raises:
        DataError: Rows cannot be converted; lists every one.
    """
    if row_format is not None:
        return map_rows(rows, lambda row: _converted(row, row_format))
    return map_rows(rows, lambda row: normalize_messages(_recognized(row)))


def _recognized(row: Row) -> Row:
    try:
        row_format = recognize_format(row.values)
    except RowError:  # not every objective reads rows of these formats
        return row
    if row_format is None or row_format.convert is None:
        return row
    return _converted(row, row_format)


def _converted(row: Row, row_format: RowFormat) -> Row:
    assert row_format.convert is not None
    try:
        values = row_format.convert(dict(row.values))
    except RowError:
        raise
    except ValueError as error:
        raise RowError(str(error)) from error
    except Exception as error:  # the user's code may raise anything
        raise RowError(f"{row_format.name} fails: {type(error).__name__}: {error}") from error
    if not isinstance(values, Mapping):
        raise RowError(
            f"{row_format.name} must return columns by name, not {type(values).__name__}"
        )
    weight = {name: value for name, value in row.values.items() if name == "weight"}
    columns = tuple(name for name, value in row.values.items() if value is not None)
    return replace(row, values={**weight, **values}, converted=(row_format.name, columns))
