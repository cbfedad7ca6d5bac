"""Runs of a subject, each done once, and the noise floor that they are judged by."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from samestep.audit.noise import FloatsSeen, along_a_line, trembling
from samestep.audit.subject import PLAIN, Cut, Gradient, Observation, Setting, Shift, Subject
from samestep.audit.vectors import combine, compare, norm
from samestep.errors import CheckError

MULTIPLE = 10.0
"""How many noise floors a difference may be and still be exact."""

BLIND = 0.05
"""Noise floor from which on nothing could be told apart."""

SMALL = 2.0**-14
"""Scale at which no gradient is large enough to be clipped; a power of two, so nothing rounds."""

REMEMBERED = 24
"""Runs of which the gradient is kept."""


@dataclass
class Runs:
    """Runs a subject and remembers the latest runs.

    Attributes:
        subject: The loop under audit.
        plain: The setting that the others depart from.
        coarsest: The largest relative rounding of any type that takes part.
    """

    subject: Subject
    plain: Setting = PLAIN
    coarsest: float = 0.0
    _seen: dict[tuple[Cut, Setting], Observation] = field(default_factory=dict)

    @classmethod
    def start(cls, subject: Subject) -> "Runs":
        """Find the widest type that the subject runs in: float64, float32, or its own.

        Raises:
            CheckError: It runs in none, shows the subject's own error; or it leaves no gradient.
        """
        errors = []
        for dtype in (torch.float64, torch.float32, None):
            runs = cls(subject, replace(PLAIN, dtype=dtype))
            try:
                runs.run(runs.whole)
                runs.run(runs.singles)
                runs.coarsest = max(_coarsest(runs), torch.finfo(torch.float64).eps)
                floor = runs.floor
            except Exception as error:  # the subject is the user's code: anything may come
                errors.append(error)
                continue
            if not norm(runs.run(runs.whole).gradient):
                raise CheckError(
                    f"{subject.name} leaves no gradient in .grad, steps no optimizer and moves no "
                    "weight of the model that it was given"
                )
            if floor > BLIND:
                raise CheckError(
                    f"{subject.name}: the gradient is lost in rounding (noise floor "
                    f"{floor:.0e} of it): at these weights there is nothing to learn, as "
                    "where a teacher is the student. Start from other weights or rows"
                )
            return runs
        raise CheckError(
            f"{subject.name} could not be run: {type(errors[0]).__name__}: {errors[0]}"
        ) from errors[0]

    @property
    def whole(self) -> Cut:
        """The whole batch as one micro-batch."""
        return (tuple(range(self.subject.size)),)

    def run(self, cut: Cut, **changes: object) -> Observation:
        """One step on a cut, under the plain setting with changes; remembered."""
        setting = replace(self.plain, **changes)  # type: ignore[arg-type]
        found = self._seen.pop((cut, setting), None) or self.subject.run(cut, setting)
        self._seen[cut, setting] = found  # the latest last
        if len(self._seen) > REMEMBERED:
            del self._seen[next(iter(self._seen))]
        return found

    def gradient(self, cut: Cut, **changes: object) -> Gradient:
        """The loop's gradient where it is small enough that nothing is clipped, scaled back.

        Without what the loop adds to it that is no gradient of the loss, such as weight decay.
        """
        if not self.scalable:
            return self.run(cut, **changes).gradient
        found = self.run(cut, **changes, scale=SMALL).gradient
        if self._offset is not None:
            found = combine([found, self._offset], [1.0, -1.0])
        return combine([found], [1 / SMALL])

    def gradient_of_ranks(self, shares: Sequence[Cut], **changes: object) -> Gradient:
        """That of the first rank, as `gradient` has it."""
        found = self.run_ranks(shares, **changes, scale=SMALL)[0].gradient
        if self._offset is not None:
            found = combine([found, self._offset], [1.0, -1.0])
        return combine([found], [1 / SMALL])

    def clear(self, cut: Cut, **changes: object) -> Gradient:
        """The gradient, small where the loop clips it."""
        return self.gradient(cut, **changes) if self.clips else self.run(cut, **changes).gradient

    @cached_property
    def clips(self) -> bool:
        """Whether the whole batch's gradient is cut short."""
        if not self.scalable:
            return False
        natural = self.run(self.whole).gradient
        if self._offset is not None:
            natural = combine([natural, self._offset], [1.0, -1.0])
        seen = compare(self.gradient(self.whole), natural)
        return seen.relative_difference > self.small_tolerance

    @cached_property
    def scalable(self) -> bool:
        """Whether the scale of a backward's gradient arrives in the step, to enough digits."""
        natural = self.run(self.whole).gradient
        small = self.run(self.whole, scale=SMALL)
        if self._offset is not None:
            small = replace(small, gradient=combine([small.gradient, self._offset], [1.0, -1.0]))
            natural = combine([natural, self._offset], [1.0, -1.0])
        size, reference = norm(small.gradient), norm(natural)
        if not reference or not math.isfinite(size) or size / reference > 0.5:
            return False
        return small.rounding < 1e-8 or small.rounding <= 2 * self.run(self.whole).rounding

    @cached_property
    def hides_scale(self) -> bool:
        """Whether the update is as long whatever the gradient's length, as in Adam by hand."""
        try:
            natural, small, none = (
                norm(self.run(self.whole, scale=scale).gradient) for scale in (1.0, SMALL, 0.0)
            )
        except Exception:  # the subject's code: it may refuse a gradient of zero, and so sees it
            return False
        return small > 0.5 * natural > none

    @cached_property
    def _offset(self) -> Gradient | None:
        """What the step does without any gradient, or None if nothing."""
        found = self.run(self.whole, scale=0.0).gradient
        natural = self.run(self.whole).gradient
        same = compare(found, natural).relative_difference < 1e-3  # the scale does not arrive
        return None if same or not norm(found) else found

    def run_ranks(self, shares: Sequence[Cut], **changes: object) -> list[Observation]:
        """One step on several ranks, not remembered."""
        return self.subject.run_ranks(shares, replace(self.plain, **changes))  # type: ignore[arg-type]

    def counts(self, micro: tuple[int, ...], **changes: object) -> Mapping[str, tuple[str, float]]:
        """What the batch of these examples could be counted by."""
        return self.subject.counts(micro, replace(self.plain, **changes))  # type: ignore[arg-type]

    def chained(self, cut: Cut, **changes: object) -> Observation | None:
        """The micro-batches as steps of their own; None if the loop never updates."""
        return self.subject.chained(cut, replace(self.plain, **changes))  # type: ignore[arg-type]

    def again(self, cut: Cut, **changes: object) -> Observation:
        """The same run once more, not remembered."""
        return self.subject.run(cut, replace(self.plain, **changes))  # type: ignore[arg-type]

    @cached_property
    def repeats(self) -> bool:
        """Whether the same run gives the same gradient again, up to rounding."""
        first, second = self.run(self.whole), self.again(self.whole)
        seen = compare(second.gradient, first.gradient).relative_difference
        return seen <= 10 * max(self.coarsest, first.rounding)

    def moved_by_seed(self, cut: Cut, **changes: object) -> float:
        """How much another seed changes the gradient, relative."""
        other = self.gradient(cut, **{**changes, "seed": self.plain.seed + 1})
        return compare(other, self.gradient(cut, **changes)).relative_difference

    @cached_property
    def floor(self) -> float:
        """Relative difference that arithmetic alone makes, measured on this subject.

        The trembling of the gradient of the whole batch and of the finest cut when the weights
        move by a rounding; then, where they are of that size, the same cut twice and the examples
        of the whole batch in another order. At least the rounding of the numbers themselves.
        """
        first = self.run(self.whole)
        base = max(first.rounding, *(self._trembling(cut) for cut in (self.whole, self.singles)))
        turned = (tuple(reversed(self.whole[0])),)
        others = [self.again(self.whole), self.run(turned)]
        seen = [compare(other.gradient, first.gradient).relative_difference for other in others]
        return max(base, *(one for one in seen if one <= MULTIPLE * base), 0.0)

    @property
    def singles(self) -> Cut:
        """Each example as a micro-batch."""
        return tuple((index,) for index in range(self.subject.size))

    def _trembling(self, cut: Cut) -> float:
        if not self.repeats:  # then a difference of runs measures their dice
            return self.coarsest
        found = [self.run(cut, shift=shift).gradient for shift in (None, *self.shifts)]
        return trembling(found)

    @cached_property
    def shifts(self) -> tuple[Shift, ...]:
        """Three displacements of the weights along a line, each a rounding further."""
        line = along_a_line(self.run(self.whole).gradient, self.coarsest)
        return tuple(Shift(by) for by in line)

    @property
    def tolerance(self) -> float:
        """The largest relative difference that still counts as exact."""
        return MULTIPLE * self.floor

    @cached_property
    def small_tolerance(self) -> float:
        """The same of `gradient`: small updates of weights lose digits."""
        if not self.scalable:
            return self.tolerance
        rounding = self.run(self.whole, scale=SMALL).rounding
        return MULTIPLE * max(self.floor, rounding)


def _coarsest(runs: Runs) -> float:
    """The largest rounding that takes part, or that of the gradient if it cannot be watched."""
    try:
        with FloatsSeen() as seen:
            runs.again(runs.whole)
    except Exception:  # some compiled code cannot run under a watch
        return runs.run(runs.whole).rounding
    return float(seen.coarsest())


def cuts(size: int, *, uniform: bool) -> list[Cut]:
    """The cuts of a batch that the audit tries: ragged first where the subject can.

    Args:
        size: Examples; at least 4.
        uniform: Micro-batches are of one size; see `uneven` for a smaller last one.

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


def uneven(size: int) -> Cut:
    """What a data set is cut into that no batch size divides: the last micro-batch is smaller."""
    examples = range(size)
    return tuple(tuple(examples[start : start + 3]) for start in range(0, size, 3))
