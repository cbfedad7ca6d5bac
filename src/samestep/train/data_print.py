"""What tells one set of training records from another, and where they begin to differ."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from samestep.data.records import Records

BLOCKS = 64
"""Parts of the data that have a digest of their own."""


@dataclass(frozen=True)
class DataPrint:
    """A print of training data, kept in each checkpoint.

    Attributes:
        fingerprint: Of all of them.
        records: How many there are.
        tokens: How many they have together.
        blocks: Digests of up to 64 neighbouring parts of equal numbers of records.
    """

    fingerprint: str
    records: int
    tokens: int
    blocks: Sequence[str]

    @classmethod
    def of(cls, records: Records) -> "DataPrint":
        """The print of records."""
        size = -(-len(records) // BLOCKS)
        starts = range(0, len(records), size)
        return cls(
            fingerprint=records.fingerprint(),
            records=len(records),
            tokens=sum(records.lengths),
            blocks=[_digest(records, start, start + size) for start in starts],
        )

    def difference(self, now: "DataPrint") -> str:
        """How ``now`` differs from this, for a message; empty if it does not."""
        if now.fingerprint == self.fingerprint:
            return ""
        text = (
            f"then {self.records:,} records of {self.tokens:,} tokens, "
            f"now {now.records:,} of {now.tokens:,}"
        )
        if now.records == self.records:
            size = -(-now.records // BLOCKS)
            pairs = enumerate(zip(self.blocks, now.blocks, strict=True))
            first = next((at for at, (one, other) in pairs if one != other), None)
            if first is not None:
                last = min(now.records, (first + 1) * size) - 1
                text += f"; the first difference is among records {first * size} to {last}"
        return text


def _digest(records: Records, start: int, stop: int) -> str:
    offsets, width = records.sequences.offsets, records.width
    first, last = int(start) * width, min(int(stop) * width, len(records.sequences))
    part = slice(int(offsets[first]), int(offsets[last]))
    digest = hashlib.sha256(records.sequences.ids[part].numpy().tobytes())
    digest.update(records.sequences.is_target[part].numpy().tobytes())
    digest.update(records.sequences.weights[first:last].numpy().tobytes())
    return digest.hexdigest()[:16]
