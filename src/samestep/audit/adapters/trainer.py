"""A factory of `transformers.Trainer`, or of any trainer derived from it, as a subject."""

import contextlib
import inspect
import math
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from transformers import Trainer

from samestep.audit.adapters.capture import scaled_gradients, shift_weights
from samestep.audit.adapters.loop import numbers, seed_all
from samestep.audit.adapters.training import (
    LEARNING_RATE,
    Collator,
    Recorder,
    is_stream,
    length,
    make_plain,
    networks,
    quiet,
    restrict,
    sequential,
    silenced,
    tensors,
    use_recorder,
    widen,
)
from samestep.audit.adapters.widened import widened
from samestep.audit.batches import Place, add_padding, alter, cast, counts_of, mask_targets
from samestep.audit.subject import PLAIN, Cut, Facts, Gradient, Observation, Setting
from samestep.errors import CheckError
from samestep.targets import IGNORE

EXAMPLES = 8
"""Examples of the effective batch, if the trainer has as many."""

SIZES = ("per_device_train_batch_size", "gradient_accumulation_steps")
"""What a factory is called with."""

RANKS = "trainers are run in one process"

NATIVE = replace(PLAIN, dtype=None)

OTHER_NUMBERS = ("grad_norm", "learning_rate", "epoch", "step", "total_flos")
"""Logged numbers that are no measure of the model, beside those of time."""


class TrainerSubject:
    """Runs a trainer on its own first rows; see `samestep.audit.subject.Subject`.

    Each run makes a new trainer, puts the first one's initial weights into it, and trains for one
    epoch over a data set that holds one effective batch.

    Args:
        factory: ``make_trainer(*, per_device_train_batch_size, gradient_accumulation_steps)``.
        name: For the report.

    Raises:
        CheckError: The factory raises, does not return a trainer, does not pass the sizes on, or
            its data hold fewer than four rows.
    """

    uniform = True
    terms: tuple[str, ...] = ()

    def __init__(self, factory: Callable[..., Any], *, name: str) -> None:
        parameters = inspect.signature(factory).parameters
        open_ended = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
        missing = [one for one in SIZES if one not in parameters and not open_ended]
        if missing:
            raise CheckError(f"{name}: make_trainer must take the keyword {' and '.join(missing)}")
        self.factory = factory
        self.rows = 1
        trainer = self._first(name)
        self.size = min(length(trainer.train_dataset, EXAMPLES * self.rows) // self.rows, EXAMPLES)
        if self.size < 4:
            raise CheckError(
                f"{name}: {self.size * self.rows} rows of training data are too few to cut: give "
                f"{4 * self.rows} or more, of different lengths"
            )
        kinds = f"{type(trainer).__name__}, {type(trainer.model).__name__}"
        grouped = f", {self.rows} rows an example" if self.rows > 1 else ""
        self.name = f"{name} ({kinds}{grouped})"
        self._stream = is_stream(trainer.train_dataset)
        self._side: Literal["right", "left"] = _padding_side(trainer)
        self._filler = _pad_id(trainer)
        self._shifts = bool(trainer._loss_shifts_labels)
        self._singles = [self._batch((index,)) for index in range(self.size)]

    def _first(self, name: str) -> Any:
        """The first trainer; finds how few rows it takes at once, and keeps its weights.

        Some trainers refuse micro-batches of one row: they compare rows of one another. Then two
        neighbouring rows, or four, are what the audit calls an example.
        """
        errors = []
        for rows in (1, 2, 4):
            self.rows = rows
            try:
                with quiet():
                    trainer = self._make(rows, 1)
                    if trainer.train_dataset is None:
                        raise CheckError(f"{name}: the trainer has no train_dataset")
                    self._initial = {
                        key: value.detach().clone() for key, value in tensors(trainer.model).items()
                    }
                self.run(((0,),), NATIVE)
            except Exception as error:  # the trainer is the user's code: anything may come
                errors.append(error)
            else:
                return trainer
        first = errors[0]
        if isinstance(first, CheckError):
            raise first
        raise CheckError(f"{name} could not be run: {located(first)}") from first

    def skips(self) -> Mapping[str, str]:
        """What a trainer, or this one's batches, cannot do."""
        reasons = {
            "packing": "a trainer packs its data when it is made; compare two factories instead",
            "terms": "a trainer does not expose its loss terms",
            "ranks": RANKS,
        }
        batch = self._batch((0, 1))
        rows = _rows(batch)
        if rows is None or rows % (2 * self.rows):
            reasons["padding"] = reasons["zero-target"] = (
                "the collator does not give each example a row of its own"
            )
        if not isinstance(batch.get("input_ids"), Tensor):
            reasons["padding"] = "batches have no 'input_ids' [rows, length]"
        if not _has_class_labels(batch):
            reasons["zero-target"] = "batches have no integer 'labels' to mask"
        if self._stream:
            reasons["short-window"] = "the training data are a stream, which has no last window"
        return reasons

    def facts(self) -> Sequence[Facts] | None:
        """From ``labels`` of each example's own batch."""
        found = []
        for batch in self._singles:
            labels = batch.get("labels") if isinstance(batch, Mapping) else None
            if not isinstance(labels, Tensor):
                return None
            valid = labels != IGNORE
            shifted = valid[..., 1:] if self._shifts and labels.dim() > 1 else valid
            ids = batch.get("input_ids")
            tokens = ids.numel() if isinstance(ids, Tensor) else labels.numel()
            found.append(Facts(int(shifted.sum()), int(valid.sum()), tokens))
        return found

    def padding_sides(self) -> tuple[Literal["right", "left"], ...]:
        """The side that the trainer's own tokenizer pads."""
        return (self._side,)

    def counts(
        self, micro: tuple[int, ...], setting: Setting = PLAIN
    ) -> Mapping[str, tuple[str, float]]:
        """Of every tensor of the batch."""
        return counts_of(self._batch(micro, setting))

    def shape(self, micro: tuple[int, ...]) -> tuple[int, int] | None:
        """That of ``input_ids``."""
        ids = self._batch(micro).get("input_ids")
        return (ids.shape[0], ids.shape[1]) if isinstance(ids, Tensor) and ids.dim() == 2 else None

    def run(self, cut: Cut, setting: Setting = PLAIN) -> Observation:
        """One update of a new trainer."""
        return self._train(cut, setting, accumulation=setting.window or len(cut), updates=1)

    def chained(self, cut: Cut, setting: Setting = PLAIN) -> Observation | None:
        """One update for each micro-batch."""
        return self._train(cut, setting, accumulation=1, updates=len(cut))

    def run_ranks(self, shares: Sequence[Cut], setting: Setting = PLAIN) -> list[Observation]:
        """Not done: trainers are run in one process."""
        raise CheckError(RANKS)

    def sharded(self, examples: int, world: int) -> Sequence[tuple[int, ...]] | None:
        """Not told."""
        return None

    def evaluate(
        self, batch_size: int, setting: Setting = PLAIN, examples: Sequence[int] | None = None
    ) -> dict[str, float]:
        """The trainer's own evaluation of its evaluation data, or else of its training data."""
        whole = (tuple(range(self.size)),)
        with self._ready(whole, setting, accumulation=1, updates=1) as trainer:
            if examples is not None:
                rows = [row for index in examples for row in self._rows_of(index)]
                trainer.eval_dataset = _of_each(trainer.eval_dataset, rows)
            return self._evaluate(trainer, batch_size)

    def _train(self, cut: Cut, setting: Setting, *, accumulation: int, updates: int) -> Observation:
        with self._ready(cut, setting, accumulation=accumulation, updates=updates) as trainer:
            if setting.evaluate_first:
                self._evaluate(trainer, 2)
            recorder = use_recorder(trainer)
            collator = trainer.data_collator
            collator.seen = 0
            seed_all(setting.seed)
            with scaled_gradients(trainer.model, setting.scale):
                trainer.train()
            changed = setting.padding or setting.masked or setting.altered or setting.twins
            if changed and not collator.seen:
                raise CheckError("the trainer does not use its data_collator")
            return self._observed(trainer, recorder)

    def _observed(self, trainer: Any, recorder: Recorder) -> Observation:
        if not recorder.updates:
            raise CheckError("the trainer ended without an update by its optimizer")
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        reported = numbers(logs[-1]) if logs else {}
        precision = torch.finfo(next(trainer.model.parameters()).dtype).eps
        gradient = recorder.gradient
        moved = self._moved(trainer, gradient)
        if moved is not None:  # something else than the optimizer changed the weights
            size = math.hypot(*(float(one.norm()) for one in moved.values()))
            weights = math.hypot(*(float(self._initial[one].norm()) for one in moved))
            precision, gradient = precision * weights / max(LEARNING_RATE * size, 1e-300), moved
        return Observation(
            gradient,
            reported=_measures(reported),
            rounding=precision,
            updates=recorder.updates if moved is None else 0,
        )

    def _moved(self, trainer: Any, gradient: Gradient) -> Gradient | None:
        """What the weights moved along, if that is not what the optimizer was given."""
        moved, other = {}, False
        for name, weight in trainer.model.named_parameters():
            if not weight.requires_grad:
                continue
            before = self._initial[name].to(weight.dtype)
            moved[name] = ((before - weight.detach()) / LEARNING_RATE).to("cpu", torch.float64)
            given = gradient.get(name, torch.zeros_like(moved[name]))
            rounding = torch.finfo(weight.dtype).eps * float(before.norm()) / LEARNING_RATE
            error = float((moved[name] - given).norm())
            other = other or error > 1e-3 * float(given.norm()) + 10 * rounding
        return moved if other else None

    def _evaluate(self, trainer: Any, batch_size: int) -> dict[str, float]:
        trainer.args.per_device_eval_batch_size = batch_size * self.rows
        seed_all(0)
        return _measures(numbers(trainer.evaluate()))

    def _rows_of(self, index: int) -> range:
        return range(index * self.rows, (index + 1) * self.rows)

    @contextlib.contextmanager
    def _ready(
        self, cut: Sequence[Sequence[int]], setting: Setting, *, accumulation: int, updates: int
    ) -> Iterator[Any]:
        """A new trainer over the examples of a cut, made plain, at the initial weights."""
        wide = widened() if setting.dtype == torch.float64 else contextlib.nullcontext()
        order = [row for micro in cut for index in micro for row in self._rows_of(index)]
        with quiet():
            seed_all(setting.seed)
            trainer = self._make(len(cut[0]) * self.rows, accumulation)
            make_plain(trainer, stream_steps=updates)
            trainer.eval_dataset = _evaluation_rows(trainer, EXAMPLES * self.rows)
            trainer.train_dataset = restrict(trainer.train_dataset, order)
            trainer.data_collator = Collator(
                trainer.data_collator,
                lambda batch, number, seen: self._change(
                    batch, order[seen : seen + number], setting
                ),
            )
            sequential(trainer)
            held = networks(trainer)
            self._restore(trainer, setting)
            silence = silenced([] if setting.dropout else held)
            with silence, wide:
                yield trainer

    def _make(self, batch_size: int, accumulation: int) -> Any:
        """A new trainer of the user's."""
        # Both are shared by all trainers of a process, and outlive one that failed.
        AcceleratorState._reset_state()
        GradientState._reset_state()
        sizes = dict(zip(SIZES, (batch_size, accumulation), strict=True))
        try:
            # Who watches the types of a run is not to see those of the untouched model.
            with _disable_current_modes():
                trainer = self.factory(**sizes)
        except Exception as error:
            raise CheckError(f"make_trainer failed: {located(error)}") from error
        if not isinstance(trainer, Trainer):
            raise CheckError(
                f"make_trainer returned a {type(trainer).__name__}, not a transformers.Trainer or "
                "a trainer derived from it; audit other loops by model, examples, collate and step"
            )
        ignored = [name for name, size in sizes.items() if getattr(trainer.args, name) != size]
        if ignored:
            raise CheckError(
                f"make_trainer must pass its arguments on to the trainer: {', '.join(ignored)} "
                "was not"
            )
        return trainer

    def _restore(self, trainer: Any, setting: Setting) -> None:
        """The initial weights, in a type; other networks keep theirs, in the type too."""
        dtype = setting.dtype
        if dtype is not None:
            trainer.accelerator.native_amp = False
            for network in networks(trainer):
                widen(network) if dtype == torch.float64 else network.to(dtype)
        with torch.no_grad():
            for name, tensor in tensors(trainer.model).items():
                first = self._initial[name]
                floating = dtype is not None and first.is_floating_point()
                tensor.data = first.to(tensor.device, dtype if floating else first.dtype).clone()
                tensor.grad = None
        if setting.shift is not None:
            shift_weights(trainer.model, setting.shift.by)

    def _batch(self, micro: Sequence[int], setting: Setting = NATIVE) -> Any:
        """The trainer's own batch of these examples."""
        with self._ready((micro,), setting, accumulation=1, updates=1) as trainer:
            return next(iter(trainer.get_train_dataloader()))

    def _change(self, batch: Any, rows: Sequence[int], setting: Setting) -> Any:
        """A batch under a setting; the trainer's data hold its examples in these rows."""
        altered = [at for at, row in enumerate(rows) if row // self.rows in setting.altered]
        if setting.twins:
            altered += [at for at, row in enumerate(rows) if row in rows[:at]]
        masked = [at for at, row in enumerate(rows) if row // self.rows in setting.masked]
        if altered:
            batch = alter(batch, _where(batch, altered, len(rows)))
        if masked:
            batch = mask_targets(batch, _where(batch, masked, len(rows)))
        if setting.padding:
            filler = setting.filler or self._filler
            batch = add_padding(batch, setting.padding, side=setting.side, filler=filler)
        return batch if setting.dtype is None else cast(batch, setting.dtype)


def _where(batch: Any, chosen: Sequence[int], number: int) -> list[Place]:
    """The places of some of a batch's examples: a row each, or a row in each of several parts."""
    rows = _rows(batch)
    if rows is None or rows % number:
        raise CheckError("the collator does not give each example rows of its own")
    return [(part + at,) for at in chosen for part in range(0, rows, number)]


def located(error: BaseException) -> str:
    """An error with its type, its text, and the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def _padding_side(trainer: Any) -> Literal["right", "left"]:
    side = getattr(trainer.processing_class, "padding_side", "right")
    return "left" if side == "left" else "right"


def _pad_id(trainer: Any) -> int:
    """The token that the trainer's own batches are padded with, as far as it says."""
    config = getattr(trainer.model, "config", None)
    for owner in (trainer.processing_class, config):
        found = getattr(owner, "pad_token_id", None)
        if isinstance(found, int):
            return found
    return 0


def _evaluation_rows(trainer: Any, most: int) -> Any:
    """The first rows of the evaluation data, or else of the training data."""
    given = trainer.train_dataset if trainer.eval_dataset is None else trainer.eval_dataset
    return _of_each(given, range(most))


def _of_each(data: Any, rows: Sequence[int]) -> Any:
    """These rows of a data set, or of each of several by name, as far as there are as many."""
    if isinstance(data, Mapping):
        return {key: _of_each(one, rows) for key, one in data.items()}
    held = length(data, max(rows) + 1)
    return restrict(data, [row for row in rows if row < held])


def _rows(batch: Any) -> int | None:
    if not isinstance(batch, Mapping):
        return None
    sizes = {
        value.shape[0] for value in batch.values() if isinstance(value, Tensor) and value.dim()
    }
    return sizes.pop() if len(sizes) == 1 else None


def _has_class_labels(batch: Any) -> bool:
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    return isinstance(labels, Tensor) and not labels.is_floating_point()


def _measures(values: Mapping[str, float]) -> dict[str, float]:
    """Numbers that say something of the model: not of time, of progress, or of the optimizer."""
    timed = ("_runtime", "_per_second", "_time")
    return {
        name: value
        for name, value in values.items()
        if not name.endswith(timed) and name.removeprefix("eval_") not in OTHER_NUMBERS
    }
