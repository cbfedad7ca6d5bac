"""Records: examples of several sequences (a pair), or with more than tokens (a class, a margin)."""

import hashlib
import itertools
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, overload

import torch
from torch import Tensor

from samestep.data.examples import Example, Examples
from samestep.data.report import DataReport
from samestep.data.rows import RowTally


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """One example of an objective.

    Attributes:
        sequences: Its sequences; all records of a data set have as many.
        fields: What else belongs to it, by name: tensors of any shape.
        token_fields: What else belongs to each token, by name: for each sequence [length].
    """

    sequences: tuple[Example, ...]
    fields: Mapping[str, Tensor]
    token_fields: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)


class Records(Sequence[Record]):
    """A sequence of records over flat storage.

    Attributes:
        sequences: All sequences, those of a record side by side.
        width: Sequences a record.
        fields: By name, [records, ...].
        token_fields: By name, [tokens, ...], over all sequences in order.
        meta: What belongs to all records, such as the names of the classes.
        dropped: How many rows of the source are missing, by reason, and which.
        cut: The rows that max_length cut; None: it is not known.
        report: What was read, to be said before the first step; None: nobody described it.
        derived: The fields that were computed from the records.
    """

    def __init__(
        self,
        sequences: Examples,
        *,
        width: int = 1,
        fields: Mapping[str, Tensor] | None = None,
        token_fields: Mapping[str, Tensor] | None = None,
        meta: Mapping[str, Any] | None = None,
        dropped: Mapping[str, int] | None = None,
        cut: RowTally | None = None,
        derived: Set[str] = frozenset(),
    ) -> None:
        assert len(sequences) % width == 0
        self.sequences = sequences
        self.width = width
        self.fields = dict(fields or {})
        self.token_fields = dict(token_fields or {})
        self.meta = dict(meta or {})
        self.derived = frozenset(derived)
        self.dropped = RowTally(sequences.dropped if dropped is None else dropped)
        self.cut = sequences.cut if cut is None else cut
        self.report: DataReport | None = None
        assert all(len(values) == len(self) for values in self.fields.values())
        tokens = len(sequences.ids)
        assert all(len(values) == tokens for values in self.token_fields.values())

    def __len__(self) -> int:
        return len(self.sequences) // self.width

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...

    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        first, last = at * self.width, (at + 1) * self.width
        borders = self.sequences.offsets[first : last + 1].tolist()
        return Record(
            tuple(self.sequences[first:last]),
            {name: values[at] for name, values in self.fields.items()},
            {
                name: tuple(values[a:b] for a, b in itertools.pairwise(borders))
                for name, values in self.token_fields.items()
            },
        )

    @cached_property
    def lengths(self) -> list[int]:
        """The tokens of each record, over all its sequences."""
        lengths = self.sequences.lengths
        return [sum(lengths[at : at + self.width]) for at in range(0, len(lengths), self.width)]

    def longest_sequence(self) -> int:
        """The tokens of the longest sequence."""
        return max(self.sequences.lengths)

    def highest_id(self) -> int:
        """The highest token id; -1 without tokens."""
        return self.sequences.highest_id()

    def first_rows(self) -> list[int]:
        """The source row of each record's first sequence; no two records have the same."""
        rows: list[int] = self.sequences.rows[:: self.width].tolist()
        return rows

    def with_fields(self, fields: Mapping[str, Tensor]) -> "Records":
        """The same records with further fields that are computed from them.

        Args:
            fields: By name [records, ...]; the fingerprint does not count them.

        Returns:
            New records over the same storage.
        """
        records = Records(
            self.sequences,
            width=self.width,
            fields={**self.fields, **fields},
            token_fields=self.token_fields,
            meta=self.meta,
            dropped=self.dropped,
            cut=self.cut,
            derived=self.derived | set(fields),
        )
        records.report = self.report
        return records

    def fingerprint(self) -> str:
        """SHA-256 of the records (not of ``derived``, nor of what was left out), hexadecimal."""
        head = f"{self.sequences.fingerprint()} {self.width} {self.meta}"
        digest = hashlib.sha256(head.encode())
        kept = {name: values for name, values in self.fields.items() if name not in self.derived}
        for name, values in sorted([*kept.items(), *self.token_fields.items()]):
            digest.update(f"{name} {values.dtype} {tuple(values.shape)} ".encode())
            digest.update(values.contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()
