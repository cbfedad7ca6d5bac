"""Proof from values: is a loss a mean over a unit, whatever the cut? Asked of the first window."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from samestep.errors import ConfigError, StepError
from samestep.hf.units import (
    Batch,
    Unit,
    num_examples,
    num_pairs,
    num_rows,
    row_tensors,
    stacks_pairs,
)
from samestep.utils.agreement import FACTOR, rounding_noise

Cut = tuple[list[int], list[int]]

METRICS = ("_metrics", "_stored_metrics")
"""Where the trainers of TRL keep what they log, by release."""

_ASK = "give exact(trainer, unit=...) the name of the unit or a function that counts it"


def narrow_units(trainer: Any, window: Sequence[Batch], units: Sequence[Unit]) -> list[Unit]:
    """Find what a trainer's loss averages: L_AB = (n_A L_A + n_B L_B) / (n_A + n_B).

    Args:
        trainer: Its loss is computed three times for each cut that is needed.
        window: Micro-batches; the loss of one with several rows is compared with its parts'.
        units: Those that are possible.

    Returns:
        Those that explain every value; no more cuts are tried once they all count the same here.

    Raises:
        ConfigError: No unit does.
    """
    found = list(units)
    for batch in window:
        for cut in _cuts(batch, paired=False):
            losses, noise = _losses(trainer, batch, cut, paired=False, trim=False)
            found = [one for one in found if _explains(one, batch, cut, losses, noise, trim=False)]
            if not found:
                raise ConfigError(
                    f"the loss is no mean over {', '.join(one.name for one in units)}: the loss of "
                    f"{num_rows(batch)} rows, {losses[0]:.6g}, does not follow from those of its "
                    f"parts, {losses[1]:.6g} and {losses[2]:.6g}. Return a mean over one unit from "
                    f"compute_loss, and do not couple rows; or {_ASK}"
                )
            if count_alike(window, found):
                return found
    return found


def count_alike(window: Sequence[Batch], units: Sequence[Unit]) -> bool:
    """Whether several units have the same number in every micro-batch."""
    return all(len({_count(unit, batch) for unit in units}) == 1 for batch in window)


def refuse_ambiguous(units: Sequence[Unit]) -> None:
    """Refuse a loss of which the values do not tell the unit.

    Raises:
        ConfigError: Always.
    """
    names = ", ".join(unit.name for unit in units) or "none fits on all ranks"
    raise ConfigError(
        f"what the loss is a mean over cannot be told from the first window ({names}): {_ASK}"
    )


def _count(unit: Unit, batch: Batch) -> float | None:
    try:
        return float(unit.count(batch))
    except StepError:
        return None


def prove_unit(trainer: Any, window: Sequence[Batch], unit: Unit) -> None:
    """Compare two cuts of a window: as it came, and each micro-batch in two, trimmed of padding.

    Args:
        trainer: Its loss is computed three times for each cut.
        window: Micro-batches; those of one row cannot be cut.
        unit: What the loss should be a mean over.

    Raises:
        StepError: The losses differ by more than rounding explains, or the forward leaves
            statistics in the model.
        ConfigError: No micro-batch has several rows.
    """
    _refuse_moving_buffers(trainer, window[0])
    cuts = [(batch, cut) for batch in window for cut in _cuts(batch, paired=unit.paired)[:1]]
    if not cuts:
        raise ConfigError(
            "prove=True cuts micro-batches in two, but those of the first window have one row "
            "each: prove with a larger per_device_train_batch_size; the step does not depend on it"
        )
    for batch, cut in cuts:
        losses, noise = _losses(trainer, batch, cut, paired=unit.paired, trim=True)
        if not _explains(unit, batch, cut, losses, noise, trim=True):
            raise StepError(
                f"the loss of {num_rows(batch)} rows, {losses[0]:.8g}, is not the mean of its "
                f"parts', {losses[1]:.8g} and {losses[2]:.8g}, over their {unit.name}: the model "
                "attends to padding or couples the rows of a micro-batch, or the unit is another. "
                "Find out which with `samestep check`; sort rows by length, or pass unit=..."
            )


def _refuse_moving_buffers(trainer: Any, batch: Batch) -> None:
    """Refuse statistics that a forward leaves in the model: each micro-batch moves the next one's.

    Caches that no checkpoint holds may change.
    """
    held = {
        f"{path}.{name}".lstrip("."): (module, name, buffer, buffer.clone())
        for path, module in trainer.model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }
    with undisturbed(trainer, training=True), torch.random.fork_rng():
        loss_of(trainer, batch)
    moved = []
    for path, (module, name, buffer, before) in held.items():
        now = module._buffers[name]
        if now is None or not torch.equal(now.nan_to_num(), before.nan_to_num()):
            moved.append(path)
        module._buffers[name] = buffer
        buffer.copy_(before)
    if moved:
        raise StepError(
            f"a forward moves {moved[0]} ({len(moved)} such buffers in all): what a micro-batch "
            "leaves there changes the next one's loss, so the step depends on the cut. Freeze "
            "these statistics, or take a model without them"
        )


def _cuts(batch: Batch, *, paired: bool) -> list[Cut]:
    """Some ways to divide the rows, or the pairs, of a batch in two."""
    units = num_examples(batch, paired=paired)
    places = sorted({1, units // 2, units - 1} - {0, units}) if units > 1 else []
    return [(list(range(at)), list(range(at, units))) for at in places]


def select_rows(batch: Batch, rows: Sequence[int], *, paired: bool) -> dict[str, Any]:
    """A batch of some rows, or some pairs, of a batch."""
    half = num_pairs(batch)
    stacked = paired and stacks_pairs(batch)
    chosen = [*rows, *(row + half for row in rows)] if stacked else list(rows)
    held = row_tensors(batch)
    return {name: held[name][chosen] if name in held else value for name, value in batch.items()}


def _trim(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch without the columns that are padding in every row."""
    mask = batch.get("attention_mask")
    ids = batch.get("input_ids")
    if not (isinstance(mask, Tensor) and isinstance(ids, Tensor) and mask.shape == ids.shape):
        return batch
    columns = (mask != 0).any(0)
    return {
        name: value[:, columns]
        if isinstance(value, Tensor) and value.dim() >= 2 and value.shape[:2] == ids.shape
        else value
        for name, value in batch.items()
    }


def _parts(batch: Batch, cut: Cut, *, paired: bool, trim: bool) -> list[dict[str, Any]]:
    parts = [select_rows(batch, rows, paired=paired) for rows in cut]
    return [dict(batch), *(_trim(part) if trim else part for part in parts)]


def _losses(
    trainer: Any, batch: Batch, cut: Cut, *, paired: bool, trim: bool
) -> tuple[list[float], float]:
    """The losses of a batch and of its two parts, and their relative noise."""
    parts = _parts(batch, cut, paired=paired, trim=trim)
    with undisturbed(trainer), torch.random.fork_rng():

        def run() -> list[Tensor]:
            return [loss_of(trainer, part) for part in parts]

        losses = [float(loss) for loss in run()]
        noise = [own for own, loss in zip(rounding_noise(run), losses, strict=True) if loss == loss]
    return losses, max(noise, default=0.0)


def loss_of(
    trainer: Any, part: Batch, *, balanced: bool = False, with_graph: bool = False
) -> Tensor:
    """The loss of a batch by itself, without the wrapper that ranks exchange through.

    Args:
        trainer: Its model is run as it is.
        part: The batch.
        balanced: Whether a router loss that is one of the window is in it.
        with_graph: Whether it can be differentiated.
    """
    inputs = trainer._prepare_inputs(dict(part))
    balance = None if balanced else trainer._samestep.balance
    apart = balance.left_out() if balance else nullcontext()
    with torch.set_grad_enabled(with_graph), trainer.compute_loss_context_manager(), apart:
        try:
            loss: Tensor = trainer.compute_loss(trainer.model, inputs).mean()
        except TypeError as error:
            raise ConfigError(
                f"the loss needs more than its micro-batch: {error}. exact() does not pass "
                "num_items_in_batch: return the mean of the micro-batch where it is None"
            ) from error
    return loss


def _explains(
    unit: Unit, batch: Batch, cut: Cut, losses: Sequence[float], noise: float, *, trim: bool
) -> bool:
    parts = _parts(batch, cut, paired=unit.paired, trim=trim)
    whole, first, second = (_count(unit, part) for part in parts)
    if whole is None or first is None or second is None:
        return False
    if whole == 0 or whole != first + second:
        return False
    if not (first and second) and not unit.masks:
        return False
    # A part without any unit weighs nothing, whatever its own loss is: 0, or a NaN.
    parts_of = [(own, loss) for own, loss in zip((first, second), losses[1:], strict=True) if own]
    mean = sum(own * loss for own, loss in parts_of) / whole
    largest = max(abs(loss) for loss in (losses[0], *(loss for _, loss in parts_of)))
    return abs(losses[0] - mean) <= FACTOR * noise * largest


@contextmanager
def undisturbed(trainer: Any, *, training: bool = False) -> Iterator[None]:
    """Leave nothing behind of losses that are computed: no metrics, totals, mode.

    Args:
        trainer: What it holds by name, and its metrics, are put back.
        training: The model's mode within the block.
    """
    model = trainer.model
    held, was_training = dict(vars(trainer)), model.training
    for name in METRICS:
        if name in held:
            setattr(trainer, name, copy.deepcopy(held[name]))
    model.train(training)
    try:
        yield
    finally:
        model.train(was_training)
        vars(trainer).update(held)
