"""A class before a trainer's own that makes its step exact: it scales means, and rewrites no loss.

A micro-batch's loss that is a mean is S_i / n_i. The trainer computes it as it always did; here it
is multiplied by n_i * ranks / N, with N counted over the window and the ranks before the first
backward. What remains is the sum of all S_i over N, however the window was cut.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import transformers

from samestep.engine.collectives import gather_results
from samestep.errors import ConfigError
from samestep.hf.metrics import average_metrics, metric_counts
from samestep.hf.proof import infer_unit, loss_of, prove_unit, select_rows
from samestep.hf.refusals import is_complete, refuse_inexact
from samestep.hf.units import (
    NAMED,
    Batch,
    Unit,
    known_unit,
    library_classes,
    num_examples,
    unit_named,
)
from samestep.hf.window import (
    Window,
    count_window,
    ignore_rows,
    rows_of_this_rank,
    with_a_target,
    zero_loss,
)

UnitOption = str | Callable[[Batch], Any] | None


@dataclass
class _State:
    """What is remembered of a trainer between its hooks."""

    unit: Unit | None
    complete: bool
    unproved: bool
    window: Window = field(default_factory=Window)
    in_step: bool = False
    evaluated: list[tuple[float, float]] | None = None
    metrics: dict[str, list[dict[str, float]]] = field(
        default_factory=lambda: {"train": [], "eval": []}
    )


class Exact:
    """Put it before a trainer's class: ``class MyTrainer(Exact, Trainer)``.

    Attributes:
        samestep_unit: What the loss is a mean over, where it is not known: see `exact`.
        samestep_prove: Whether the first window is cut in two ways and compared: see `exact`.
    """

    samestep_unit: UnitOption = None
    samestep_prove: bool = False
    _samestep: _State

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        _prepare(self, unit=type(self).samestep_unit, prove=self.samestep_prove)

    def _get_num_items_in_batch(self, batch_samples: Any, device: Any) -> Any:
        """No count for the model and the loss: they take their own means."""
        parent: Any = super()
        if self._samestep.complete:
            return parent._get_num_items_in_batch(batch_samples, device)
        return None

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Prefetch a window as the trainer does, and count it over the ranks."""
        parent: Any = super()
        batches, count = parent.get_batch_samples(epoch_iterator, num_batches, device)
        state, trainer = self._samestep, _any(self)
        if state.complete:
            return batches, count
        unit = _unit_of(self, batches)
        if state.unproved:
            state.unproved = False
            gather_results(lambda: prove_unit(trainer, batches, unit))
        repeats_only = False
        if batches:
            batches[-1], repeats_only = _without_repeats(trainer, batches[-1], unit)
        ranks = trainer.accelerator.num_processes
        counted = batches[:-1] if repeats_only else batches
        state.window = count_window(counted, unit, ranks=ranks)
        if repeats_only:
            state.window.counts = [*state.window.counts, 0]
        return batches, None

    def training_step(self, *args: Any, **options: Any) -> Any:
        """The trainer's own; within it losses are scaled."""
        parent: Any = super()
        state = self._samestep
        if state.complete:
            return parent.training_step(*args, **options)
        state.window.advance()
        state.in_step = True
        try:
            return parent.training_step(*args, **options)
        finally:
            state.in_step = False

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **options: Any,
    ) -> Any:
        """The trainer's own mean; in a step, its share of the window."""
        parent: Any = super()
        state = self._samestep
        if state.complete:
            return parent.compute_loss(model, inputs, return_outputs, num_items_in_batch, **options)
        if state.in_step or state.evaluated is not None:
            mode = "train" if _any(self).model.training else "eval"
            counts = metric_counts(self, inputs)
            state.metrics[mode] += [counts] if counts else []
        if not state.in_step:
            return parent.compute_loss(model, inputs, return_outputs, None, **options)
        count = state.window.count()
        if not (count or (state.unit and state.unit.empty_is_zero)):
            inputs = with_a_target(inputs)
        result = parent.compute_loss(model, inputs, return_outputs, None, **options)
        loss = result[0] if return_outputs else result
        scaled = loss * state.window.factor() if count else zero_loss(loss, _any(self).model)
        return (scaled, *result[1:]) if return_outputs else scaled

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        """The trainer's own; the loss is kept with its count."""
        parent: Any = super()
        state, trainer = self._samestep, _any(self)
        if state.complete or state.evaluated is None or not _has_targets(trainer, inputs):
            return parent.prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        unit = _unit_of(self, [inputs])
        whole = inputs
        keep = rows_of_this_rank(trainer.accelerator, inputs, paired=unit.paired)
        partial = keep < num_examples(whole, paired=unit.paired)
        alone = select_rows(whole, range(keep), paired=unit.paired) if partial else whole
        if partial and unit.masks:
            inputs = ignore_rows(whole, keep)
        count = float(unit.count(alone)) if keep else 0.0
        found = parent.prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if found[0] is not None:
            loss = float(found[0].mean())
            if keep and partial and not unit.masks and not library_classes(trainer):
                loss = float(loss_of(trainer, alone))
            state.evaluated.append((loss * count if count else 0.0, count))
        return found

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """The trainer's own; its loss is the sum over all targets, divided once."""
        parent: Any = super()
        state = self._samestep
        arguments = (dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if state.complete:
            return parent.evaluation_loop(*arguments)
        outer, state.evaluated = state.evaluated, []
        try:
            output = parent.evaluation_loop(*arguments)
            parts = gather_results(lambda: _sums(state.evaluated or []))
        finally:
            state.evaluated = outer
        total, count = _sums(parts)
        if count and f"{metric_key_prefix}_loss" in output.metrics:
            output.metrics[f"{metric_key_prefix}_loss"] = total / count
        return output

    def log(self, logs: Any, *args: Any, **options: Any) -> None:
        """The trainer's own; metrics of micro-batches are averaged in their own units."""
        parent: Any = super()
        state = self._samestep
        mode = "train" if _any(self).model.training else "eval"
        average_metrics(self, mode, state.metrics[mode])
        state.metrics[mode] = []
        parent.log(logs, *args, **options)


def exact(trainer: Any, *, unit: UnitOption = None, prove: bool = False) -> Any:
    """Make the step of a `transformers.Trainer`, or of one of TRL, exact by construction.

    After it the step, the logged loss and the evaluation's loss depend on the effective batch
    alone, however it is cut into micro-batches, and on no last short one. The trainer computes its
    own loss; that is scaled. The cost is a count of the labels.

    Args:
        trainer: Before its training; its class is changed in place.
        unit: What its loss is a mean over: ``shifted-labels``, ``labels``, ``rows``, ``pairs``, or
            a function that counts it in a micro-batch. Known for the losses of the libraries, else
            found from the values of the first window.
        prove: Whether to compare the loss of the first window with those of its parts, without
            dropout: finds a wrong unit, coupled rows, and a model that attends to padding.

    Returns:
        The same trainer.

    Raises:
        ConfigError: No factor makes its step exact: every reason, each with what to do instead.
    """
    if not isinstance(trainer, transformers.Trainer):
        raise ConfigError(
            f"exact() takes a transformers.Trainer or a trainer derived from it, not "
            f"{type(trainer).__name__}; in a loop of your own use samestep.step"
        )
    _prepare(trainer, unit=unit, prove=prove)
    if not isinstance(trainer, Exact):
        kind: Any = type(trainer)
        trainer.__class__ = type(kind.__name__, (Exact, kind), {"__module__": __name__})
    return trainer


def _prepare(trainer: Any, *, unit: UnitOption, prove: bool) -> None:
    """Refuse what cannot be exact, then find what is known of a trainer before its data come."""
    if not hasattr(transformers.Trainer, "loss_is_scaled_for_ga"):
        raise ConfigError(
            f"exact() needs transformers 5.19 or later, not {transformers.__version__}: earlier "
            "trainers scale losses in ways that a class cannot switch off"
        )
    refuse_inexact(trainer)
    complete = is_complete(trainer)
    found = known_unit(trainer) if unit is None and not complete else None
    trainer._samestep = _State(
        unit=unit_named(unit) if unit is not None else found,
        complete=complete,
        unproved=prove and not complete,
    )
    if not complete:
        trainer.loss_is_scaled_for_ga = True


def _any(trainer: Exact) -> Any:
    """The same object, of which the trainer's own attributes can be asked."""
    return trainer


def _unit_of(trainer: Exact, batches: Sequence[Batch]) -> Unit:
    """The trainer's unit; found from the values of these batches where nothing tells it."""
    state = trainer._samestep
    if state.unit is None:
        names = gather_results(lambda: infer_unit(trainer, batches).name)
        if len({*names}) > 1:
            raise ConfigError(
                f"the ranks found different units ({', '.join(names)}): give exact(trainer, "
                "unit=...) the name of the unit or a function that counts it"
            )
        state.unit = NAMED[names[0]]
    return state.unit


def _without_repeats(trainer: Any, batch: Batch, unit: Unit) -> tuple[Batch, bool]:
    """A micro-batch without the rows that fill up an epoch's last one; whether none is left."""
    keep = rows_of_this_rank(trainer.accelerator, batch, paired=unit.paired)
    if keep == num_examples(batch, paired=unit.paired):
        return batch, False
    if unit.masks:
        return ignore_rows(batch, keep), False
    if keep and not library_classes(trainer):  # TRL gathers rows: each rank must have as many
        return select_rows(batch, range(keep), paired=unit.paired), False
    return batch, not keep


def _has_targets(trainer: Any, inputs: Batch) -> bool:
    if library_classes(trainer):
        return True
    return all(inputs.get(name) is not None for name in trainer.label_names)


def _sums(parts: Sequence[Sequence[float]]) -> tuple[float, float]:
    return sum(part[0] for part in parts), sum(part[1] for part in parts)
