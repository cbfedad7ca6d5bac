"""Records: examples of several sequences (a pair), or with more than tokens (a class, a margin)."""

import hashlib
import itertools
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, overload

import torch
from torch import Tensor

from samestep.data.collate import Padding, collate
from samestep.data.examples import Example, Examples
from samestep.engine.targets import IGNORE, sequence_spans

MODEL_INPUTS = ("token_type_ids",)
"""Token fields that are inputs of the model."""


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
        dropped: How many rows of the source are missing, by reason.
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
        derived: Set[str] = frozenset(),
    ) -> None:
        assert len(sequences) % width == 0
        self.sequences = sequences
        self.width = width
        self.fields = dict(fields or {})
        self.token_fields = dict(token_fields or {})
        self.meta = dict(meta or {})
        self.derived = frozenset(derived)
        self.dropped = dict(sequences.dropped if dropped is None else dropped)
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

    def annotated(self, fields: Mapping[str, Tensor]) -> "Records":
        """The same records with further fields [records, ...] that follow from them."""
        return Records(
            self.sequences,
            width=self.width,
            fields={**self.fields, **fields},
            token_fields=self.token_fields,
            meta=self.meta,
            dropped=self.dropped,
            derived=self.derived | set(fields),
        )

    def fingerprint(self) -> str:
        """SHA-256 of the records (not of ``dropped`` and ``derived``), hexadecimal."""
        head = f"{self.sequences.fingerprint()} {self.width} {self.meta}"
        digest = hashlib.sha256(head.encode())
        kept = {name: values for name, values in self.fields.items() if name not in self.derived}
        for name, values in sorted([*kept.items(), *self.token_fields.items()]):
            digest.update(f"{name} {values.dtype} {tuple(values.shape)} ".encode())
            digest.update(values.contiguous().view(torch.uint8).numpy().data)
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
        What `collate` gives for all sequences of the records, in order; and ``fields``, if there
        are any: those of records stacked [records, ...], those of tokens [rows, length, ...].
    """
    sequences = [sequence for record in records for sequence in record.sequences]
    micro = collate(sequences, padding=padding, pad_id=pad_id)
    fields = {
        name: torch.stack([record.fields[name] for record in records]) for name in records[0].fields
    }
    for name in records[0].token_fields:
        parts = [part for record in records for part in record.token_fields[name]]
        if name in MODEL_INPUTS:
            micro[name] = _laid_out(parts, micro).clamp(min=0)
        else:
            fields[name] = _laid_out(parts, micro)
    return {**micro, "fields": fields} if fields else micro


def _laid_out(parts: Sequence[Tensor], micro: Mapping[str, Any]) -> Tensor:
    """Values of tokens in the layout of the micro-batch; ``IGNORE`` or 0 in padding."""
    fill = 0 if parts[0].is_floating_point() else IGNORE
    out = parts[0].new_full((*micro["input_ids"].shape, *parts[0].shape[1:]), fill)
    for part, (row, span) in zip(parts, sequence_spans(micro), strict=True):
        out[row, span] = part
    return out
