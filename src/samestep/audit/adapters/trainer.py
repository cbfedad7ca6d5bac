"""A factory of `transformers.Trainer`, or of any trainer derived from it, as a subject."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from accelerate.state import PartialState
from torch import Tensor

from samestep.audit.adapters.altered import changed
from samestep.audit.adapters.capture import numbers, scaled_gradients, shift_weights, weights
from samestep.audit.adapters.determinism import seed_all
from samestep.audit.adapters.loop import PATIENCE
from samestep.audit.adapters.making import check_signature, located, make, pad_id, padding_side
from samestep.audit.adapters.rollouts import SKIPPED, Rollouts, generates
from samestep.audit.adapters.rows import evaluation_rows, is_stream, length, of_each, restrict
from samestep.audit.adapters.seen import measures, observed
from samestep.audit.adapters.trainer_facts import dealt_by_loader, facts_of_labels, skipped
from samestep.audit.adapters.training import (
    Collator,
    make_plain,
    networks,
    quiet,
    sequential,
    silenced,
    tensors,
    use_recorder,
    widen,
)
from samestep.audit.adapters.widened import widened
from samestep.audit.batches import Padding, padding_of
from samestep.audit.children import in_ranks
from samestep.audit.counting import counts_of
from samestep.audit.subject import PLAIN, Cut, Facts, Observation, Setting
from samestep.errors import CheckError

EXAMPLES = 8
"""Examples of the effective batch, if the trainer has as many."""

NATIVE = replace(PLAIN, dtype=None)


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
        check_signature(factory, name=name)
        self.factory = factory
        self.rows = 1
        self._slowest = 0.0
        self._padding: Padding | None = None
        # Each would make a trainer anew, and a diagnosis asks again and again.
        self._counts: dict[tuple[tuple[int, ...], Setting], Mapping[str, tuple[str, float]]] = {}
        self._shapes: dict[tuple[int, ...], tuple[int, int] | None] = {}
        trainer = self._first(name)
        kinds = f"{type(trainer).__name__}, {type(trainer.model).__name__}"
        grouped = f", {self.rows} rows an example" if self.rows > 1 else ""
        self.name = f"{name} ({kinds}{grouped})"
        self._singles = [self._batch((index,)) for index in range(self.size)]
        self._padding = self._padding_seen()

    def _first(self, name: str) -> Any:
        """The first trainer; finds how few rows it takes at once, and keeps its weights.

        Some trainers refuse micro-batches of one row: they compare rows of one another. Then two
        neighbouring rows, or four, or eight, are what the audit calls an example.
        """
        errors = []
        for rows in (1, 2, 4, 8):
            self.rows = rows
            try:
                with quiet():
                    trainer = make(self.factory, rows, 1)
                self._learn(trainer, name)
                self.run(((0,),), NATIVE)
            except Exception as error:  # the trainer is the user's code: anything may come
                errors.append(error)
            else:
                return trainer
        first = errors[0]
        shown = [str(one) if isinstance(one, CheckError) else located(one) for one in errors]
        # The first tells what is wrong with one row; a later one, what is wrong with several.
        told = [one for one in shown[1:] if one != shown[0] and "too few to cut" not in one]
        also = f"; with several rows at once: {told[-1]}" if told else ""
        if isinstance(first, CheckError):
            raise CheckError(shown[0] + also) from first
        raise CheckError(f"{name} could not be run: {shown[0]}{also}") from first

    def _learn(self, trainer: Any, name: str) -> None:
        """Keep of the first trainer what all runs share: its weights, its data, its habits."""
        if trainer.train_dataset is None:
            raise CheckError(f"{name}: the trainer has no train_dataset")
        self._data = trainer.train_dataset
        self._rollouts = Rollouts(trainer, EXAMPLES * self.rows) if generates(trainer) else None
        if self._rollouts is not None:
            self._data = self._rollouts.data()
        held = length(self._data, EXAMPLES * self.rows) // self.rows
        self.size = min(held, EXAMPLES) // 2 * 2  # an even number is cut into equal parts
        if self.size < 4:
            raise CheckError(
                f"{name}: {held * self.rows} rows of training data are too few to cut: give "
                f"{4 * self.rows} or more, of different lengths"
            )
        self._initial = {key: one.detach().clone() for key, one in tensors(trainer.model).items()}
        self._even = bool(trainer.accelerator.even_batches)
        self._stream = is_stream(self._data)
        self._side = padding_side(trainer)
        self._filler = pad_id(trainer)
        self._shifts = bool(trainer._loss_shifts_labels)

    def _padding_seen(self) -> Padding | None:
        """How the trainer's own collator pads; None if it cannot be seen."""
        facts = self.facts()
        if facts is None or self.rows > 1 or self._rollouts is not None:
            return None
        by_length = sorted(range(self.size), key=lambda index: facts[index].length)
        short, long = by_length[0], by_length[-1]
        return padding_of(self._singles[short], self._batch((long, short)))

    def skips(self) -> Mapping[str, str]:
        """What a trainer, or this one's batches, cannot do."""
        reasons = {
            "packing": "a trainer packs its data when it is made; compare two factories instead",
            "terms": "a trainer does not expose its loss terms",
        }
        if self._rollouts is not None:
            return reasons | SKIPPED
        return reasons | skipped(self._batch((0, 1)), self.rows, stream=self._stream)

    def facts(self) -> Sequence[Facts] | None:
        """From ``labels`` of each example's own batch."""
        if self._rollouts is not None:
            return self._rollouts.facts()
        return facts_of_labels(self._singles, shifts=self._shifts)

    def padding_sides(self) -> tuple[Literal["right", "left"], ...]:
        """The side that the trainer's own collator pads, or else its tokenizer."""
        return (self._side if self._padding is None else self._padding.side,)

    def counts(
        self, micro: tuple[int, ...], setting: Setting = PLAIN
    ) -> Mapping[str, tuple[str, float]]:
        """Of every tensor of the batch."""
        if (micro, setting) not in self._counts:
            self._counts[micro, setting] = counts_of(self._batch(micro, setting))
        return self._counts[micro, setting]

    def shape(self, micro: tuple[int, ...]) -> tuple[int, int] | None:
        """That of ``input_ids``."""
        if micro not in self._shapes:
            ids = self._batch(micro).get("input_ids")
            rows = isinstance(ids, Tensor) and ids.dim() == 2
            self._shapes[micro] = (ids.shape[0], ids.shape[1]) if rows else None
        return self._shapes[micro]

    def run(self, cut: Cut, setting: Setting = PLAIN) -> Observation:
        """One update of a new trainer."""
        return self._train(cut, setting, accumulation=setting.window or len(cut))

    def chained(self, cut: Cut, setting: Setting = PLAIN) -> Observation | None:
        """One update for each micro-batch."""
        return self._train(cut, setting, accumulation=1, updates=len(cut))

    def run_ranks(self, shares: Sequence[Cut], setting: Setting = PLAIN) -> list[Observation]:
        """One update on each rank; the trainer deals the micro-batches out in turn."""
        turns = zip(*shares, strict=True)
        dealt = [row for turn in turns for micro in turn for row in self._rows_of_all(micro)]

        def work(rank: int) -> Observation:
            PartialState._reset_state()
            return self._train(shares[rank], setting, accumulation=len(shares[rank]), dealt=dealt)

        return in_ranks(work, len(shares), seconds=PATIENCE + 40 * self._slowest)

    def sharded(self, examples: int, world: int) -> Sequence[tuple[int, ...]] | None:
        """As the trainer's own data loader deals one micro-batch to each rank."""
        if self._rollouts is not None:
            return None  # a generation is always cut into equal parts
        return dealt_by_loader(examples, world, even=self._even)

    def evaluate(
        self, batch_size: int, setting: Setting = PLAIN, examples: Sequence[int] | None = None
    ) -> dict[str, float]:
        """The trainer's own evaluation of its evaluation data, or else of its training data."""
        whole = (tuple(range(self.size)),)
        with self._ready(whole, setting, accumulation=1) as trainer:
            if examples is not None:
                rows = self._rows_of_all(examples)
                trainer.eval_dataset = of_each(trainer.eval_dataset, rows)
                trainer.data_collator.start(rows)
            return self._evaluate(trainer, batch_size, setting.seed)

    def _train(
        self,
        cut: Cut,
        setting: Setting,
        *,
        accumulation: int,
        updates: int = 1,
        dealt: Sequence[int] | None = None,
    ) -> Observation:
        start = time.perf_counter()
        options: dict[str, Any] = {"accumulation": accumulation, "updates": updates}
        with self._ready(cut, setting, dealt=dealt, **options) as trainer:
            if setting.evaluate_first:
                self._evaluate(trainer, 2, setting.seed)
            recorder = use_recorder(trainer)
            collator = trainer.data_collator
            collator.start(collator.rows)
            seed_all(setting.seed)
            with scaled_gradients(trainer.model, setting.scale):
                trainer.train()
            changed = setting.padding or setting.masked or setting.altered or setting.twins
            if changed and not collator.seen:
                raise CheckError("the trainer does not use its data_collator")
            found = observed(trainer, recorder, self._initial)
            self._slowest = max(self._slowest, time.perf_counter() - start)
            return found if dealt is None else replace(found, after=weights(trainer.model))

    def _evaluate(self, trainer: Any, batch_size: int, seed: int) -> dict[str, float]:
        trainer.args.per_device_eval_batch_size = batch_size * self.rows
        seed_all(seed)
        return measures(numbers(trainer.evaluate()))

    def _rows_of_all(self, micro: Sequence[int]) -> list[int]:
        """The rows of the trainer's data that these examples are."""
        return [row + index * self.rows for index in micro for row in range(self.rows)]

    @contextlib.contextmanager
    def _ready(
        self,
        cut: Sequence[Sequence[int]],
        setting: Setting,
        *,
        accumulation: int,
        updates: int = 1,
        dealt: Sequence[int] | None = None,
    ) -> Iterator[Any]:
        """A new trainer over the examples of a cut, made plain, at the initial weights.

        Args:
            cut: The micro-batches; of several ranks, this one's.
            setting: The setting.
            accumulation: Micro-batches of a full window.
            updates: Windows.
            dealt: The rows of all ranks, in the order in which they are dealt out.
        """
        wide = widened() if setting.dtype == torch.float64 else contextlib.nullcontext()
        order = [row for micro in cut for row in self._rows_of_all(micro)]
        with quiet():
            seed_all(setting.seed)
            trainer = make(self.factory, len(cut[0]) * self.rows, accumulation)
            make_plain(trainer, stream_steps=updates)
            trainer.eval_dataset = evaluation_rows(trainer, self.size * self.rows)
            trainer.train_dataset = restrict(self._data, dealt or order)

            if self._rollouts is not None:
                self._rollouts.feed(trainer, accumulation)

            def change(batch: Any, rows: Sequence[int]) -> Any:
                if self._rollouts is not None:
                    batch = self._rollouts.batch(rows, dealt or order)
                return changed(
                    batch,
                    rows,
                    setting,
                    group=self.rows,
                    padding=self._padding,
                    filler=self._filler,
                )

            trainer.data_collator = Collator(trainer.data_collator, change, order)
            sequential(trainer)
            held = networks(trainer)
            self._restore(trainer, setting)
            if not setting.dropout:
                trainer.neftune_noise_alpha = trainer.args.neftune_noise_alpha = None
            silence = silenced([] if setting.dropout else held)
            with silence, wide:
                yield trainer

    def _restore(self, trainer: Any, setting: Setting) -> None:
        """The initial weights, in a type; other networks keep theirs, in the type too."""
        dtype = setting.dtype
        if dtype is not None:
            trainer.accelerator.native_amp = False
            for network in networks(trainer):
                widen(network) if dtype == torch.float64 else network.to(dtype)
        # Of a model that all trainers share: a mark by which it would not be wrapped for ranks.
        vars(trainer.model).pop("_is_accelerate_prepared", None)
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
        with self._ready((micro,), setting, accumulation=1) as trainer:
            return next(iter(trainer.get_train_dataloader()))
