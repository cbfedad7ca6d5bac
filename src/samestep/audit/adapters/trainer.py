"""A factory of `transformers.Trainer`, or of any trainer derived from it, as a subject."""

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from samestep.audit.adapters.batches import (
    CollatorPadding,
    count_examples,
    infer_padding,
    possible_denominators,
)
from samestep.audit.adapters.instrument import (
    end_step,
    force_float64,
    read_weights,
    scalars_of,
    scale_gradients,
    without_noise,
)
from samestep.audit.adapters.knobs import NO_KNOBS, Knobs
from samestep.audit.adapters.trainer_data import (
    MISSING_FOR_ROLLOUTS,
    AuditCollator,
    Rollouts,
    change_batch,
    generates_rows,
    is_stream,
    missing_of,
    number_of_rows,
    select_evaluation_rows,
    select_rows,
    stand_in_for,
)
from samestep.audit.adapters.trainer_loader import DealsRows, deal_in_order, recognise_dealt
from samestep.audit.adapters.trainer_observe import install_optimizer, observe_trainer, only_metrics
from samestep.audit.adapters.trainer_setup import (
    apart,
    check_signature,
    copied_tensors,
    describe_error,
    make_trainer,
    networks_of,
    padding_side,
    padding_token,
    restore,
    shifts_labels,
    strip_trainer,
    suppress_output,
    take_rows_in_order,
)
from samestep.audit.adapters.watch import StepWatch
from samestep.audit.subject import (
    DEFAULT_SETTINGS,
    Capability,
    Denominator,
    ExampleCounts,
    Observation,
    RunSettings,
    Side,
    Split,
)
from samestep.errors import CheckError
from samestep.utils.random_numbers import seed_all

EXAMPLES = 8
"""Examples of the effective batch, if the trainer has as many."""

_NATIVE = replace(DEFAULT_SETTINGS, dtype=None)


class TrainerSubject(DealsRows):
    """Runs a trainer on its own first rows; see `samestep.audit.subject.Subject`.

    Each run makes a new trainer, puts the first one's initial weights into it, and trains for one
    epoch over a data set that holds one effective batch.

    Args:
        factory: ``make_trainer(*, per_device_train_batch_size, gradient_accumulation_steps)``.
        name: For the report.
        knobs: Further keywords of the factory that may not change the step.

    Raises:
        CheckError: The factory raises, does not return a trainer, does not pass the sizes on, or
            its data hold fewer than four rows.
    """

    uniform = True
    clears = True
    terms: tuple[str, ...] = ()

    def __init__(self, factory: Callable[..., Any], *, name: str, knobs: Knobs = NO_KNOBS) -> None:
        check_signature(factory, name=name)
        self.factory = factory
        self._knobs, self.knobs = knobs, knobs.values
        self.rows_per_example = 1
        self._slowest = 0.0
        self._padding: CollatorPadding | None = None
        # Each would make a trainer anew, and a diagnosis reads them again and again.
        self._denominators: dict[
            tuple[tuple[int, ...], RunSettings], Mapping[str, Denominator]
        ] = {}
        self._shapes: dict[tuple[int, ...], tuple[int, int] | None] = {}
        trainer = self._make_first(name)
        kinds = f"{type(trainer).__name__}, {type(trainer.model).__name__}"
        rows = self.rows_per_example
        self.name = f"{name} ({kinds}{f', {rows} rows an example' if rows > 1 else ''})"
        self._singles = self._batches([(index,) for index in range(self.size)])
        with self._fresh_trainer(((0,),), _NATIVE, accumulation=1) as (fresh, _):
            self._shifts = shifts_labels(fresh, self._singles[0])
        self._padding = self._infer_padding()

    def _make_first(self, name: str) -> Any:
        """The first trainer; finds how few rows it takes at once, and keeps its weights.

        Some trainers refuse micro-batches of one row: they compare rows of one another. Then two
        neighbouring rows, or four, or eight, are what the audit calls an example.
        """
        errors = []
        for rows in (1, 2, 4, 8):
            self.rows_per_example = rows
            try:
                with suppress_output():
                    trainer = make_trainer(self.factory, rows, accumulation=1)
                self._learn(trainer, name)
                self.run(((0,),), _NATIVE)
            except Exception as error:  # the trainer is the user's code: anything may come
                errors.append(error)
            else:
                return trainer
        texts = [
            str(error) if isinstance(error, CheckError) else describe_error(error)
            for error in errors
        ]
        # The first error is about single rows, a later one about several.
        later = [text for text in texts[1:] if text != texts[0] and "too few to cut" not in text]
        also = f"; with several rows at once: {later[-1]}" if later else ""
        own = isinstance(errors[0], CheckError)
        prefix = "" if own else f"{name} could not be run: "
        raise CheckError(f"{prefix}{texts[0]}{also}") from errors[0]

    def _learn(self, trainer: Any, name: str) -> None:
        """Keep of the first trainer what all runs share: its weights, its data, its habits."""
        if trainer.train_dataset is None:
            raise CheckError(f"{name}: the trainer has no train_dataset")
        rows = self.rows_per_example
        self._data = trainer.train_dataset
        self._rollouts = Rollouts(trainer, EXAMPLES * rows) if generates_rows(trainer) else None
        if self._rollouts is not None:
            self._data = self._rollouts.dataset()
        held = number_of_rows(self._data, EXAMPLES * rows) // rows
        self.size = min(held, EXAMPLES) // 2 * 2  # an even number is cut into equal parts
        if self.size < 4:
            raise CheckError(
                f"{name}: {held * rows} rows of training data are too few to cut: give "
                f"{4 * rows} or more, of different lengths"
            )
        self._initial = copied_tensors(trainer.model)
        self._even = bool(trainer.accelerator.even_batches)
        self._stream = is_stream(self._data)
        self._padding_side = padding_side(trainer)
        self._padding_token = padding_token(trainer)

    def _infer_padding(self) -> CollatorPadding | None:
        """How the trainer's own collator pads; None if it cannot be seen."""
        counts = self.example_counts()
        if counts is None or self.rows_per_example > 1 or self._rollouts is not None:
            return None
        by_length = sorted(range(self.size), key=lambda index: counts[index].length)
        short, long = by_length[0], by_length[-1]
        return infer_padding(self._singles[short], self._batch((long, short)))

    def missing(self) -> Mapping[Capability, str]:
        """What a trainer, or this one's batches, cannot do."""
        return self._missing

    @functools.cached_property
    def _missing(self) -> Mapping[Capability, str]:
        reasons: dict[Capability, str] = {
            "packing": "a trainer packs its data when it is made; compare two factories instead",
            "terms": "a trainer does not expose its loss terms",
        }
        if not self.knobs:
            reasons["knobs"] = "the factory has no knobs = {name: (values, ...)} beside it"
        if self._rollouts is not None:
            return {**reasons, **MISSING_FOR_ROLLOUTS}
        if self.rows_per_example > 1:
            reasons["loader"] = "the trainer takes no single rows, of which a loader may leave some"
        batch = self._batch((0, 1))
        return {**reasons, **missing_of(batch, self.rows_per_example, stream=self._stream)}

    def example_counts(self) -> Sequence[ExampleCounts] | None:
        """From ``labels`` of each example's own batch."""
        if self._rollouts is not None:
            counts: Sequence[ExampleCounts] = self._rollouts.example_counts()
            return counts
        return count_examples(self._singles, shifts=self._shifts, padding_counts=True)

    def padding_sides(self) -> tuple[Side, ...]:
        """The side that the trainer's own collator pads, or else its tokenizer."""
        return (self._padding_side if self._padding is None else self._padding.side,)

    def denominators(
        self, micro_batch: tuple[int, ...], settings: RunSettings = DEFAULT_SETTINGS
    ) -> Mapping[str, Denominator]:
        """Of every tensor of the batch."""
        if (key := (micro_batch, settings)) not in self._denominators:
            self._denominators[key] = possible_denominators(self._batch(micro_batch, settings))
        return self._denominators[key]

    def batch_shape(self, micro_batch: tuple[int, ...]) -> tuple[int, int] | None:
        """That of ``input_ids``."""
        if micro_batch not in self._shapes:
            ids = self._batch(micro_batch).get("input_ids")
            rows = isinstance(ids, Tensor) and ids.dim() == 2
            self._shapes[micro_batch] = (ids.shape[0], ids.shape[1]) if rows else None
        return self._shapes[micro_batch]

    def run(self, split: Split, settings: RunSettings = DEFAULT_SETTINGS) -> Observation:
        """One update of a new trainer."""
        before = settings.steps_before
        return self._train(
            split * (1 + before),
            settings,
            accumulation=settings.window or len(split),
            updates=1 + before,
        )

    def run_as_steps(
        self, split: Split, settings: RunSettings = DEFAULT_SETTINGS
    ) -> Observation | None:
        """One update for each micro-batch."""
        return self._train(split, settings, accumulation=1, updates=len(split))

    def evaluate(
        self,
        batch_size: int,
        settings: RunSettings = DEFAULT_SETTINGS,
        *,
        examples: Sequence[int] | None = None,
    ) -> dict[str, float]:
        """The trainer's own evaluation of its evaluation data, or else of its training data."""
        whole = (tuple(range(self.size)),)
        with self._fresh_trainer(whole, settings, accumulation=1) as (trainer, collator):
            if examples is not None:
                rows = self._rows(examples)
                trainer.eval_dataset = select_evaluation_rows(trainer.eval_dataset, rows)
                collator.start(rows)
            return self._evaluate(trainer, batch_size, seed=settings.seed)

    def _train(
        self,
        split: Split,
        settings: RunSettings,
        *,
        accumulation: int,
        updates: int = 1,
        all_rows: Sequence[int] | None = None,
        dealt: list[tuple[int | None, ...]] | None = None,
    ) -> Observation:
        """Some updates of a new trainer; ``dealt`` gets what its own loader deals, if that does."""
        start = time.perf_counter()
        with self._fresh_trainer(
            split,
            settings,
            accumulation=accumulation,
            updates=updates,
            all_rows=all_rows,
            dealt=dealt is not None,
        ) as (trainer, collator):
            if settings.evaluate_first:
                self._evaluate(trainer, 2, seed=settings.seed)
            optimizer = install_optimizer(trainer)
            collator.start(collator.rows)
            seed_all(settings.seed)
            watch, initial = StepWatch(trainer.model, moves=settings.watch_moves), self._initial

            def begin_last() -> None:
                nonlocal initial
                initial = copied_tensors(trainer.model)
                end_step(trainer.model, updates=False, clears=settings.clear_between)
                watch.restart()
                seed_all(settings.seed)

            optimizer.skip(settings.steps_before, then=begin_last)
            with scale_gradients(trainer.model, settings.gradient_scale), watch.on():
                trainer.train()
            if dealt is not None:
                dealt.extend(recognise_dealt(trainer, collator))
            if _changes_batches(settings) and not collator.collated:
                raise CheckError("the trainer does not use its data_collator")
            observation = replace(
                observe_trainer(trainer, optimizer, initial=initial),
                left=watch.left(),
                stepped=True,
                moves=tuple(watch.moves),
                draws=watch.draws,
            )
            self._slowest = max(self._slowest, time.perf_counter() - start)
            if all_rows is None:
                return observation
            return replace(observation, weights_after=read_weights(trainer.model))

    def _evaluate(self, trainer: Any, batch_size: int, *, seed: int) -> dict[str, float]:
        trainer.args.per_device_eval_batch_size = batch_size * self.rows_per_example
        seed_all(seed)
        return only_metrics(scalars_of(trainer.evaluate()))

    def _rows(self, micro_batch: Sequence[int]) -> list[int]:
        """The rows of the trainer's data that these examples are."""
        rows = self.rows_per_example
        return [row + index * rows for index in micro_batch for row in range(rows)]

    @contextlib.contextmanager
    def _fresh_trainer(
        self,
        split: Sequence[Sequence[int]],
        settings: RunSettings,
        *,
        accumulation: int,
        updates: int = 1,
        all_rows: Sequence[int] | None = None,
        dealt: bool = False,
    ) -> Iterator[tuple[Any, AuditCollator]]:
        """A new trainer over the examples of a split, reduced to its step, at the initial weights.

        Args:
            split: The micro-batches; of several ranks, this one's.
            settings: Of the run.
            accumulation: Micro-batches of a full window.
            updates: Windows.
            all_rows: The rows of all ranks, in the order in which they are dealt out.
            dealt: The trainer's own loader deals the rows.
        """
        order = [row for micro_batch in split for row in self._rows(micro_batch)]
        with contextlib.ExitStack() as stack:
            stack.enter_context(apart())
            seed_all(settings.seed)
            batch_size = len(split[0]) * self.rows_per_example
            stack.enter_context(self._knobs.on_holder(settings.knob))
            factory = functools.partial(self.factory, **self._knobs.keyword(settings.knob))
            trainer = make_trainer(factory, batch_size, accumulation=accumulation)
            strip_trainer(trainer, stream_steps=updates, in_order=not dealt)
            held = trainer.train_dataset if trainer.eval_dataset is None else trainer.eval_dataset
            first_rows = range(self.size * self.rows_per_example)
            trainer.eval_dataset = select_evaluation_rows(held, first_rows)
            trainer.train_dataset = select_rows(self._data, all_rows or order)
            if self._rollouts is not None:
                self._rollouts.feed(trainer, accumulation)

            def change(batch: Any, rows: Sequence[int]) -> Any:
                if self._rollouts is not None:
                    batch = self._rollouts.batch(rows, all_rows or order)
                return change_batch(
                    batch,
                    rows,
                    settings=settings,
                    rows_per_example=self.rows_per_example,
                    padding=self._padding,
                    padding_token=self._padding_token,
                )

            collator = AuditCollator(trainer.data_collator, change, rows=order)
            trainer.data_collator = stand_in_for(trainer.data_collator, collator)
            if not dealt:
                take_rows_in_order(trainer)
                deal_in_order(trainer)
            networks = networks_of(trainer)
            restore(trainer, settings, initial=self._initial)
            if not settings.dropout:
                trainer.neftune_noise_alpha = trainer.args.neftune_noise_alpha = None
                stack.enter_context(without_noise(networks))
            if settings.dtype == torch.float64:
                stack.enter_context(force_float64())
            if settings.model_context is not None:
                stack.enter_context(settings.model_context(trainer.model))
            yield trainer, collator

    def _batch(self, micro_batch: Sequence[int], settings: RunSettings = _NATIVE) -> Any:
        """The trainer's own batch of these examples."""
        return self._batches([micro_batch], settings)[0]

    def _batches(
        self, micro_batches: Sequence[Sequence[int]], settings: RunSettings = _NATIVE
    ) -> list[Any]:
        """Those of several micro-batches of one size, by one trainer."""
        with self._fresh_trainer(micro_batches, settings, accumulation=1) as (trainer, _):
            return list(itertools.islice(trainer.get_train_dataloader(), len(micro_batches)))


def _changes_batches(settings: RunSettings) -> bool:
    changed = settings.masked_examples or settings.altered_examples
    return bool(settings.extra_padding or changed or settings.alter_repeats)
