"""Reading one file: every row, or in its place a line that says where and what is wrong."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from samestep.data.rows import Row

_BOM = b"\xef\xbb\xbf"

_LONGEST_FIELD = 2**31 - 1  # of a CSV; the largest that fits a C long everywhere


def row_or_problem(value: Any, origin: str) -> Row | str:
    """A row of what was read.

    Args:
        value: Anything that a format allows.
        origin: Where it is from.

    Returns:
        The row; where the value is none, a line that says so.
    """
    if isinstance(value, Mapping):
        return Row(dict(value), origin)
    shown = repr(value)
    shown = shown if len(shown) <= 40 else f"{shown[:37]}..."
    kind = type(value).__name__
    return f"{origin}: a row must be an object with named columns, found {kind} {shown}"


def _read_jsonl(path: Path) -> Iterator[Row | str]:
    """One JSON value a line; blank lines are skipped.

    Args:
        path: A UTF-8 file, with or without a byte order mark.

    Yields:
        A row, or a problem, for each line that is not blank.
    """
    # In binary: text mode would also cut lines where a string holds a lone carriage return.
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            line = raw.removeprefix(_BOM) if number == 1 else raw
            if line.strip():
                yield _parse_line(line, f"{path.name}:{number}")


def _parse_line(line: bytes, origin: str) -> Row | str:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"{origin}: {_not_utf8(error)}"
    except json.JSONDecodeError as error:
        return f"{origin}: not JSON: {error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:
        return f"{origin}: not JSON: {error}"
    return row_or_problem(value, origin)


def _read_json(path: Path) -> Iterator[Row | str]:
    """A list of rows; a file of JSON lines under this extension is read as such.

    Args:
        path: A UTF-8 file, with or without a byte order mark.

    Yields:
        A row, or a problem, for each element.
    """
    raw = path.read_bytes().removeprefix(_BOM)
    if not raw.strip():
        return
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        yield f"{_line_of(error, path)}: {_not_utf8(error)}"
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _read_jsonl(path)
        else:
            problem = f"not JSON: {error.msg} at column {error.colno}"
            yield f"{path.name}:{error.lineno}: {problem}"
    except (ValueError, RecursionError) as error:
        yield f"{path.name}: not JSON: {error}"
    else:
        if isinstance(value, list):
            for number, row in enumerate(value, 1):
                yield row_or_problem(row, f"{path.name} row {number}")
        else:
            problem = f"the top level must be a list of objects, found {type(value).__name__}"
            yield f"{path.name}: {problem}"


def _read_csv(path: Path) -> Iterator[Row | str]:
    """Comma-separated values with a header; every value is text.

    Args:
        path: A UTF-8 file, with or without a byte order mark.

    Yields:
        A row, or a problem, for each row, named by the line that it starts on.
    """
    raw = path.read_bytes().removeprefix(_BOM)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        yield f"{_line_of(error, path)}: {_not_utf8(error)}"
        return
    lines, failure = _csv_lines(text)
    if lines:
        (header_line, header), *rows = lines
        repeated = sorted({name for name in header if header.count(name) > 1})
        if repeated:
            problem = f"the header names {', '.join(repeated)} twice"
            yield f"{path.name}:{header_line}: {problem}"
            return
        for line, fields in rows:
            if len(fields) == len(header):
                yield Row(dict(zip(header, fields, strict=True)), f"{path.name}:{line}")
            else:
                problem = f"{len(fields)} fields, but the header has {len(header)}"
                yield f"{path.name}:{line}: {problem}"
    if failure is not None:
        yield f"{path.name}:{failure[0]}: not CSV: {failure[1]}"


def _csv_lines(text: str) -> tuple[list[tuple[int, list[str]]], tuple[int, str] | None]:
    """The fields of every line that is not blank, up to the first that cannot be read."""
    lines: list[tuple[int, list[str]]] = []
    start = 1
    # The limit is global to the process, and far below the length of real prompts.
    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        for fields in reader:
            if fields:
                lines.append((start, fields))
            start = reader.line_num + 1
    except csv.Error as error:
        return lines, (start, str(error))
    finally:
        csv.field_size_limit(limit)
    return lines, None


def _read_parquet(path: Path) -> Iterator[Row | str]:
    """The rows of a Parquet file.

    Args:
        path: The file.

    Yields:
        A row for each row, or one problem.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.ParquetFile(path).read().to_pylist()
    except pa.ArrowException as error:
        yield f"{path.name}: not a Parquet file: {error}"
        return
    for number, row in enumerate(rows, 1):
        yield row_or_problem(row, f"{path.name} row {number}")


def _line_of(error: UnicodeDecodeError, path: Path) -> str:
    before = error.object[: error.start].count(b"\n")
    return f"{path.name}:{before + 1}"


def _not_utf8(error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"not UTF-8: byte 0x{byte:02x} ({error.reason}); save the file as UTF-8"


READERS: dict[str, Callable[[Path], Iterator[Row | str]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
"""The reader of each extension."""
