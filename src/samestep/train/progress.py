"""How far a run is, and on which data: what a checkpoint keeps beside weights and moments."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from samestep.data.records import Records
from samestep.data.stream_records import StreamRecords
from samestep.engine.step import StepReport
from samestep.train.choice import Choice

_BLOCKS = 64
"""Parts of the data that have a digest of their own."""


@dataclass(frozen=True)
class DataFingerprint:
    """Identifies training data; kept in each checkpoint.

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
    def of(cls, records: Records) -> "DataFingerprint":
        """The fingerprint of records; a stream's rows have theirs in its state."""
        if isinstance(records, StreamRecords):
            return cls("a stream", records=0, tokens=0, blocks=())
        size = -(-len(records) // _BLOCKS)
        starts = range(0, len(records), size)
        return cls(
            fingerprint=records.fingerprint(),
            records=len(records),
            tokens=sum(records.lengths),
            blocks=[_digest(records, start=start, stop=start + size) for start in starts],
        )

    def difference(self, now: "DataFingerprint") -> str:
        """How other data differs from this, for a message; empty if it does not."""
        if now.fingerprint == self.fingerprint:
            return ""
        text = (
            f"then {self.records:,} records of {self.tokens:,} tokens, "
            f"now {now.records:,} of {now.tokens:,}"
        )
        if now.records == self.records:
            size = -(-now.records // _BLOCKS)
            pairs = enumerate(zip(self.blocks, now.blocks, strict=True))
            first = next((at for at, (then, later) in pairs if then != later), None)
            if first is not None:
                last = min(now.records, (first + 1) * size) - 1
                text += f"; the first difference is among records {first * size} to {last}"
        return text


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        step: Steps done.
        tokens: Input tokens seen.
        seconds: Time spent in steps.
        skipped: Steps without an update.
        data: Identifies the training data.
        choice: Which evaluation was the best.
        stream: Where the next record of a stream is (`StreamRecords.state`); None: there is none.
    """

    step: int
    tokens: int
    seconds: float
    skipped: int
    data: DataFingerprint
    choice: Choice = field(default_factory=Choice)
    stream: dict[str, Any] | None = None

    @classmethod
    def from_saved(cls, saved: Mapping[str, Any]) -> "Progress":
        """The progress that a checkpoint has as plain values; earlier ones have no choice."""
        data, choice = DataFingerprint(**saved["data"]), Choice(**saved.get("choice", {}))
        return cls(**{**saved, "data": data, "choice": choice})

    def after(self, report: StepReport, records: Records, examples: Sequence[int]) -> "Progress":
        """The progress after one more step.

        Args:
            report: Of the step.
            records: Training records.
            examples: Of the step.

        Returns:
            The progress.
        """
        stream = records.state(examples[-1] + 1) if isinstance(records, StreamRecords) else None
        return replace(
            self,
            stream=stream,
            step=self.step + 1,
            tokens=self.tokens + report.tokens,
            seconds=self.seconds + report.seconds,
            skipped=self.skipped + (report.skipped is not None),
        )


def skipped_step(reason: str, *, seconds: float) -> StepReport:
    """The report of a step that was not taken.

    Args:
        reason: Why.
        seconds: That were spent on it.

    Returns:
        Without numbers.
    """
    return StepReport(
        loss=float("nan"),
        terms={},
        counts={},
        grad_norm=float("nan"),
        seconds=seconds,
        tokens=0,
        micro_batches=0,
        skipped=reason,
    )


def _digest(records: Records, *, start: int, stop: int) -> str:
    offsets, width = records.sequences.offsets, records.width
    first, last = int(start) * width, min(int(stop) * width, len(records.sequences))
    part = slice(int(offsets[first]), int(offsets[last]))
    digest = hashlib.sha256(records.sequences.ids[part].numpy().tobytes())
    digest.update(records.sequences.is_target[part].numpy().tobytes())
    digest.update(records.sequences.weights[first:last].numpy().tobytes())
    return digest.hexdigest()[:16]
