"""Reading one file: every row, or in its place a line that says where and what is wrong."""

import csv
import gzip
import io
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

from samestep.data.rows import Row

log = logging.getLogger("samestep")

_BOM = b"\xef\xbb\xbf"

_HEAD = 2**20
"""Bytes in which the first object of a file of pretty-printed JSON should end."""

_BATCH = 1_000
"""Rows of a Parquet file that are read at a time where it is not read whole."""

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


def _open(path: Path) -> IO[bytes] | gzip.GzipFile:
    """The content of a file, decompressed where its name ends with .gz or .zst."""
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")
    if path.suffix.lower() == ".zst":
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _read_bytes(path: Path) -> bytes:
    with _open(path) as file:
        return file.read().removeprefix(_BOM)


def _read_jsonl(path: Path) -> Iterator[Row | str]:
    """One JSON value a line; blank lines are skipped.

    Args:
        path: A UTF-8 file, with or without a byte order mark.

    Yields:
        A row, or a problem, for each line that is not blank.
    """
    for result, _, _ in jsonl_from(path):
        yield result


def jsonl_from(path: Path, *, line: int = 0, byte: int = 0) -> Iterator[tuple[Row | str, int, int]]:
    """The rows of a file of JSON lines, from a place on.

    Args:
        path: As for any file of JSON lines.
        line: Lines before the place.
        byte: Bytes before it. A compressed file is read from its beginning, and its lines skipped.

    Yields:
        A row, or a problem, for each line that is not blank; with the lines and the bytes up to its
        end.
    """
    # In binary: text mode would also cut lines where a string holds a lone carriage return.
    begun = line > 0
    with _open(path) as file:
        if path.suffix.lower() in (".gz", ".zst"):
            for _ in range(line):
                file.readline()
        else:
            file.seek(byte)
        for number, raw in enumerate(file, line + 1):
            byte += len(raw)
            text = raw.removeprefix(_BOM) if number == 1 else raw
            if not text.strip():
                continue
            if not begun and (problem := _no_lines(text, path)):
                yield f"{path.name}: {problem}", number, byte
                return
            begun = True
            yield _parse_line(text, f"{path.name}:{number}"), number, byte


def _no_lines(first: bytes, path: Path) -> str:
    """What is wrong with a file of JSON whose rows are no lines; empty if they may be."""
    if first.lstrip().startswith(b"["):
        return (
            "this looks like a JSON array, not like one object a line: name it .json, or put each "
            "row on a line of its own (jq -c '.[]')"
        )
    if first.lstrip().startswith(b"{") and not _is_json(first):
        with _open(path) as file:
            head = file.read(_HEAD).removeprefix(_BOM).decode("utf-8", "replace").lstrip()
        try:
            _, end = json.JSONDecoder().raw_decode(head)
        except (ValueError, RecursionError):
            return ""
        if "\n" in head[:end]:
            return (
                "this looks like pretty-printed JSON, with an object over several lines: put each "
                "row on a line of its own (jq -c .)"
            )
    return ""


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


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
    raw = _read_bytes(path)
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
            lists = (
                [name for name, inner in value.items() if isinstance(inner, list)]
                if (isinstance(value, dict))
                else []
            )
            hint = f"; the rows seem to be its {lists[0]!r} (jq .{lists[0]})" if lists else ""
            yield f"{path.name}: {problem}{hint}"


def _read_csv(path: Path, delimiter: str = ",") -> Iterator[Row | str]:
    """Comma-separated values with a header; every value is text.

    Args:
        path: A UTF-8 file, with or without a byte order mark.
        delimiter: What separates values. Where a header has one value by it but several by a
            semicolon, a tab or a bar, that is taken, and the log says so.

    Yields:
        A row, or a problem, for each row, named by the line that it starts on.
    """
    raw = _read_bytes(path)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        yield f"{_line_of(error, path)}: {_not_utf8(error)}"
        return
    other = _other_delimiter(text, delimiter)
    if other:
        log.warning("%s: read as values separated by %r, as its header is", path.name, other)
    lines, failure = _csv_lines(text, other or delimiter)
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


def _other_delimiter(text: str, delimiter: str) -> str:
    """What separates the names of a header that ``delimiter`` does not; empty if nothing does."""
    header = next((line for line in text.splitlines() if line.strip()), "")
    if delimiter in header:
        return ""
    for other in ";\t|,":
        names = [name.strip().strip('"') for name in header.split(other)]
        if len(names) > 1 and all(name.replace("_", "").isalnum() for name in names):
            return other
    return ""


def _csv_lines(
    text: str, delimiter: str
) -> tuple[list[tuple[int, list[str]]], tuple[int, str] | None]:
    """The fields of every line that is not blank, up to the first that cannot be read."""
    lines: list[tuple[int, list[str]]] = []
    start = 1
    # The limit is global to the process, and far below the length of real prompts.
    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
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


def parquet_from(
    path: Path, *, line: int = 0, byte: int = 0
) -> Iterator[tuple[Row | str, int, int]]:
    """The rows of a Parquet file, from a place on; row groups before it are not read.

    Args:
        path: The file.
        line: Rows before the place.
        byte: 0, as row groups know where they are.

    Yields:
        A row, or one problem; with the rows up to it, and 0.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        first = 0
        groups: list[int] = []
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if groups or first + size > line:
                groups.append(group)
            else:
                first += size
        number = first
        for batch in file.iter_batches(_BATCH, row_groups=groups):
            for row in batch.to_pylist():
                number += 1
                if number > line:
                    yield row_or_problem(row, f"{path.name} row {number}"), number, byte
    except pa.ArrowException as error:
        yield f"{path.name}: not a Parquet file: {error}", line + 1, byte


def _line_of(error: UnicodeDecodeError, path: Path) -> str:
    before = error.object[: error.start].count(b"\n")
    return f"{path.name}:{before + 1}"


def _not_utf8(error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"not UTF-8: byte 0x{byte:02x} ({error.reason}); save the file as UTF-8"


READERS: dict[str, Callable[[Path], Iterator[Row | str]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".parquet": _read_parquet,
}
"""The reader of each extension."""

COMPRESSED = (".jsonl", ".json", ".ndjson", ".csv", ".tsv")
"""The extensions that may be followed by .gz or .zst."""


def reader_of(path: Path) -> Callable[[Path], Iterator[Row | str]] | None:
    """What reads a file, by its name.

    Args:
        path: A file.

    Returns:
        The reader; None if no name of this kind is known.
    """
    name, suffix = path.stem.lower(), path.suffix.lower()
    if suffix in (".gz", ".zst"):
        inner = Path(name).suffix
        return READERS[inner] if inner in COMPRESSED else None
    return READERS.get(suffix)
