"""What the auditor needs of a training loop: run one step on a split of its examples."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

Split: TypeAlias = tuple[tuple[int, ...], ...]
"""One effective batch: the examples of each micro-batch, by index, in order."""

Gradient: TypeAlias = dict[str, Tensor]
"""By the name of the weight; float64, on the CPU; of large ones `samestep.audit.gradients.sketch`.
"""

Side: TypeAlias = Literal["right", "left"]

Knob: TypeAlias = tuple[str, int]
"""A knob of the subject's and which of its values, counted from 0."""

Capability: TypeAlias = Literal[
    "padding", "packing", "masking", "window", "terms", "ranks", "evaluation", "knobs", "loader"
]
"""What not every subject can do: pad more, pack, mask the targets of an example, take the
micro-batches of a full window, run a loss term alone, run on several ranks, evaluate, change a size
of its own, deal its examples by its own loader."""


@dataclass(frozen=True, eq=False)
class Perturbation:
    """A displacement of the weights, by name; two are equal only if they are the same object."""

    displacement: Gradient


@dataclass(frozen=True)
class RunSettings:
    """How a run departs from the default one.

    Attributes:
        dtype: Of the weights and the floating inputs; None: as the subject makes them.
        dropout: Leave dropout on.
        seed: Of every random number generator, before the run.
        extra_padding: Columns of padding to add to every micro-batch.
        padding_side: On which side.
        padding_offset: Added to the token id of the columns that ``extra_padding`` adds.
        packed: Concatenate the examples of a micro-batch instead of padding them.
        mask_boundaries: In a pack, mask the label of each sequence's first token.
        masked_examples: Examples whose targets are all masked.
        altered_examples: Examples whose tokens are replaced by others.
        alter_repeats: Alter each repeat of an example within a micro-batch.
        window: Micro-batches of a full accumulation window; None: as many as the split has.
        term: Only this loss term.
        evaluate_first: Run an evaluation before the step.
        perturbation: Added to the initial weights.
        gradient_scale: Multiplies the gradient that every backward delivers to a weight, before
            anything adds it up, clips it or updates with it. The observed gradient is not divided
            back.
        model_context: Entered with the model for the length of the run, as to change how the model
            computes; None: nothing.
        watch_moves: Look at every backward for what moved since the one before.
        wide_constants: What is computed in float32 is computed in float64, constants too.
        steps_before: Steps of the same split that are made before the one that is observed.
        clear_between: Empty ``.grad`` after each of those.
        knob: The knob that has another value than the subject's own.
    """

    dtype: torch.dtype | None = torch.float64
    dropout: bool = False
    seed: int = 0
    extra_padding: int = 0
    padding_side: Side = "right"
    padding_offset: int = 0
    packed: bool = False
    mask_boundaries: bool = False
    masked_examples: tuple[int, ...] = ()
    altered_examples: tuple[int, ...] = ()
    alter_repeats: bool = False
    window: int | None = None
    term: str | None = None
    evaluate_first: bool = False
    perturbation: Perturbation | None = None
    gradient_scale: float = 1.0
    model_context: Callable[[nn.Module], AbstractContextManager[Any]] | None = None
    watch_moves: bool = False
    wide_constants: bool = False
    steps_before: int = 0
    clear_between: bool = False
    knob: Knob | None = None


DEFAULT_SETTINGS = RunSettings()


@dataclass(frozen=True)
class Left:
    """What a step leaves behind.

    Attributes:
        moved: After less before, of every floating weight, frozen ones too, and of every floating
            buffer that a checkpoint holds; by name. And the state that the optimizers hold of each
            weight after the step.
        rounding: How far each may be off by the rounding of its own type.
        rates: The learning rates of each update.
        rates_after: Those that the optimizers hold after the step.
        trained: The names of the weights that are trained.
    """

    moved: Gradient = field(default_factory=dict)
    rounding: Mapping[str, float] = field(default_factory=dict)
    rates: tuple[tuple[float, ...], ...] = ()
    rates_after: tuple[tuple[float, ...], ...] = ()
    trained: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Observation:
    """What one step did.

    Attributes:
        gradient: What the weights moved along: captured right before the optimizer (added up
            over its steps), or, of a loop that updates by itself, the weights before minus those
            after.
        reported: What the loop says of itself: "loss" and metrics, by name.
        rounding: Relative rounding of the gradient itself: of its type, or, where it is a
            difference of weights, of the weights over that difference.
        updates: Optimizer steps that were seen.
        weights_after: The weights after the step; only of runs on several ranks.
        left: What the step leaves behind; None where it is not seen.
        leaves_gradients: Whether ``.grad`` holds anything but zeros after it; True: not seen.
        stepped: Whether the weights were updated at all.
        moves: For each backward but the first, the names of what moved since the one before; only
            where `RunSettings.watch_moves` asks.
        draws: Backwards during which random numbers were drawn; only where it asks.
    """

    gradient: Gradient
    reported: dict[str, float] = field(default_factory=dict)
    rounding: float = 0.0
    updates: int = 0
    weights_after: Gradient | None = None
    left: Left | None = None
    leaves_gradients: bool = True
    stepped: bool = False
    moves: tuple[frozenset[str], ...] = ()
    draws: int = 0

    @property
    def moved(self) -> Gradient:
        """How far everything moved; nothing where it is not seen."""
        return {} if self.left is None else self.left.moved


@dataclass(frozen=True)
class Dealt:
    """One step on what the subject's own loader dealt.

    Attributes:
        observation: What the step did.
        split: The examples of each micro-batch as they came, repeats too; None: not seen.
        number: How many micro-batches came.
    """

    observation: Observation
    split: Split | None
    number: int


@dataclass(frozen=True)
class Evaluated:
    """An evaluation on one of several ranks.

    Attributes:
        numbers: Loss and metrics, as this rank says them.
        examples: Those that it scored, repeats too.
    """

    numbers: Mapping[str, float]
    examples: tuple[int, ...]


@dataclass(frozen=True)
class ExampleCounts:
    """What the data say of one example.

    Attributes:
        targets: Labels that are predicted: not -100, and after the shift where there is one.
        length: Tokens.
    """

    targets: int
    length: int


class Denominator(NamedTuple):
    """A count that a loop could divide a micro-batch's loss by.

    Attributes:
        cause: The name of the cause that it is if a loop divides by it.
        value: Of the micro-batch.
    """

    cause: str
    value: float


@runtime_checkable
class Subject(Protocol):
    """A training loop under audit; adapters make one of what the user has.

    Attributes:
        name: For the report.
        size: Examples of the effective batch.
        uniform: Whether micro-batches must be of one size (the last may be smaller).
        terms: Names of the loss terms that can be run alone.
        knobs: The values of each size of its own.
        clears: Whether a step of it is known to end with, or to begin by, emptying the gradients.
    """

    name: str
    size: int
    uniform: bool
    terms: tuple[str, ...]
    knobs: Mapping[str, Sequence[Any]]
    clears: bool

    def missing(self) -> Mapping[Capability, str]:
        """The capabilities that this subject lacks, and why."""

    def run(self, split: Split, settings: RunSettings = DEFAULT_SETTINGS) -> Observation:
        """One step from the initial weights.

        Args:
            split: The micro-batches.
            settings: Departures from the default run.

        Returns:
            What was seen.

        Raises:
            Exception: Whatever the subject raises.
        """

    def run_on_ranks(
        self, shares: Sequence[Split], settings: RunSettings = DEFAULT_SETTINGS
    ) -> list[Observation]:
        """One step on several ranks, in processes that are always ended.

        Args:
            shares: The micro-batches of each rank, as many for each.
            settings: Departures from the default run.

        Returns:
            What each rank saw.

        Raises:
            DeadlockError: The ranks wait for each other for ever.
            CheckError: A rank failed; shows its error.
        """

    def run_as_steps(
        self, split: Split, settings: RunSettings = DEFAULT_SETTINGS
    ) -> Observation | None:
        """The micro-batches as steps of their own, one after another; None if it never updates."""

    def run_dealt(
        self,
        examples: Sequence[int],
        micro_batch_size: int,
        settings: RunSettings = DEFAULT_SETTINGS,
    ) -> Dealt:
        """One step on some examples, which the subject's own loader deals.

        Args:
            examples: Those that the loader is given.
            micro_batch_size: What it is told.
            settings: Departures from the default run.
        """

    def run_dealt_on_ranks(
        self,
        examples: Sequence[int],
        micro_batch_size: int,
        world: int,
        settings: RunSettings = DEFAULT_SETTINGS,
    ) -> list[Dealt] | None:
        """The same on several ranks, one micro-batch each; None if `shard` says how they deal."""

    def shard(self, examples: int, world: int) -> Sequence[tuple[int, ...]] | None:
        """How the subject itself deals the first examples out to ranks; None if it does not."""

    def evaluate(
        self,
        batch_size: int,
        settings: RunSettings = DEFAULT_SETTINGS,
        *,
        examples: Sequence[int] | None = None,
    ) -> dict[str, float]:
        """Evaluation loss and metrics at the initial weights, of all examples or of these."""

    def example_counts(self) -> Sequence[ExampleCounts] | None:
        """What the data say of each example; None if they do not say."""

    def padding_sides(self) -> tuple[Side, ...]:
        """The sides on which more padding should be harmless."""

    def denominators(
        self, micro_batch: tuple[int, ...], settings: RunSettings = DEFAULT_SETTINGS
    ) -> Mapping[str, Denominator]:
        """What a loop could divide the batch of these examples by, by what is counted."""

    def batch_shape(self, micro_batch: tuple[int, ...]) -> tuple[int, int] | None:
        """Rows and length of the batch that these examples make; None if it cannot be seen."""
