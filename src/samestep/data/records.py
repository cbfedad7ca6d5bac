"""Records: examples of several sequences (a pair), or with more than tokens (a class, a margin)."""

import hashlib
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

import torch
from torch import Tensor

from samestep.data.collate import Padding, collate
from samestep.data.examples import Example, Examples


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """One example of an objective.

    Attributes:
        sequences: Its sequences; all records of a data set have as many.
        fields: What else belongs to it, by name: tensors of any shape.
    """

    sequences: tuple[Example, ...]
    fields: Mapping[str, Tensor]


class Records(Sequence[Record]):
    """A sequence of records over flat storage.

    Attributes:
        sequences: All sequences, those of a record side by side.
        width: Sequences a record.
        fields: By name, [records, ...].
        dropped: How many rows of the source are missing, by reason.
        derived: The fields that were computed from the records.
    """

    def __init__(
        self,
        sequences: Examples,
        *,
        width: int = 1,
        fields: Mapping[str, Tensor] | None = None,
        dropped: Mapping[str, int] | None = None,
        derived: Set[str] = frozenset(),
    ) -> None:
        assert len(sequences) % width == 0
        self.sequences = sequences
        self.width = width
        self.fields = dict(fields or {})
        self.derived = frozenset(derived)
        self.dropped = dict(sequences.dropped if dropped is None else dropped)
        assert all(len(field) == len(self) for field in self.fields.values())

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
        return Record(
            tuple(self.sequences[at * self.width : (at + 1) * self.width]),
            {name: field[at] for name, field in self.fields.items()},
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

    def annotated(self, fields: Mapping[str, Tensor]) -> "Records":
        """The same records with further fields [records, ...] that follow from them."""
        return Records(
            self.sequences,
            width=self.width,
            fields={**self.fields, **fields},
            dropped=self.dropped,
            derived=self.derived | set(fields),
        )

    def fingerprint(self) -> str:
        """SHA-256 of the records (not of ``dropped`` and ``derived``), hexadecimal."""
        digest = hashlib.sha256(f"{self.sequences.fingerprint()} {self.width}".encode())
        for name in sorted(self.fields.keys() - self.derived):
            field = self.fields[name]
            digest.update(f"{name} {field.dtype} {tuple(field.shape)} ".encode())
            digest.update(field.contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def collate_records(
    records: Sequence[Record], *, padding: Padding = "none", pad_id: int = 0
) -> dict[str, Any]:
    """One micro-batch of records.

    Args:
        records: At least one.
        padding: As for `samestep.data.collate.collate`.
        pad_id: As for `collate`.

    Returns:
        What `collate` gives for all sequences of the records, in order; and ``fields``, each
        stacked [records, ...], if there are any.
    """
    sequences = [sequence for record in records for sequence in record.sequences]
    micro = collate(sequences, padding=padding, pad_id=pad_id)
    if records[0].fields:
        names = records[0].fields
        micro["fields"] = {
            name: torch.stack([record.fields[name] for record in records]) for name in names
        }
    return micro
