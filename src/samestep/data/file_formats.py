"""Reading one file: every row, or what is wrong with it, with the place."""

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

_BOM = b"\xef\xbb\xbf"

_LONGEST_FIELD = 2**31 - 1  # of a CSV; the largest that fits a C long everywhere


class Record(NamedTuple):
    """A row as read, or a problem in its place.

    Attributes:
        origin: The place.
        value: What was read; anything that the format allows.
        problem: What is wrong, or None.
    """

    origin: str
    value: Any = None
    problem: str | None = None


def read_jsonl(path: Path) -> Iterator[Record]:
    """One JSON value a line; blank lines are skipped.

    Args:
        path: A UTF-8 file, with or without a byte order mark.

    Yields:
        A record a line that is not blank.
    """
    # In binary: text mode would also cut lines where a string holds a lone carriage return.
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            line = raw.removeprefix(_BOM) if number == 1 else raw
            if line.strip():
                yield _parse_line(line, f"{path.name}:{number}")


def _parse_line(line: bytes, origin: str) -> Record:
    try:
        return Record(origin, json.loads(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        return Record(origin, problem=_not_utf8(error))
    except json.JSONDecodeError as error:
        return Record(origin, problem=f"not JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return Record(origin, problem=f"not JSON: {error}")


def read_json(path: Path) -> Iterator[Record]:
    """A list of rows; a file of JSON lines under this extension is read as such.

    Args:
        path: A UTF-8 file, with or without a byte order mark.

    Yields:
        A record an element.
    """
    raw = path.read_bytes().removeprefix(_BOM)
    if not raw.strip():
        return
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        yield Record(_line_of(error, path, raw), problem=_not_utf8(error))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from read_jsonl(path)
        else:
            problem = f"not JSON: {error.msg} at column {error.colno}"
            yield Record(f"{path.name}:{error.lineno}", problem=problem)
    except (ValueError, RecursionError) as error:
        yield Record(path.name, problem=f"not JSON: {error}")
    else:
        if isinstance(value, list):
            for number, row in enumerate(value, 1):
                yield Record(f"{path.name} row {number}", row)
        else:
            problem = f"the top level must be a list of objects, found {type(value).__name__}"
            yield Record(path.name, problem=problem)


def read_csv(path: Path) -> Iterator[Record]:
    """Comma-separated values with a header; every value is text.

    Args:
        path: A UTF-8 file, with or without a byte order mark.

    Yields:
        A record a row, named by the line that it starts on.
    """
    raw = path.read_bytes().removeprefix(_BOM)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        yield Record(_line_of(error, path, raw), problem=_not_utf8(error))
        return
    lines, failure = _csv_lines(text)
    if lines:
        (header_line, header), *rows = lines
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            problem = f"the header names {', '.join(twice)} twice"
            yield Record(f"{path.name}:{header_line}", problem=problem)
            return
        for line, fields in rows:
            if len(fields) == len(header):
                yield Record(f"{path.name}:{line}", dict(zip(header, fields, strict=True)))
            else:
                problem = f"{len(fields)} fields, but the header has {len(header)}"
                yield Record(f"{path.name}:{line}", problem=problem)
    if failure is not None:
        yield Record(f"{path.name}:{failure[0]}", problem=f"not CSV: {failure[1]}")


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


def read_parquet(path: Path) -> Iterator[Record]:
    """The rows of a Parquet file.

    Args:
        path: The file.

    Yields:
        A record a row.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.ParquetFile(path).read().to_pylist()
    except pa.ArrowException as error:
        yield Record(path.name, problem=f"not a Parquet file: {error}")
        return
    for number, row in enumerate(rows, 1):
        yield Record(f"{path.name} row {number}", row)


def _line_of(error: UnicodeDecodeError, path: Path, raw: bytes) -> str:
    before = raw[: error.start].count(b"\n")
    return f"{path.name}:{before + 1}"


def _not_utf8(error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"not UTF-8: byte 0x{byte:02x} ({error.reason}); save the file as UTF-8"


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
}
"""The reader of each extension."""
