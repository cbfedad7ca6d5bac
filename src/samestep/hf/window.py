"""The window of a step, counted before the first backward over all ranks, and its state."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from samestep.engine.collectives import any_rank, gather_results
from samestep.engine.targets import IGNORE
from samestep.errors import StepError
from samestep.hf.proof import count_alike, narrow_units, refuse_ambiguous
from samestep.hf.units import NAMED, Batch, Unit, num_examples, row_tensors

UnitOption = str | Callable[[Batch], Any] | None


@dataclass
class Window:
    """The counts of one step's micro-batches.

    Attributes:
        counts: Those of this rank's, in order.
        total: Over the window and the ranks.
        ranks: How many gradients are averaged.
        at: The micro-batch that is computed; -1 before the first.
    """

    counts: Sequence[float] = ()
    total: float = 0.0
    ranks: int = 1
    at: int = field(default=-1)

    def advance(self) -> None:
        """Go on to the next micro-batch.

        Raises:
            StepError: There is none: the loop takes micro-batches from elsewhere.
        """
        self.at += 1
        if self.at >= len(self.counts):
            raise StepError(
                f"training_step was called for micro-batch {self.at + 1} of a window of "
                f"{len(self.counts)}: exact() needs the loop of transformers.Trainer, which takes "
                "each window from get_batch_samples; use samestep.step in a loop of your own"
            )

    def count(self) -> float:
        """The units of the micro-batch that is computed."""
        return self.counts[self.at]

    def factor(self) -> float:
        """What makes its mean the share of the objective that DDP's average over ranks expects."""
        return self.count() * self.ranks / self.total if self.total else 0.0


def count_window(batches: Sequence[Batch], unit: Unit, *, ranks: int) -> Window:
    """Count the micro-batches of a step, over all ranks.

    Args:
        batches: Those of this rank.
        unit: What is counted.
        ranks: How many ranks there are.

    Returns:
        The window, before its first micro-batch.
    """
    counts: list[float] = []

    def count() -> float:
        if unit.one_length:
            _check_length(batches)
        found = [unit.count(batch) for batch in batches]
        if found:  # in one go: each number that is read by itself makes a GPU wait
            counts.extend(torch.stack([number.to(found[0].device) for number in found]).tolist())
        return sum(counts)

    totals = gather_results(count) if ranks > 1 else [count()]
    return Window(counts, sum(totals), ranks)


def _check_length(batches: Sequence[Batch]) -> None:
    lengths = sorted({int(batch["input_ids"].shape[1]) for batch in batches})
    if len(lengths) > 1:
        raise StepError(
            f"micro-batches of {lengths[0]} to {lengths[-1]} tokens a row: the probabilities of an "
            "answer's place are taken over padding too, so the loss depends on how long a "
            "micro-batch is padded; pad all rows to one length (padding='max_length')"
        )


def rows_of_this_rank(accelerator: Any, batch: Batch, *, paired: bool) -> int:
    """How many rows, or pairs, of a batch are not repeats that fill up the last one of an epoch.

    Args:
        accelerator: The trainer's, whose data loader yielded the batch.
        batch: The one that was yielded last.
        paired: Whether two rows are a pair.
    """
    rows = num_examples(batch, paired=paired)
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return rows
    real: int = state.remainder - accelerator.process_index * rows
    return min(rows, max(0, real))


def ignore_rows(batch: Batch, keep: int) -> dict[str, Any]:
    """A batch in which only the first ``keep`` rows have targets."""
    changed = dict(batch)
    held = row_tensors(batch)
    for name in ("labels", "shift_labels"):
        if name in held:
            changed[name] = held[name].clone()
            changed[name][keep:] = IGNORE
    return changed


def with_a_target(batch: Batch) -> dict[str, Any]:
    """A batch without targets, with one: its mean is finite then, and can be weighed with 0."""
    changed = dict(batch)
    for name in ("labels", "shift_labels"):
        if isinstance(changed.get(name), Tensor):
            changed[name] = changed[name].clone()
            changed[name][..., -1] = 0
    return changed


def zero_loss(loss: Tensor, model: Any) -> Tensor:
    """A zero with a graph: every weight gets a gradient of 0, so that no rank waits for another."""
    if bool(torch.isfinite(loss)):
        return loss * 0.0
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return torch.stack([(weight * 0.0).sum() for weight in weights]).sum()


@contextmanager
def backward_of(accelerator: Any, loss: Callable[[], Tensor]) -> Iterator[None]:
    """Differentiate a loss as it is, whatever a trainer and accelerate divide it by on the way.

    Each release of transformers divides in its own place, and some have no switch. So what arrives
    is replaced, and the one division that accelerate states is undone.

    Args:
        accelerator: The trainer's; its ``backward`` is another within the block.
        loss: Gives what is to be differentiated, once it is there.

    Raises:
        StepError: The trainer did not go through it, as with apex.
    """
    backward, calls = accelerator.backward, []

    def differentiate(divided: Tensor, **options: Any) -> None:
        calls.append(divided)
        backward(loss() * accelerator.gradient_accumulation_steps, **options)

    accelerator.backward = differentiate
    try:
        yield
    finally:
        accelerator.backward = backward
    if not calls:
        raise StepError(
            "the trainer differentiates its loss without its accelerator (apex?), where exact() "
            "cannot scale it: use bf16=True or fp16=True without apex"
        )


@dataclass
class State:
    """What is remembered of a trainer between its hooks.

    Attributes:
        unit: What its loss is a mean over, once that is known.
        complete: Whether its own step is exact, so that no hook does anything.
        unproved: Whether the next window is to be compared with its parts.
        window: The micro-batches of this step.
        in_step: Whether a loss that is computed is one to scale.
        scaled: The loss of the micro-batch that is computed, as it is to be differentiated.
        candidates: The units that are possible.
        untried: Whether no value has been compared yet.
        evaluated: Loss times count, and count, of each batch of an evaluation that is under way.
        metrics: What the metrics of each micro-batch count, since the last log, by mode.
        balance: Takes the router loss over the window; None without one, or where not asked for.
        dropout: Keys the dropout of a forward by its rows; None where not asked for.
    """

    unit: Unit | None
    complete: bool
    unproved: bool
    window: Window = field(default_factory=Window)
    in_step: bool = False
    scaled: Any = None
    candidates: list[Unit] = field(
        default_factory=lambda: [unit for unit in NAMED.values() if not unit.paired]
    )
    untried: bool = True
    evaluated: list[tuple[float, float]] | None = None
    metrics: dict[str, list[dict[str, float]]] = field(
        default_factory=lambda: {"train": [], "eval": []}
    )
    balance: Any = None
    dropout: Any = None


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
