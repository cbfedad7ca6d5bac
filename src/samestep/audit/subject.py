"""What the auditor asks of a training loop: run one step on a given cut of given examples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

Cut: TypeAlias = tuple[tuple[int, ...], ...]
"""One effective batch: the examples of each micro-batch, by index, in order."""

Gradient: TypeAlias = dict[str, Tensor]
"""By the name of the weight; float64, on the CPU; of large ones `samestep.audit.sketch`."""


@dataclass(frozen=True, eq=False)
class Shift:
    """A displacement of the weights, by name; two shifts are equal only if they are one object."""

    by: Gradient


@dataclass(frozen=True)
class Setting:
    """How a run departs from the plain one.

    Attributes:
        dtype: Of the weights and the floating inputs; None: as the subject makes them.
        dropout: Leave dropout on.
        seed: Of every random number generator, before the run.
        padding: Columns of padding to add to every micro-batch.
        side: On which side.
        packed: Concatenate the examples of a micro-batch instead of padding them.
        masked: Examples whose targets are all masked.
        altered: Examples whose tokens are replaced by others.
        twins: Alter each repeat of an example within a micro-batch.
        window: Micro-batches that a full accumulation window holds; None: as many as the cut has.
        term: Only this loss term.
        evaluate_first: Run an evaluation before the step.
        shift: Added to the initial weights.
        scale: Multiplies the gradient that every backward delivers to a weight, before anything
            adds it up, clips it or updates with it. The observed gradient is not divided back.
        filler: Token id of the columns that `padding` adds.
        borders_masked: In a pack, mask the label of each sequence's first token.
    """

    dtype: torch.dtype | None = torch.float64
    dropout: bool = False
    seed: int = 0
    padding: int = 0
    side: Literal["right", "left"] = "right"
    packed: bool = False
    masked: tuple[int, ...] = ()
    altered: tuple[int, ...] = ()
    twins: bool = False
    window: int | None = None
    term: str | None = None
    evaluate_first: bool = False
    shift: Shift | None = None
    scale: float = 1.0
    filler: int = 0
    borders_masked: bool = False


PLAIN = Setting()


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
        after: The weights after the step; only of runs on several ranks.
    """

    gradient: Gradient
    reported: dict[str, float] = field(default_factory=dict)
    rounding: float = 0.0
    updates: int = 0
    after: Gradient | None = None


@dataclass(frozen=True)
class Facts:
    """What the data say of one example.

    Attributes:
        targets: Labels that are predicted: not -100, and after the shift where there is one.
        labelled: Labels that are not -100, without the shift.
        length: Tokens.
    """

    targets: int
    labelled: int
    length: int


@runtime_checkable
class Subject(Protocol):
    """A training loop under audit; adapters make one of what the user has.

    Attributes:
        name: For the report.
        size: Examples of the effective batch.
        uniform: Whether micro-batches must be of one size (the last may be smaller).
        terms: Names of the loss terms that can be run alone.
    """

    name: str
    size: int
    uniform: bool
    terms: tuple[str, ...]

    def skips(self) -> Mapping[str, str]:
        """The axes that this subject cannot run, and why."""

    def run(self, cut: Cut, setting: Setting = PLAIN) -> Observation:
        """One step from the initial weights.

        Args:
            cut: The micro-batches.
            setting: Departures from the plain run.

        Returns:
            What was seen.

        Raises:
            Exception: Whatever the subject raises.
        """

    def run_ranks(self, shares: Sequence[Cut], setting: Setting = PLAIN) -> list[Observation]:
        """One step on several ranks, in processes that are always ended.

        Args:
            shares: The micro-batches of each rank, as many for each.
            setting: Departures from the plain run.

        Returns:
            What each rank saw.

        Raises:
            HungError: The ranks wait for each other for ever.
            CheckError: A rank failed; shows its error.
        """

    def sharded(self, examples: int, world: int) -> Sequence[tuple[int, ...]] | None:
        """How the subject itself deals the first examples out to ranks; None if it does not."""

    def chained(self, cut: Cut, setting: Setting = PLAIN) -> Observation | None:
        """The micro-batches as steps of their own, one after another; None if it never updates."""

    def evaluate(
        self, batch_size: int, setting: Setting = PLAIN, examples: Sequence[int] | None = None
    ) -> dict[str, float]:
        """Evaluation loss and metrics at the initial weights, of all examples or of these."""

    def facts(self) -> Sequence[Facts] | None:
        """What the data say of each example, or None if it cannot be told."""

    def padding_sides(self) -> tuple[Literal["right", "left"], ...]:
        """The sides on which more padding should be harmless."""

    def counts(
        self, micro: tuple[int, ...], setting: Setting = PLAIN
    ) -> Mapping[str, tuple[str, float]]:
        """What the batch of these examples could be counted by.

        Returns:
            By what is counted, the cause that it is if a loop divides by it, and the count.
        """

    def shape(self, micro: tuple[int, ...]) -> tuple[int, int] | None:
        """Rows and length of the batch that these examples make; None if it cannot be told."""
