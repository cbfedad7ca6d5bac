"""Records of streams: a window over them, in an order that is a function of seed and stream.

The rows are read in chunks. Within a chunk every ``shuffle_buffer`` records are shuffled by (seed,
chunk); so what comes when depends on nothing else, and whoever knows where a chunk begins can go on
from there.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from samestep.data.batching import StepPlan
from samestep.data.records import Record, Records
from samestep.data.rows import Row, raise_problems
from samestep.data.streams import MixedStream, Place
from samestep.errors import ConfigError, DataError

_LEAST = 1000
"""Rows that a chunk has at least."""


@dataclass(frozen=True)
class _Chunk:
    """Some rows of the streams, read.

    Attributes:
        number: From 0.
        first: The number of its first record in the stream.
        place: Where its rows begin.
        records: In the order of the rows.
        order: Of the records.
        lengths: Of the records, in this order.
    """

    number: int
    first: int
    place: Place
    records: Records
    order: Sequence[int]
    lengths: Sequence[int]

    @property
    def end(self) -> int:
        return self.first + len(self.order)

    @cached_property
    def digest(self) -> str:
        return self.records.fingerprint()


class StreamRecords(Records):
    """The records of streams, by their number in the order in which they are learned.

    What the base class says of storage, fields and the report is that of the first chunk.

    Args:
        stream: Where the rows are from.
        make: Makes records of rows.
        seed: Of the order.
        buffer: Records that are shuffled together; 1: the order stays.

    Attributes:
        check: Called with the records of every chunk but the first.

    Raises:
        DataError: The first rows cannot be used.
    """

    def __init__(
        self, stream: MixedStream, make: Callable[[list[Row]], Records], *, seed: int, buffer: int
    ) -> None:
        self._stream, self._make, self._seed, self._buffer = stream, make, seed, buffer
        self._size = buffer * max(1, -(-_LEAST // buffer))
        self._begin: dict[str, Any] = {"chunk": 0, "first": 0, "place": stream.place, "next": 0}
        self._chunks: tuple[_Chunk, ...] = ()
        self.check: Callable[[Records], object] = lambda records: None
        found = self._load(0, 0).records
        super().__init__(
            found.sequences,
            width=found.width,
            fields=found.fields,
            token_fields=found.token_fields,
            meta=found.meta,
            dropped=found.dropped,
            cut=found.cut,
        )
        self.report = found.report

    def describe(self) -> str:
        """How the stream is read, for the log."""
        shuffled = f"shuffled by {self._buffer:,}" if self._buffer > 1 else "in the order it has"
        return f"a stream: {self._size:,} rows at a time, {shuffled}; above are the first"

    def __len__(self) -> int:
        return self._chunks[-1].end

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        chunk = self._chunk_of(index)
        record: Record = chunk.records[chunk.order[index - chunk.first]]
        return record

    @property
    def lengths(self) -> "_Lengths":
        """The tokens of each record of the window, by its number."""
        return _Lengths(self)

    def chunks(self) -> tuple[Sequence[int], ...]:
        """The lengths of the records in the window, chunk by chunk."""
        return tuple(chunk.lengths for chunk in self._chunks)

    def length_of(self, index: int) -> int:
        """The tokens of a record in the window."""
        chunk = self._chunk_of(index)
        return chunk.lengths[index - chunk.first]

    def plans(
        self, *, batch_size: int | None, batch_tokens: int | None, start: int = 0
    ) -> Iterator[StepPlan]:
        """The steps, without end, from where the run is.

        The window follows: it holds the records of the last plan and those after it.

        Args:
            batch_size: Records a batch; or
            batch_tokens: Input tokens a batch, at most; a longer record is a batch by itself.
            start: The number of the first step.

        Yields:
            One plan a step; its epoch is how often the source was read that was read most often.
        """
        at, step = self._begin["next"], start
        if self._chunks[0].first > self._begin["first"]:
            self._rewind()
        while True:
            end, tokens = at, 0
            while batch_size is None or end < at + batch_size:
                self._reach(end)
                tokens += self.length_of(end)
                if batch_tokens is not None and tokens > batch_tokens and end > at:
                    break
                end += 1
            passes = self._chunk_of(at).place["places"]
            epoch = max(place["pass"] for place in passes)
            yield StepPlan(step, epoch, float(epoch), tuple(range(at, end)))
            self._chunks = tuple(chunk for chunk in self._chunks if chunk.end > at)
            at, step = end, step + 1

    def state(self, following: int) -> dict[str, Any]:
        """What a run needs to go on, as plain values.

        Args:
            following: The number of the record that is learned next.

        Returns:
            Where its chunk begins, and a digest of that.
        """
        self._reach(following)
        chunk = self._chunk_of(following)
        return {
            "chunk": chunk.number,
            "first": chunk.first,
            "place": chunk.place,
            "next": following,
            "digest": chunk.digest,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state; the rows of one chunk are read again, and none before it.

        Args:
            state: One that `state` gave.

        Raises:
            ConfigError: The rows there are others than they were, or cannot be read.
        """
        self._begin = state
        problem = ""
        try:
            self._rewind()
        except DataError as error:  # in the middle of a line, say
            problem = f" ({error})"
        if problem or self._chunks[0].digest != state["digest"]:
            raise ConfigError(
                "resume: the rows of the stream are not those that they were at the checkpoint, "
                f"from record {state['first']:,} on{problem}. Restore them, or start anew with "
                "--overwrite"
            )

    def _rewind(self) -> None:
        self._stream.seek(self._begin["place"])
        self._chunks = ()
        self._load(self._begin["chunk"], self._begin["first"])

    def _reach(self, index: int) -> None:
        """Read on until a record is in the window."""
        while index >= len(self):
            last = self._chunks[-1]
            self.check(self._load(last.number + 1, last.end).records)

    def _load(self, number: int, first: int) -> _Chunk:
        place, before = self._stream.place, self._stream.read
        rows = self._stream.rows(self._size)
        raise_problems([row for row in rows if isinstance(row, str)])
        records = self._make([row for row in rows if isinstance(row, Row)])
        records.sequences.rows = records.sequences.rows + before * records.width
        order = np.arange(len(records))
        draw = np.random.default_rng([self._seed, number])
        for start in range(0, len(order) if self._buffer > 1 else 0, self._buffer):
            draw.shuffle(order[start : start + self._buffer])
        lengths = np.asarray(records.lengths)[order].tolist()
        chunk = _Chunk(number, first, place, records, order.tolist(), lengths)
        self._chunks = (*self._chunks, chunk)
        return chunk

    def _chunk_of(self, index: int) -> _Chunk:
        for chunk in self._chunks:
            if chunk.first <= index < chunk.end:
                return chunk
        raise IndexError(f"record {index} is not in the window")


class _Lengths(list[int]):
    """The lengths of a window: asked by number, gone through chunk by chunk."""

    def __init__(self, records: StreamRecords) -> None:
        super().__init__()
        self._records = records

    def __getitem__(self, index: Any) -> Any:
        return self._records.length_of(index)

    def __iter__(self) -> Iterator[int]:
        for lengths in self._records.chunks():
            yield from lengths

    def __len__(self) -> int:
        return sum(map(len, self._records.chunks()))
