"""What a cause is, and what a diagnosis says: a name, how well it fits, what is beside it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cause:
    """Why a step depends on how its batch was split.

    Attributes:
        name: In reports; lower case, with hyphens.
        meaning: What it is, a sentence.
        advice: What to change.
        weights: Where the cause weights micro-batches: from what was measured of an inexact split
            to the factor of each micro-batch's own gradient, or None if it does not apply. The
            cause is named where that sum is the gradient of the split. None: only an axis names it.

    Example:
        >>> from samestep import Cause
        >>> cause = Cause("mean-of-chunks", "Each chunk is averaged.", "Divide once.")
        >>> cause.paragraph
        'Each chunk is averaged. Divide once.'
    """

    name: str
    meaning: str
    advice: str
    weights: Callable[[Any], Sequence[float] | None] | None = None

    @property
    def paragraph(self) -> str:
        """What it is and what to change."""
        return f"{self.meaning} {self.advice}"


@dataclass(frozen=True)
class Diagnosis:
    """A cause and how well it predicts what was seen.

    Attributes:
        cause: The name of a cause, or "unexplained".
        residual: Norm of observed minus predicted gradient, over the observed one's.
        evidence: One line of numbers for the reader.
        also: Causes that are true beside it, on the same axis.

    Example:
        >>> from samestep import Diagnosis
        >>> Diagnosis("mean-of-means", residual=0.0, evidence="added up").cause
        'mean-of-means'
    """

    cause: str
    residual: float
    evidence: str
    also: tuple[str, ...] = ()
