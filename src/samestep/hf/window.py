"""The window of a step: its micro-batches counted before the first backward, over all ranks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from samestep.engine.collectives import gather_results
from samestep.engine.targets import IGNORE
from samestep.errors import StepError
from samestep.hf.units import Batch, Unit, num_examples, row_tensors


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
