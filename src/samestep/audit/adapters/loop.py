"""A custom loop as a subject: the user's own functions by name, and the runs of them."""

import contextlib
import copy
import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import CodeType, FunctionType, ModuleType
from typing import Any, TypeVar

import torch
from torch import nn

from samestep.audit.adapters.batches import (
    add_padding,
    alter_inputs,
    cast_floats,
    count_examples,
    infer_padding,
    locate_examples,
    mask_boundaries,
    mask_targets,
    possible_denominators,
    rows_and_width,
    token_length,
)
from samestep.audit.adapters.instrument import (
    disable_dropout,
    force_float64,
    perturb_weights,
    read_weights,
    scalars_of,
    scale_gradients,
    seed_all,
    without_dropout,
)
from samestep.audit.adapters.processes import rank_timeout, run_on_ranks, single_process_group
from samestep.audit.adapters.watch import StepWatch
from samestep.audit.gradients import global_norm, linear_combination, subtract
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

T = TypeVar("T")

_REQUIRED = {
    "model": "model() -> nn.Module, the same architecture each time",
    "examples": "the examples of one effective batch, a sequence",
    "collate": "collate(list of examples) -> batch",
    "step": "step(model, micro_batches): leaves the gradient in .grad; or",
    "train": "train(model, micro_batches): updates the weights",
}
_OPTIONAL = {
    "pack": "pack(list of examples) -> batch, without padding",
    "evaluate": "evaluate(model, batches) -> loss, or {name: value}",
    "terms": "names of loss terms; step or train then takes term=",
    "wrap": "wrap(model) -> model for several ranks, such as DistributedDataParallel; None where "
    "step or train calls torch.distributed by itself",
    "shard": "shard(indices, rank, world) -> the indices of one rank, as your sampler deals them",
}


@dataclass(frozen=True)
class LoopFunctions:
    """The user's own functions, by the names under which a subject file defines them.

    Attributes:
        model: Makes the model, the same architecture each time.
        examples: Of one effective batch.
        collate: From examples to a batch.
        step: Leaves the gradient in ``.grad``; this or ``train``.
        train: Updates the weights.
        pack: From examples to a batch without padding.
        evaluate: From a model and batches to a loss, or numbers by name.
        terms: Names of loss terms.
        wrap: From a model to one for several ranks.
        shard: From indices, rank and world to the indices of that rank.
        ranks: Whether it runs on several ranks: it names ``wrap``, or calls torch.distributed.
    """

    model: Callable[[], nn.Module]
    examples: Sequence[Any]
    collate: Callable[[list[Any]], Any]
    step: Callable[..., Any] | None = None
    train: Callable[..., Any] | None = None
    pack: Callable[[list[Any]], Any] | None = None
    evaluate: Callable[[nn.Module, list[Any]], Any] | None = None
    terms: tuple[str, ...] = ()
    wrap: Callable[[nn.Module], nn.Module] | None = None
    shard: Callable[[list[int], int, int], Sequence[int]] | None = None
    ranks: bool = False

    @classmethod
    def of(cls, source: Any) -> "LoopFunctions":
        """Read the names off a module, a class instance, or a mapping.

        Raises:
            CheckError: A needed name is missing; lists all that are.
        """
        members = _members(source)
        missing = [name for name in ("model", "examples", "collate") if name not in members]
        if "step" not in members and "train" not in members:
            missing.append("step")
        if missing:
            lines = "\n".join(f"  - {_REQUIRED[name]}" for name in missing)
            raise CheckError(f"the subject lacks:\n{lines}\n`samestep check --init` writes one")
        fields = {name: members[name] for name in (*_REQUIRED, *_OPTIONAL) if name in members}
        examples = fields["examples"]
        fields["examples"] = list(examples() if callable(examples) else examples)
        fields["terms"] = tuple(fields.get("terms") or ())
        function = fields.get("step") or fields.get("train")
        return cls(**fields, ranks="wrap" in fields or _calls_distributed(function))

    @property
    def update(self) -> Callable[..., Any]:
        """``step``, or else ``train``."""
        function = self.step or self.train
        assert function is not None
        return function

    def takes(self, argument: str) -> bool:
        """Whether ``step`` or ``train`` takes an argument of this name."""
        return argument in inspect.signature(self.update).parameters


def _members(source: Any) -> dict[str, Any]:
    if isinstance(source, Mapping):
        return dict(source)
    if isinstance(source, ModuleType):
        return vars(source)
    return {name: getattr(source, name) for name in dir(source) if not name.startswith("_")}


def _calls_distributed(function: Any, visited: frozenset[str] = frozenset()) -> bool:
    """Whether a function, or one of its own file that it calls, names torch.distributed."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        return False
    inside = [const for const in code.co_consts if isinstance(const, CodeType)]
    names = {name for each in (code, *inside) for name in each.co_names} - visited
    scope = function.__globals__
    if "distributed" in names or any(scope.get(name) is torch.distributed for name in names):
        return True
    called = [scope[name] for name in names if isinstance(scope.get(name), FunctionType)]
    own = [each for each in called if each.__module__ == function.__module__]
    return any(_calls_distributed(each, visited | names) for each in own)


class LoopSubject:
    """Runs a custom loop; see `samestep.audit.subject.Subject`.

    Args:
        loop: The user's functions.
        name: For the report.

    Raises:
        CheckError: There are fewer than four examples: too few to cut.
    """

    uniform = False

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
        seed_all(0)
        self._initial = {key: value.clone() for key, value in loop.model().state_dict().items()}
        self._slowest = 0.0
        singles = [self._collate([example]) for example in loop.examples]
        self._counts = count_examples(singles)
        self._lengths = [token_length(single) for single in singles]
        by_length = sorted(range(self.size), key=lambda index: self._lengths[index] or 0)
        short, long = (loop.examples[at] for at in (by_length[0], by_length[-1]))
        self._padding = infer_padding(self._collate([short]), self._collate([long, short]))

    def missing(self) -> Mapping[Capability, str]:
        """What needs names that the subject does not have."""
        loop = self.loop
        reasons: dict[Capability, str] = {}
        if loop.pack is None:
            reasons["packing"] = f"the subject has no {_OPTIONAL['pack']}"
        if loop.evaluate is None:
            reasons["evaluation"] = f"the subject has no {_OPTIONAL['evaluate']}"
        if not loop.ranks:
            reasons["ranks"] = f"the subject has no {_OPTIONAL['wrap']}"
        if not loop.terms:
            reasons["terms"] = f"the subject has no {_OPTIONAL['terms']}"
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
        return possible_denominators(self._batch(micro_batch, settings))

    def batch_shape(self, micro_batch: tuple[int, ...]) -> tuple[int, int] | None:
        """That of ``input_ids``, or else of the first tensor."""
        return rows_and_width(self._batch(micro_batch, DEFAULT_SETTINGS))

    def run(self, split: Split, settings: RunSettings = DEFAULT_SETTINGS) -> Observation:
        """One step on fresh weights."""
        start = time.perf_counter()
        observation = self._in_group(self._run, split, settings)
        self._slowest = max(self._slowest, time.perf_counter() - start)
        return observation

    def _run(self, split: Split, settings: RunSettings) -> Observation:
        with self._fresh_model(settings) as (inner, model):
            if settings.evaluate_first:
                self._evaluate(model, 2, settings=settings)
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
        seed_all(settings.seed)
        inner = self.loop.model()
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
        return function(copy.deepcopy(list(examples)))  # it may change what it is given

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
        locations = locate_examples(batch, lengths, side=side)
        if altered:
            batch = alter_inputs(batch, [locations[at] for at in altered])
        if masked:
            batch = mask_targets(batch, [locations[at] for at in masked])
        return mask_boundaries(batch, locations) if settings.mask_boundaries else batch

    def _step(
        self, inner: nn.Module, model: nn.Module, *, split: Split, settings: RunSettings
    ) -> Observation:
        batches = [self._batch(micro_batch, settings) for micro_batch in split]
        options: dict[str, Any] = {} if settings.term is None else {"term": settings.term}
        if self.loop.takes("accumulation"):
            options["accumulation"] = settings.window or len(batches)
        watch = StepWatch(inner, moves=settings.watch_moves)
        no_dropout = contextlib.nullcontext() if settings.dropout else without_dropout()
        scaled = scale_gradients(inner, settings.gradient_scale)
        with scaled, watch.on(), no_dropout:
            reported = self.loop.update(model, batches, **options)
        return watch.observation(scalars_of(reported))
