"""Rows of sources without an end, read from any place on: never a list of all of them.

A place is plain values, so that a checkpoint can hold it. A source that has an end is read anew
from its beginning, pass after pass.
"""

import logging
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from samestep.data.file_formats import jsonl_from, parquet_from, row_or_problem
from samestep.data.load import files_of, hub_stream
from samestep.data.rows import Row, raise_problems
from samestep.errors import DataError
from samestep.utils.sources import DataSource

log = logging.getLogger("samestep")

Place: TypeAlias = dict[str, Any]
"""Where the next row of a source is: "pass" from 0, and what its kind of source needs beside."""

_LINES = (".jsonl", ".ndjson")


class RowStream:
    """The rows of one source, pass after pass.

    Args:
        source: Files of JSON lines (compressed, too) or of Parquet, a folder or a pattern of them,
            a folder of ``save_to_disk``, or the name of a data set of the Hub.

    Attributes:
        place: Where the next row is.

    Raises:
        DataError: There is no such source, or it cannot be read row by row.
    """

    def __init__(self, source: DataSource) -> None:
        self._source = source
        files = files_of(source)
        self._reader = _Files(source.path, files) if files is not None else _Hub(source)
        self.seek({"pass": 0})

    def seek(self, place: Place) -> None:
        """Go to a place.

        Args:
            place: One that `place` was.
        """
        self.place = place
        self._opened: Iterator[tuple[Row | str, Place]] | None = None
        self._problems: list[str] = []
        self._good = len(place) > 1  # rows of this pass came before

    def next_row(self) -> Row | str:
        """The next row, or a line that says what is wrong with it; `place` moves on.

        Raises:
            DataError: The source is empty, none of its rows can be used, or it cannot be read.
        """
        while True:
            if self._opened is None:
                self._opened = self._reader.rows(self.place)
            found = next(self._opened, None)
            if found is None:
                self._end_pass()
                continue
            result, self.place = found
            if isinstance(result, str):
                self._problems.append(result)
            self._good = self._good or isinstance(result, Row)
            return result

    def _end_pass(self) -> None:
        if not self._good:
            raise_problems(self._problems or [f"{self._source.path}: empty, it has no rows"])
        passes = self.place["pass"] + 1
        if passes == 1:
            log.info("%s: at its end: read again from its beginning", self._source.path)
        self.seek({"pass": passes})


@dataclass(frozen=True)
class _Files:
    """Files one after another. A place is the file, its line or row, and the byte where it is."""

    name: str
    files: Sequence[Path]

    def __post_init__(self) -> None:
        others = [
            file.name
            for file in self.files
            if not ({".parquet", *_LINES} & {file.suffix, Path(file.stem).suffix})
        ]
        if others:
            raise DataError(
                f"{self.name}: stream: {', '.join(others[:5])} cannot be read row by row: JSON "
                "lines (.jsonl, .jsonl.gz, .jsonl.zst) and .parquet can"
            )

    def rows(self, place: Place) -> Iterator[tuple[Row | str, Place]]:
        first, line, byte = (place.get(name, 0) for name in ("file", "line", "byte"))
        if first >= len(self.files):
            raise DataError(f"{self.name}: it had {first + 1} files, and has {len(self.files)}")
        for at, file in enumerate(self.files[first:], first):
            read = parquet_from if file.suffix == ".parquet" else jsonl_from
            try:
                for result, number, end in read(file, line=line, byte=byte):
                    yield result, {"pass": place["pass"], "file": at, "line": number, "byte": end}
            except (OSError, EOFError, zlib.error) as error:
                reason = getattr(error, "strerror", None) or error
                raise DataError(f"{file}: cannot be read ({reason})") from error
            line = byte = 0


@dataclass(frozen=True)
class _Hub:
    """A data set that the library ``datasets`` streams; a place is what that library says of it."""

    source: DataSource

    def rows(self, place: Place) -> Iterator[tuple[Row | str, Place]]:
        data = hub_stream(self.source)
        if "state" in place:
            data.load_state_dict(place["state"])
        name = f"{self.source.path}[{self.source.split or 'train'}]"
        for number, values in enumerate(data, place.get("row", 0) + 1):
            result = row_or_problem(values, f"{name} row {number}")
            state = data.state_dict()
            yield result, {"pass": place["pass"], "row": number, "state": state}


class MixedStream:
    """Rows of several streams, each as often as its weight says: the one that lags behind is next.

    Args:
        sources: In order; with weights, or one.

    Attributes:
        read: How many rows were taken.
    """

    def __init__(self, sources: Sequence[DataSource]) -> None:
        self._sources = sources
        self._streams = [RowStream(source) for source in sources]
        weights = [source.weight or 1.0 for source in sources]
        self._shares = [weight / sum(weights) for weight in weights]
        self._taken = [0] * len(sources)

    @property
    def read(self) -> int:
        """How many rows were taken."""
        return sum(self._taken)

    @property
    def place(self) -> Place:
        """Where the next row of each source is, and how many were taken of it."""
        return {"taken": [*self._taken], "places": [stream.place for stream in self._streams]}

    def seek(self, place: Place) -> None:
        """Go on from a place.

        Args:
            place: One that `place` gave.
        """
        self._taken = [*place["taken"]]
        for stream, of_stream in zip(self._streams, place["places"], strict=True):
            stream.seek(dict(of_stream))

    def rows(self, number: int) -> list[Row | str]:
        """The next rows, or lines that say what is wrong with some.

        Args:
            number: How many.

        Returns:
            They, each with the number of its source.
        """
        results = []
        for _ in range(number):
            at = self._next_source()
            result = self._streams[at].next_row()
            results.append(replace(result, source=at) if isinstance(result, Row) else result)
        return results

    def _next_source(self) -> int:
        after = sum(self._taken) + 1
        lags = [
            share * after - taken for share, taken in zip(self._shares, self._taken, strict=True)
        ]
        chosen = lags.index(max(lags))
        self._taken[chosen] += 1
        return chosen
