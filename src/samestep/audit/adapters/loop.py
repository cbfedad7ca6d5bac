"""A custom loop as a subject: the runs of the user's own functions."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from samestep.audit.adapters.batches import (
    add_padding,
    alter_inputs,
    cast_floats,
    copied,
    count_examples,
    infer_padding,
    locate_examples,
    mask_boundaries,
    mask_targets,
    number_of_rows,
    possible_denominators,
    rows_and_width,
    token_length,
    unpadded_of,
)
from samestep.audit.adapters.functions import OPTIONAL, LoopFunctions
from samestep.audit.adapters.held import HeldState
from samestep.audit.adapters.instrument import (
    disable_dropout,
    end_step,
    force_float64,
    perturb_weights,
    read_weights,
    scalars_of,
    scale_gradients,
    without_dropout,
)
from samestep.audit.adapters.loaders import named, one_pass, recognise
from samestep.audit.adapters.processes import rank_timeout, run_on_ranks, single_process_group
from samestep.audit.adapters.watch import StepWatch
from samestep.audit.gradients import global_norm, linear_combination, subtract
from samestep.audit.subject import (
    DEFAULT_SETTINGS,
    Capability,
    Dealt,
    Denominator,
    Evaluated,
    ExampleCounts,
    Observation,
    RunSettings,
    Side,
    Split,
)
from samestep.errors import CheckError
from samestep.utils.random_numbers import seed_all

T = TypeVar("T")


class LoopSubject:
    """Runs a custom loop; see `samestep.audit.subject.Subject`.

    Args:
        loop: The user's functions.
        name: For the report.

    Raises:
        CheckError: There are fewer than four examples: too few to cut.
    """

    uniform = False
    clears = False

    def __init__(self, loop: LoopFunctions, *, name: str) -> None:
        if len(loop.examples) < 4:
            raise CheckError(
                f"{name}: {len(loop.examples)} examples are too few to cut: give 4 or more, of "
                "different lengths"
            )
        self.loop = loop
        self.name = name
        self.size = len(loop.examples)
        self.terms = loop.terms
        self.knobs = loop.knobs.values
        self._held = HeldState(loop.functions, except_for=("examples", *loop.knobs.values))
        seed_all(0)
        self._initial = {key: value.clone() for key, value in loop.model().state_dict().items()}
        self._slowest = 0.0
        singles = [self._collate([example]) for example in loop.examples]
        self._counts = count_examples(singles)
        self._lists = isinstance(singles[0], list | tuple)
        self._lengths = [token_length(single) for single in singles]
        self._rows = [number_of_rows(single) for single in singles]
        self._unpadded = unpadded_of(singles, self._collate(loop.examples))
        by_length = sorted(range(self.size), key=lambda index: self._lengths[index] or 0)
        short, long = (loop.examples[at] for at in (by_length[0], by_length[-1]))
        self._padding = infer_padding(self._collate([short]), self._collate([long, short]))

    def missing(self) -> Mapping[Capability, str]:
        """What needs names that the subject does not have."""
        loop = self.loop
        reasons: dict[Capability, str] = {}
        if loop.pack is None:
            reasons["packing"] = f"the subject has no {OPTIONAL['pack']}"
        if loop.evaluate is None:
            reasons["evaluation"] = f"the subject has no {OPTIONAL['evaluate']}"
        if not loop.ranks:
            reasons["ranks"] = f"the subject has no {OPTIONAL['wrap']}"
        if loop.loader is None:
            reasons["loader"] = f"the subject has no {OPTIONAL['loader']}"
        if not loop.knobs.values:
            reasons["knobs"] = f"the subject has no {OPTIONAL['knobs']}"
        if not loop.terms:
            reasons["terms"] = f"the subject has no {OPTIONAL['terms']}"
        if self._counts is None or self._collate(loop.examples[:1])["labels"].is_floating_point():
            reasons["masking"] = "batches have no tensor 'labels' of classes"
        if self._padding is None:
            reasons["padding"] = "collate does not pad rows [rows, length], as far as can be seen"
        if not loop.takes("accumulation"):
            reasons["window"] = (
                "step takes no accumulation=, the micro-batches of a full window; short "
                "micro-batches are tried under micro-batch"
            )
        return reasons

    def example_counts(self) -> Sequence[ExampleCounts] | None:
        """From ``labels`` of each example's own batch."""
        return self._counts

    def padding_sides(self) -> tuple[Side, ...]:
        """The one on which the subject's own collator pads."""
        return () if self._padding is None else (self._padding.side,)

    def denominators(
        self, micro_batch: tuple[int, ...], settings: RunSettings = DEFAULT_SETTINGS
    ) -> Mapping[str, Denominator]:
        """Of every tensor of the batch."""
        batch = self._batch(micro_batch, settings)
        return possible_denominators(batch, unpadded=self._unpadded)

    def batch_shape(self, micro_batch: tuple[int, ...]) -> tuple[int, int] | None:
        """That of ``input_ids``, or else of the first tensor."""
        return rows_and_width(self._batch(micro_batch, DEFAULT_SETTINGS))

    def run(self, split: Split, settings: RunSettings = DEFAULT_SETTINGS) -> Observation:
        """One step on fresh weights."""
        start = time.perf_counter()
        with self._turned(settings):
            observation = self._in_group(self._run, split, settings)
        self._slowest = max(self._slowest, time.perf_counter() - start)
        return observation

    @contextlib.contextmanager
    def _turned(self, settings: RunSettings) -> Iterator[None]:
        """Within the block the loop has the knob of a run."""
        before = self.loop
        self.loop = before.turned(settings.knob)
        try:
            with before.knobs.on_holder(settings.knob):
                yield
        finally:
            self.loop = before

    def _run(self, split: Split, settings: RunSettings) -> Observation:
        with self._fresh_model(settings) as (inner, model):
            if settings.evaluate_first:
                self._evaluate(model, 2, settings=settings)
                seed_all(settings.seed)
            for _ in range(settings.steps_before):
                before = self._step(inner, model, split=split, settings=settings)
                own = not before.stepped and self.loop.step is not None
                end_step(inner, updates=own, clears=settings.clear_between)
                seed_all(settings.seed)
            return self._step(inner, model, split=split, settings=settings)

    def run_on_ranks(
        self, shares: Sequence[Split], settings: RunSettings = DEFAULT_SETTINGS
    ) -> list[Observation]:
        """One step on each rank of a process group, each on its own share."""

        def work(rank: int) -> Observation:
            with self._fresh_model(settings) as (inner, model):
                observation = self._step(inner, model, split=shares[rank], settings=settings)
                return replace(observation, weights_after=read_weights(inner))

        return run_on_ranks(work, len(shares), seconds=rank_timeout(self._slowest))

    def run_dealt(
        self,
        examples: Sequence[int],
        micro_batch_size: int,
        settings: RunSettings = DEFAULT_SETTINGS,
    ) -> Dealt:
        """One step on what the subject's ``loader`` gives."""

        def work() -> Dealt:
            with self._fresh_model(settings) as (inner, model):
                given = copied([self.loop.examples[index] for index in examples])
                assert self.loop.loader is not None
                items = one_pass(self.loop.loader(list(given), micro_batch_size), len(given))
                listed = [isinstance(item, list | tuple) and not self._lists for item in items]
                batches = [
                    self._collate(list(item)) if lists else item
                    for item, lists in zip(items, listed, strict=True)
                ]
                if settings.dtype is not None:
                    batches = [cast_floats(batch, settings.dtype) for batch in batches]
                observation = self._step_on(inner, model, batches, settings=settings)
                seen = [recognise(item, given) for item in items] if all(listed) else []
                return Dealt(observation, named(seen, examples), number=len(items))

        with self._turned(settings):
            return self._in_group(work)

    def run_dealt_on_ranks(
        self,
        examples: Sequence[int],
        micro_batch_size: int,
        world: int,
        settings: RunSettings = DEFAULT_SETTINGS,
    ) -> list[Dealt] | None:
        """None: `shard` says how examples are dealt to ranks."""

    def run_as_steps(
        self, split: Split, settings: RunSettings = DEFAULT_SETTINGS
    ) -> Observation | None:
        """Each micro-batch as an effective batch of its own, on the weights of the one before."""
        return self._in_group(self._run_as_steps, split, settings)

    def _run_as_steps(self, split: Split, settings: RunSettings) -> Observation | None:
        gradients = []
        with self._fresh_model(settings) as (inner, model):
            for micro_batch in split:
                before = read_weights(inner)
                step = self._step(inner, model, split=(micro_batch,), settings=settings)
                gradients.append(step.gradient)
                if not step.updates and not global_norm(subtract(before, read_weights(inner))):
                    return None
        return Observation(linear_combination(gradients, [1.0] * len(gradients)))

    def shard(self, examples: int, world: int) -> Sequence[tuple[int, ...]] | None:
        """What the subject's own ``shard`` says."""
        if self.loop.shard is None:
            return None
        indices = list(range(examples))
        return [tuple(map(int, self.loop.shard(indices, rank, world))) for rank in range(world)]

    def evaluate(
        self,
        batch_size: int,
        settings: RunSettings = DEFAULT_SETTINGS,
        *,
        examples: Sequence[int] | None = None,
    ) -> dict[str, float]:
        """The subject's own evaluation, over batches of a size."""

        def work() -> dict[str, float]:
            with self._fresh_model(settings) as (_, model):
                return self._evaluate(model, batch_size, settings=settings, examples=examples)

        return self._in_group(work)

    def evaluate_on_ranks(
        self,
        batch_size: int,
        settings: RunSettings = DEFAULT_SETTINGS,
        *,
        examples: Sequence[int],
        world: int,
    ) -> list[Evaluated]:
        """The subject's own evaluation on each rank, over its stretch of the batches.

        Raises:
            CheckError: The evaluation does not put the ranks' numbers together.
        """
        if not self.loop.evaluates_on_ranks:
            raise CheckError("evaluate calls nothing of torch.distributed: each rank says its own")
        starts = list(range(0, len(examples), batch_size))
        border = batch_size * max(1, len(starts) * 3 // 8)  # fewer batches on the first
        shares = (tuple(examples[:border]), tuple(examples[border:]))

        def work(rank: int) -> Evaluated:
            with self._fresh_model(settings) as (_, model):
                numbers = self._evaluate(
                    model, batch_size, settings=settings, examples=shares[rank]
                )
                return Evaluated(numbers, shares[rank])

        return run_on_ranks(work, world, seconds=rank_timeout(self._slowest))

    def _evaluate(
        self,
        model: nn.Module,
        batch_size: int,
        *,
        settings: RunSettings,
        examples: Sequence[int] | None = None,
    ) -> dict[str, float]:
        assert self.loop.evaluate is not None
        chosen = tuple(range(self.size) if examples is None else examples)
        starts = range(0, len(chosen), batch_size)
        batches = [self._batch(chosen[at : at + batch_size], settings) for at in starts]
        return scalars_of(self.loop.evaluate(model, batches))

    def _in_group(self, work: Callable[..., T], *args: Any) -> T:
        """What a function returns, in a process group of this process if the loop needs one.

        The function's models have to be gone when the group ends: a wrapped one that outlives its
        group waits for the group's threads while it holds the lock that these need.
        """
        with single_process_group() if self.loop.ranks else contextlib.nullcontext():
            return work(*args)

    @contextlib.contextmanager
    def _fresh_model(self, settings: RunSettings) -> Iterator[tuple[nn.Module, nn.Module]]:
        """The user's model with fresh weights, and the one that the loop gets."""
        self._held.put_back()
        seed_all(settings.seed)
        inner = self.loop.model()
        self.loop.knobs.on_model(inner, settings.knob)
        inner.load_state_dict(self._initial)
        if settings.dtype is not None:
            inner.to(settings.dtype)
        if settings.perturbation is not None:
            perturb_weights(inner, settings.perturbation.displacement)
        if not settings.dropout:
            disable_dropout(inner)
        model = inner if self.loop.wrap is None else self.loop.wrap(inner)
        model.zero_grad()
        change, nothing = settings.model_context, contextlib.nullcontext
        wide = force_float64(halves=False) if settings.wide_constants else nothing()
        with nothing() if change is None else change(inner), wide:
            seed_all(settings.seed)
            yield inner, model

    def _batch(self, micro_batch: Sequence[int], settings: RunSettings) -> Any:
        examples = [self.loop.examples[index] for index in micro_batch]
        batch = self._collate(examples, packed=settings.packed)
        batch = self._edit(batch, micro_batch, settings=settings)
        if settings.extra_padding:
            batch = add_padding(
                batch,
                settings.extra_padding,
                side=settings.padding_side,
                offset=settings.padding_offset,
                fills=None if self._padding is None else self._padding.fills,
            )
        return batch if settings.dtype is None else cast_floats(batch, settings.dtype)

    def _collate(self, examples: Sequence[Any], *, packed: bool = False) -> Any:
        function = self.loop.pack if packed else self.loop.collate
        assert function is not None
        return function(copied(list(examples)))  # it may change what it is given

    def _edit(self, batch: Any, micro_batch: Sequence[int], *, settings: RunSettings) -> Any:
        """The batch with the examples changed that the settings name."""
        altered = {
            at
            for at, index in enumerate(micro_batch)
            if index in settings.altered_examples
            or (settings.alter_repeats and index in micro_batch[:at])
        }
        masked = {at for at, index in enumerate(micro_batch) if index in settings.masked_examples}
        if not (altered or masked or settings.mask_boundaries):
            return batch
        side = "right" if self._padding is None else self._padding.side
        lengths = [self._lengths[index] for index in micro_batch]
        rows = [self._rows[index] for index in micro_batch]
        locations = locate_examples(batch, lengths, side=side, rows=rows)
        if altered:
            batch = alter_inputs(batch, [locations[at] for at in altered])
        if masked:
            batch = mask_targets(batch, [locations[at] for at in masked])
        return mask_boundaries(batch, locations) if settings.mask_boundaries else batch

    def _step(
        self, inner: nn.Module, model: nn.Module, *, split: Split, settings: RunSettings
    ) -> Observation:
        batches = [self._batch(micro_batch, settings) for micro_batch in split]
        return self._step_on(inner, model, batches, settings=settings)

    def _step_on(
        self, inner: nn.Module, model: nn.Module, batches: list[Any], *, settings: RunSettings
    ) -> Observation:
        options: dict[str, Any] = {} if settings.term is None else {"term": settings.term}
        if self.loop.takes("accumulation"):
            options["accumulation"] = settings.window or len(batches)
        watch = StepWatch(inner, moves=settings.watch_moves)
        no_dropout = contextlib.nullcontext() if settings.dropout else without_dropout()
        scaled = scale_gradients(inner, settings.gradient_scale)
        with scaled, watch.on(), no_dropout:
            reported = self.loop.update(model, batches, **options)
        return watch.observation(scalars_of(reported))
