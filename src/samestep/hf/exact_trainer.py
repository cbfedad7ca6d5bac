"""A class before a trainer's own that makes its step exact: it scales means, and rewrites no loss.

A micro-batch's loss that is a mean is S_i / n_i. The trainer computes it as it always did; here it
is multiplied by n_i * ranks / N, with N counted over the window and the ranks before the first
backward. What remains is the sum of all S_i over N, however the window was cut.
"""

import logging
from contextlib import nullcontext
from typing import Any

import transformers

from samestep.engine.collectives import gather_results
from samestep.errors import ConfigError, StepError
from samestep.hf.dropout import KeyedDropout
from samestep.hf.evaluation import ExactEvaluation, metric_counts
from samestep.hf.proof import prove_unit, select_rows
from samestep.hf.refusals import is_complete, refuse_inexact
from samestep.hf.routers import RouterBalance
from samestep.hf.units import Batch, Unit, known_unit, library_classes, num_examples, unit_named
from samestep.hf.window import (
    State,
    UnitOption,
    backward_of,
    count_window,
    ignore_rows,
    rows_of_this_rank,
    trainer_of,
    unit_of,
    with_a_target,
    zero_loss,
)
from samestep.models.dropout import count_dropouts

log = logging.getLogger("samestep")

SWITCH = "loss_is_scaled_for_ga"
"""The attribute by which newer trainers leave a loss as it is; in older ones it is put back."""


class Exact(ExactEvaluation):
    """Put it before a trainer's class: ``class MyTrainer(Exact, Trainer)``.

    Attributes:
        samestep_unit: What the loss is a mean over, where it is not known: see `exact`.
        samestep_prove: Whether the first window is cut in two ways and compared: see `exact`.
        samestep_two_pass: Whether a router loss is taken over the window: see `exact`.
        samestep_key_dropout: Whether dropout draws by the row: see `exact`.
    """

    samestep_unit: UnitOption = None
    samestep_prove: bool = False
    samestep_two_pass: bool = False
    samestep_key_dropout: bool = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        _prepare(
            self,
            unit=type(self).samestep_unit,
            prove=self.samestep_prove,
            two_pass=self.samestep_two_pass,
            key_dropout=self.samestep_key_dropout,
        )

    def _get_num_items_in_batch(self, batch_samples: Any, device: Any) -> Any:
        """No count for the model and the loss: they take their own means."""
        parent: Any = super()
        if self._samestep.complete:
            return parent._get_num_items_in_batch(batch_samples, device)
        return None

    def get_batch_samples(self, *args: Any, **options: Any) -> Any:
        """Prefetch a window as the trainer does, and count it over the ranks."""
        parent: Any = super()
        batches, count = parent.get_batch_samples(*args, **options)
        state, trainer = self._samestep, trainer_of(self)
        if state.complete:
            return batches, count
        unit = unit_of(self, batches)
        if state.dropout:
            gather_results(lambda: state.dropout.check(batches))
        if state.unproved:
            state.unproved = False
            gather_results(lambda: prove_unit(trainer, batches, unit))
        repeats_only = False
        if batches and state.balance:
            keep = rows_of_this_rank(trainer.accelerator, batches[-1], paired=False)
            state.balance.count(batches, keep=keep)
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
            if hasattr(self, SWITCH):
                return parent.training_step(*args, **options)
            with backward_of(trainer_of(self).accelerator, lambda: state.scaled):
                parent.training_step(*args, **options)
            return state.scaled.detach()
        finally:
            state.in_step, state.scaled = False, None

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
        if state.dropout and trainer_of(self).model.training:
            state.dropout.set(inputs)
        if state.in_step or state.evaluated is not None:
            mode = "train" if trainer_of(self).model.training else "eval"
            counts = metric_counts(self, inputs)
            state.metrics[mode] += [counts] if counts else []
        if not state.in_step:
            return parent.compute_loss(model, inputs, return_outputs, None, **options)
        count = state.window.count()
        if not (count or (state.unit and state.unit.empty_is_zero)):
            inputs = with_a_target(inputs)
        with state.balance.in_step() if state.balance else nullcontext(_whole) as split:
            result = parent.compute_loss(model, inputs, return_outputs, None, **options)
            mean, share = split(result[0] if return_outputs else result)
        scaled = mean * state.window.factor() if count else zero_loss(mean, trainer_of(self).model)
        if share is not None:
            scaled = scaled + share * state.window.ranks
        state.scaled = scaled
        return (scaled, *result[1:]) if return_outputs else scaled


def _whole(loss: Any) -> tuple[Any, None]:
    """A loss without a router loss, in two parts."""
    return loss, None


def exact(
    trainer: Any,
    *,
    unit: UnitOption = None,
    prove: bool = False,
    two_pass: bool = False,
    key_dropout: bool = False,
) -> Any:
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
        two_pass: Whether to take a router loss of a mixture of experts over the whole window, by a
            first pass over it without gradients. Without it such a model is refused.
        key_dropout: Whether dropout draws by the row in place of the micro-batch, so that its masks
            do not depend on the cut. Every ``nn.Dropout`` of the model is replaced.

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
    _prepare(trainer, unit=unit, prove=prove, two_pass=two_pass, key_dropout=key_dropout)
    if not isinstance(trainer, Exact):
        kind: Any = type(trainer)
        trainer.__class__ = type(kind.__name__, (Exact, kind), {"__module__": __name__})
    return trainer


def _prepare(
    trainer: Any, *, unit: UnitOption, prove: bool, two_pass: bool, key_dropout: bool
) -> None:
    """Refuse what cannot be exact, then find what is known of a trainer before its data come."""
    if not hasattr(transformers.Trainer, "get_batch_samples"):
        raise ConfigError(
            f"exact() needs transformers 4.46 or later, not {transformers.__version__}: earlier "
            "trainers take one micro-batch at a time, so nothing can be counted over a window "
            "before its first backward"
        )
    refuse_inexact(trainer, two_pass=two_pass, key_dropout=key_dropout)
    complete = is_complete(trainer)
    found = known_unit(trainer) if unit is None and not complete else None
    trainer._samestep = State(
        unit=unit_named(unit) if unit is not None else found,
        complete=complete,
        unproved=prove and not complete,
        balance=RouterBalance(trainer) if two_pass else None,
        dropout=KeyedDropout(trainer) if key_dropout else None,
    )
    drops = count_dropouts(trainer.model)
    if drops and not key_dropout and not complete:
        log.warning(
            "%d dropout modules draw by the micro-batch: their masks, and only these, change with "
            "the cut. exact(trainer, key_dropout=True) lets them draw by the row",
            drops,
        )
    if not complete and hasattr(transformers.Trainer, SWITCH):
        trainer.loss_is_scaled_for_ga = True


def _without_repeats(trainer: Any, batch: Batch, unit: Unit) -> tuple[Batch, bool]:
    """A micro-batch without the rows that fill up an epoch's last one; whether none is left."""
    keep = rows_of_this_rank(trainer.accelerator, batch, paired=unit.paired)
    if keep == num_examples(batch, paired=unit.paired):
        return batch, False
    if unit.masks:
        return ignore_rows(batch, keep), False
    if not keep:
        return batch, True
    if library_classes(trainer):  # TRL gathers rows: each rank must have as many
        raise StepError(
            f"this rank repeats pairs to fill an epoch's last micro-batch ({keep} are its own), "
            "and they would count twice: set dataloader_drop_last=True"
        )
    return select_rows(batch, range(keep), paired=unit.paired), False
