"""Experiments: runs of a subject, each done once, and the noise that they are judged by."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from samestep.audit.blame import blamed
from samestep.audit.causes import CAUSES, Cause
from samestep.audit.gradients import (
    FloatDtypeRecorder,
    global_norm,
    linear_combination,
    noise_estimate,
    perturbations,
    relative_difference,
    scale,
    subtract,
)
from samestep.audit.splits import candidate_splits
from samestep.audit.subject import (
    DEFAULT_SETTINGS,
    Dealt,
    Denominator,
    Gradient,
    Observation,
    Perturbation,
    RunSettings,
    Split,
    Subject,
)
from samestep.errors import CheckError

TOLERANCE_FACTOR = 10.0
"""How many noise floors a difference may be and still be exact."""

MAX_NOISE = 0.05
"""Noise floor from which on nothing could be told apart."""

SMALL_SCALE = 2.0**-14
"""Scale at which no gradient is large enough to be clipped; a power of two, so nothing rounds."""

CACHED_RUNS = 24
"""Runs of which the gradient is kept."""

MIN_EXPLAINED = 1e-6
"""Residual below which a prediction explains a gradient, or what counts as exact if more."""


@dataclass
class Experiments:
    """Runs a subject and remembers the latest runs.

    Attributes:
        subject: The loop under audit.
        settings: Those that the runs depart from.
        causes: The causes that can be named: those of `samestep.audit.causes`, and the user's.
        coarsest_rounding: The largest relative rounding of any type that takes part.
    """

    subject: Subject
    settings: RunSettings = DEFAULT_SETTINGS
    causes: Mapping[str, Cause] = field(default_factory=lambda: CAUSES)
    coarsest_rounding: float = 0.0
    _cache: dict[tuple[Split, RunSettings], Observation] = field(default_factory=dict)

    @classmethod
    def start(cls, subject: Subject, causes: Mapping[str, Cause] = CAUSES) -> "Experiments":
        """Find the widest type that the subject runs in: float64, float32, or its own.

        Raises:
            CheckError: It runs in none, shows the subject's own error; or it leaves no gradient.
        """
        errors = []
        for dtype in (torch.float64, torch.float32, None):
            experiments = cls(subject, replace(DEFAULT_SETTINGS, dtype=dtype), causes)
            try:
                experiments.run(experiments.whole_batch)
                experiments.run(experiments.single_examples)
                rounding = experiments.watched_rounding()
                experiments.coarsest_rounding = max(rounding, torch.finfo(torch.float64).eps)
                noise_floor = experiments.noise_floor
            except Exception as error:  # the subject is the user's code: anything may come
                errors.append(error)
                continue
            if not global_norm(experiments.run(experiments.whole_batch).gradient):
                raise CheckError(
                    f"{subject.name} leaves no gradient in .grad, steps no optimizer and moves no "
                    "weight of the model that it was given"
                )
            if noise_floor > MAX_NOISE:
                raise CheckError(
                    f"{subject.name}: the gradient is lost in rounding (noise floor "
                    f"{noise_floor:.0e} of it): at these weights there is nothing to learn, as "
                    "where a teacher is the student. Start from other weights or rows"
                )
            return experiments
        raise CheckError(f"{subject.name} could not be run: {blamed(errors[0])}") from errors[0]

    @property
    def whole_batch(self) -> Split:
        """All examples as one micro-batch."""
        return (tuple(range(self.subject.size)),)

    @property
    def single_examples(self) -> Split:
        """Each example as a micro-batch."""
        return tuple((index,) for index in range(self.subject.size))

    @property
    def splits(self) -> list[Split]:
        """The splits that the audit tries."""
        return candidate_splits(self.subject.size, uniform=self.subject.uniform)

    @property
    def mixed_split(self) -> Split:
        """Micro-batches of several examples: ragged, or of two where they must be of one size."""
        return self.splits[1 if self.subject.uniform else 0]

    @cached_property
    def with_wide_constants(self) -> "Experiments":
        """The same, with everything that is computed in float32 computed in float64."""
        return self.departing(wide_constants=True)

    def departing(self, **changes: object) -> "Experiments":
        """Experiments that depart from other settings, with a noise of their own."""
        settings = self._changed(changes)
        return Experiments(self.subject, settings, self.causes, self.coarsest_rounding)

    def run(self, split: Split, **changes: object) -> Observation:
        """One step on a split, under the settings with changes; remembered.

        Args:
            split: The micro-batches.
            **changes: Fields of `samestep.audit.subject.RunSettings`.
        """
        settings = self._changed(changes)
        observation = self._cache.pop((split, settings), None) or self.subject.run(split, settings)
        self._cache[split, settings] = observation  # the latest last
        if len(self._cache) > CACHED_RUNS:
            del self._cache[next(iter(self._cache))]
        return observation

    def rerun(self, split: Split, **changes: object) -> Observation:
        """The same run once more, not remembered."""
        return self.subject.run(split, self._changed(changes))

    def run_on_ranks(self, shares: Sequence[Split], **changes: object) -> list[Observation]:
        """One step on several ranks, not remembered."""
        return self.subject.run_on_ranks(shares, self._changed(changes))

    def run_dealt(self, examples: Sequence[int], size: int, **changes: object) -> Dealt:
        """One step on what the subject's own loader deals, not remembered."""
        return self.subject.run_dealt(examples, size, self._changed(changes))

    def run_dealt_on_ranks(
        self, examples: Sequence[int], size: int, world: int, **changes: object
    ) -> list[Dealt] | None:
        """The same on several ranks; None where the subject has no loader of its own for them."""
        return self.subject.run_dealt_on_ranks(examples, size, world, self._changed(changes))

    def run_as_steps(self, split: Split, **changes: object) -> Observation | None:
        """The micro-batches as steps of their own; None if the loop never updates."""
        return self.subject.run_as_steps(split, self._changed(changes))

    def evaluate(
        self, batch_size: int, examples: Sequence[int] | None = None, **changes: object
    ) -> dict[str, float]:
        """Evaluation loss and metrics at the initial weights, of all examples or of these."""
        return self.subject.evaluate(batch_size, self._changed(changes), examples=examples)

    def denominators(
        self, micro_batch: tuple[int, ...], **changes: object
    ) -> Mapping[str, Denominator]:
        """What a loop could divide the batch of these examples by."""
        return self.subject.denominators(micro_batch, self._changed(changes))

    def number_of_labels(self, micro_batch: tuple[int, ...], **changes: object) -> float:
        """Labels before the shift of the batch of these examples; 0 without labels."""
        labels = self.denominators(micro_batch, **changes).get("labels")
        return 0.0 if labels is None else labels.value

    def _changed(self, changes: Mapping[str, object]) -> RunSettings:
        return replace(self.settings, **changes)  # type: ignore[arg-type]

    def small_gradient(self, split: Split, **changes: object) -> Gradient:
        """The loop's gradient where it is small enough that nothing is clipped, scaled back.

        Without what the loop adds to it that is no gradient of the loss, such as weight decay.
        """
        if not self.keeps_scale:
            return self.run(split, **changes).gradient
        small = self.run(split, **changes, gradient_scale=SMALL_SCALE).gradient
        return scale(self._without_offset(small, split, **changes), 1 / SMALL_SCALE)

    def small_gradient_of_ranks(self, shares: Sequence[Split], **changes: object) -> Gradient:
        """That of the first rank, as `small_gradient` has it."""
        small = self.run_on_ranks(shares, **changes, gradient_scale=SMALL_SCALE)[0].gradient
        if self._has_offset:
            still = self.run_on_ranks(shares, **changes, gradient_scale=0.0)
            small = subtract(small, still[0].gradient)
        return scale(small, 1 / SMALL_SCALE)

    def unclipped_gradient(self, split: Split, **changes: object) -> Gradient:
        """The gradient, small where the loop clips it."""
        if self.clips:
            return self.small_gradient(split, **changes)
        return self.run(split, **changes).gradient

    def natural_gradient(self, split: Split, **changes: object) -> Gradient:
        """The loop's gradient as it is, clipped or not, without what is no gradient of the loss."""
        return self._without_offset(self.run(split, **changes).gradient, split, **changes)

    def offset(self, split: Split, **changes: object) -> Gradient:
        """What a step on a split does without any gradient, such as weight decay; {} if nothing."""
        if not self._has_offset:
            return {}
        return self.run(split, **{**changes, "gradient_scale": 0.0}).gradient

    def _without_offset(self, gradient: Gradient, split: Split, **changes: object) -> Gradient:
        return subtract(gradient, self.offset(split, **changes)) if self._has_offset else gradient

    @cached_property
    def _has_offset(self) -> bool:
        """Whether a step moves weights without any gradient, once or between micro-batches."""
        return any(map(self._moves_by_itself, (self.whole_batch, self.single_examples)))

    def _moves_by_itself(self, split: Split) -> bool:
        offset, natural = (self.run(split, gradient_scale=s).gradient for s in (0.0, 1.0))
        # They are alike if the scale does not arrive.
        return global_norm(offset) > 0 and relative_difference(offset, natural) >= 1e-3

    @cached_property
    def clips(self) -> bool:
        """Whether the whole batch's gradient is clipped."""
        if not self.keeps_scale:
            return False
        natural = self.natural_gradient(self.whole_batch)
        small = self.small_gradient(self.whole_batch)
        return relative_difference(small, natural) > self.small_tolerance

    @cached_property
    def keeps_scale(self) -> bool:
        """Whether the scale of a backward's gradient arrives in the step, to enough digits."""
        batch = self.whole_batch
        natural, small = self.run(batch), self.run(batch, gradient_scale=SMALL_SCALE)
        size = global_norm(self._without_offset(small.gradient, batch))
        reference = global_norm(self._without_offset(natural.gradient, batch))
        if not reference or not math.isfinite(size) or size / reference > 0.5:
            return False
        return small.rounding < 1e-8 or small.rounding <= 2 * natural.rounding

    @cached_property
    def hides_scale(self) -> bool:
        """Whether the update is as long whatever the gradient's length, as in Adam by hand."""
        try:
            natural, small, none = (
                global_norm(self.run(self.whole_batch, gradient_scale=factor).gradient)
                for factor in (1.0, SMALL_SCALE, 0.0)
            )
        except Exception:  # the subject's code: it may refuse a gradient of zero, and so sees it
            return False
        return small > 0.5 * natural > none

    @cached_property
    def again(self) -> Observation:
        """The whole batch once more."""
        return self.rerun(self.whole_batch)

    def watched_rounding(self) -> float:
        """The largest rounding that takes part, or that of the gradient if it cannot be watched.

        The run that is watched is the whole batch `again`.
        """
        try:
            with FloatDtypeRecorder() as recorder:
                self.again  # noqa: B018 - runs the subject
        except Exception:  # some compiled code cannot run under a watch
            return self.run(self.whole_batch).rounding
        return float(recorder.coarsest())

    @cached_property
    def is_deterministic(self) -> bool:
        """Whether the same run gives the same gradient again, up to rounding."""
        first, second = self.run(self.whole_batch), self.again
        difference = relative_difference(second.gradient, first.gradient)
        return difference <= 10 * max(self.coarsest_rounding, first.rounding)

    def seed_sensitivity(self, split: Split, **changes: object) -> float:
        """How much another seed changes the gradient, relative."""
        reseeded = self.small_gradient(split, **{**changes, "seed": self.settings.seed + 1})
        return relative_difference(reseeded, self.small_gradient(split, **changes))

    @cached_property
    def noise_floor(self) -> float:
        """Relative difference that arithmetic alone makes, measured on this subject.

        The noise of the gradient of the whole batch and of the finest split when the weights move
        by a rounding; then, where they are of that size, the same split twice and the examples of
        the whole batch in another order. At least the rounding of the numbers themselves.
        """
        first = self.run(self.whole_batch)
        splits = (self.whole_batch, self.single_examples)
        base = max(first.rounding, *(self._noise_of(split) for split in splits))
        reversed_batch = (tuple(reversed(self.whole_batch[0])),)
        others = [self.again, self.run(reversed_batch)]
        differences = [relative_difference(other.gradient, first.gradient) for other in others]
        small = [size for size in differences if size <= TOLERANCE_FACTOR * base]
        return max(base, *small, 0.0)

    @cached_property
    def left_noise(self) -> Mapping[str, float]:
        """How far each weight and buffer ends elsewhere when the weights move by roundings.

        Measured as the noise of gradients is, and by a repeat; an update may enlarge it, as one
        by the sign of a gradient that is nothing but rounding.
        """
        noise: dict[str, float] = {}
        for split in (self.whole_batch, self.single_examples):
            points = (None, *self.perturbations)
            moved = [self.run(split, perturbation=point).moved for point in points]
            second = self.again if split == self.whole_batch else self.rerun(split)
            again = [self.run(split).moved, second.moved]
            for name in set.intersection(*map(set, [*moved, *again])):
                third = linear_combination(
                    [{name: each[name]} for each in moved], [-1.0, 3.0, -3.0, 1.0]
                )
                repeat = float((again[1][name] - again[0][name]).norm())
                error = max(float(third[name].norm()) / math.sqrt(20), repeat)
                noise[name] = max(noise.get(name, 0.0), error)
        return noise

    def _noise_of(self, split: Split) -> float:
        if not self.is_deterministic:  # then a difference of runs measures their random numbers
            return self.coarsest_rounding
        points = (None, *self.perturbations)
        return noise_estimate([self.run(split, perturbation=point).gradient for point in points])

    @cached_property
    def perturbations(self) -> tuple[Perturbation, ...]:
        """Three displacements of the weights along a line, each a rounding further."""
        line = perturbations(self.run(self.whole_batch).gradient, self.coarsest_rounding)
        return tuple(map(Perturbation, line))

    @property
    def tolerance(self) -> float:
        """The largest relative difference that still counts as exact."""
        return TOLERANCE_FACTOR * self.noise_floor

    @cached_property
    def small_tolerance(self) -> float:
        """The same of `small_gradient`: small updates of weights lose digits."""
        if not self.keeps_scale:
            return self.tolerance
        small = self.run(self.whole_batch, gradient_scale=SMALL_SCALE)
        left = global_norm(self.small_gradient(self.whole_batch)) * SMALL_SCALE
        rounding = small.rounding * global_norm(small.gradient) / left  # what is taken off rounds
        return TOLERANCE_FACTOR * max(self.noise_floor, rounding)

    @property
    def residual_tolerance(self) -> float:
        """The residual up to which a prediction explains a gradient."""
        return max(MIN_EXPLAINED, self.tolerance)
