"""What is remembered of a trainer between its hooks, and the unit of its loss."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from samestep.engine.collectives import any_rank, gather_results
from samestep.hf.proof import count_alike, narrow_units, refuse_ambiguous
from samestep.hf.units import NAMED, Batch, Unit
from samestep.hf.window import Window

UnitOption = str | Callable[[Batch], Any] | None


@dataclass
class State:
    """What is remembered of a trainer between its hooks.

    Attributes:
        unit: What its loss is a mean over, once that is known.
        complete: Whether its own step is exact, so that no hook does anything.
        unproved: Whether the next window is to be compared with its parts.
        window: The micro-batches of this step.
        in_step: Whether a loss that is computed is one to scale.
        candidates: The units that are possible.
        untried: Whether no value has been compared yet.
        evaluated: Loss times count, and count, of each batch of an evaluation that is under way.
        metrics: What the metrics of each micro-batch count, since the last log, by mode.
    """

    unit: Unit | None
    complete: bool
    unproved: bool
    window: Window = field(default_factory=Window)
    in_step: bool = False
    candidates: list[Unit] = field(
        default_factory=lambda: [unit for unit in NAMED.values() if not unit.paired]
    )
    untried: bool = True
    evaluated: list[tuple[float, float]] | None = None
    metrics: dict[str, list[dict[str, float]]] = field(
        default_factory=lambda: {"train": [], "eval": []}
    )


def trainer_of(hooks: Any) -> Any:
    """The same object, of which the trainer's own attributes can be asked."""
    return hooks


def unit_of(trainer: Any, batches: Sequence[Batch]) -> Unit:
    """The trainer's unit; found from the values of these batches where nothing tells it.

    Units that count the same in all data so far are told apart when data come that differ.
    """
    state: State = trainer._samestep
    if state.unit is None:
        units = state.candidates
        if any_rank(state.untried or not count_alike(batches, units)):
            lists = gather_results(
                lambda: [unit.name for unit in narrow_units(trainer, batches, units)]
            )
            units = [unit for unit in units if all(unit.name in names for names in lists)]
            if not units or any_rank(not count_alike(batches, units)):
                refuse_ambiguous(units)
        state.candidates, state.untried = units, False
        if len(units) > 1:
            return units[0]
        state.unit = units[0]
    return state.unit
