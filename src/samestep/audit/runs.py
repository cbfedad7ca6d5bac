"""Runs of a subject, each done once, and the noise floor that they are judged by."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from samestep.audit.subject import PLAIN, Cut, Observation, Setting, Subject
from samestep.audit.vectors import compare
from samestep.errors import CheckError

MULTIPLE = 50.0
"""How many noise floors a difference may be and still be exact."""

EFFECT = 1e-4
"""A difference between two orders of the examples above this is an effect, not noise."""


@dataclass
class Runs:
    """Runs a subject and remembers.

    Attributes:
        subject: The loop under audit.
        plain: The setting that the others depart from.
    """

    subject: Subject
    plain: Setting = PLAIN
    _seen: dict[tuple[Cut, Setting], Observation] = field(default_factory=dict)

    @classmethod
    def start(cls, subject: Subject) -> "Runs":
        """Find the widest type that the subject runs in: float64, or its own.

        Raises:
            CheckError: It runs in neither; shows the subject's own error.
        """
        errors = []
        for dtype in (torch.float64, None):
            runs = cls(subject, replace(PLAIN, dtype=dtype))
            try:
                runs.run(runs.whole)
                runs.run(tuple((index,) for index in range(subject.size)))
            except Exception as error:  # the subject is the user's code: anything may come
                errors.append(error)
            else:
                return runs
        raise CheckError(
            f"{subject.name} could not be run: {type(errors[-1]).__name__}: {errors[-1]}"
        ) from errors[-1]

    @property
    def whole(self) -> Cut:
        """The whole batch as one micro-batch."""
        return (tuple(range(self.subject.size)),)

    def run(self, cut: Cut, **changes: object) -> Observation:
        """One step on a cut, under the plain setting with changes; remembered."""
        setting = replace(self.plain, **changes)  # type: ignore[arg-type]
        if (cut, setting) not in self._seen:
            self._seen[cut, setting] = self.subject.run(cut, setting)
        return self._seen[cut, setting]

    def run_ranks(self, shares: Sequence[Cut], **changes: object) -> list[Observation]:
        """One step on several ranks, not remembered."""
        return self.subject.run_ranks(shares, replace(self.plain, **changes))  # type: ignore[arg-type]

    def again(self, cut: Cut, **changes: object) -> Observation:
        """The same run once more, not remembered."""
        return self.subject.run(cut, replace(self.plain, **changes))  # type: ignore[arg-type]

    def floor(self) -> float:
        """Relative difference that arithmetic alone makes, measured on this subject.

        The same cut twice, and the examples of the whole batch in another order, but at least the
        rounding of the numbers themselves.
        """
        first = self.run(self.whole)
        repeat = compare(self.again(self.whole).gradient, first.gradient).relative_difference
        turned = (tuple(reversed(self.whole[0])),)
        order = compare(self.run(turned).gradient, first.gradient).relative_difference
        found = [repeat if repeat < EFFECT else 0.0, order if order < EFFECT else 0.0]
        return max(*found, first.rounding)

    def tolerance(self) -> float:
        """The largest relative difference that still counts as exact."""
        return MULTIPLE * self.floor()


def cuts(size: int, *, uniform: bool) -> list[Cut]:
    """The cuts of a batch that the audit tries: ragged first where the subject can.

    Args:
        size: Examples; at least 4.
        uniform: Micro-batches must be of one size.

    Returns:
        Different cuts, none of them whole.
    """
    examples = range(size)
    sizes = [1, 2] if size < 8 else [1, 2, size // 2]
    regular = [
        tuple(tuple(examples[start : start + one]) for start in range(0, size, one))
        for one in sizes
    ]
    if uniform:
        return regular
    third = max(1, size // 3)
    borders = sorted({0, third, third + 1, min(size, third + 1 + third), size})
    ragged = tuple(tuple(examples[a:b]) for a, b in itertools.pairwise(borders))
    return [ragged, *regular]
