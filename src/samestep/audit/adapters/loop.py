"""A custom loop as a subject."""

import contextlib
import copy
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from samestep.audit.adapters.capture import (
    WithoutDropout,
    observe,
    optimizer_steps,
    scaled_gradients,
    shift_weights,
    weights,
)
from samestep.audit.adapters.names import OPTIONAL, LoopNames, accepts
from samestep.audit.batches import (
    add_padding,
    alter,
    cast,
    counts_of,
    facts_of,
    length_of,
    mask_borders,
    mask_targets,
    padding_of,
    places,
)
from samestep.audit.children import alone, in_ranks
from samestep.audit.subject import PLAIN, Cut, Facts, Observation, Setting
from samestep.audit.vectors import combine, norm
from samestep.errors import CheckError

PATIENCE = 10.0
"""Seconds that ranks may take, and 40 single runs more, before they count as hung."""


class LoopSubject:
    """Runs a custom loop; see `samestep.audit.subject.Subject`.

    Args:
        loop: The user's functions.
        name: For the report.

    Raises:
        CheckError: There are fewer than four examples: too few to cut.
    """

    uniform = False

    def __init__(self, loop: LoopNames, *, name: str) -> None:
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
        singles = [self._collated([example]) for example in loop.examples]
        self._facts = facts_of(singles)
        self._lengths = [length_of(single) for single in singles]
        by_length = sorted(range(self.size), key=lambda index: self._lengths[index] or 0)
        short, long = (loop.examples[at] for at in (by_length[0], by_length[-1]))
        self._padding = padding_of(self._collated([short]), self._collated([long, short]))

    def facts(self) -> Sequence[Facts] | None:
        """From ``labels`` of each example's own batch."""
        return self._facts

    def skips(self) -> Mapping[str, str]:
        """What needs names that the subject does not have."""
        loop, reasons = self.loop, {}
        if loop.pack is None:
            reasons["packing"] = f"the subject has no {OPTIONAL['pack']}"
        if loop.evaluate is None:
            for axis in ("evaluation-batch", "evaluation-first"):
                reasons[axis] = f"the subject has no {OPTIONAL['evaluate']}"
        if not loop.ranks:
            reasons["ranks"] = f"the subject has no {OPTIONAL['wrap']}"
        if not loop.terms:
            reasons["terms"] = f"the subject has no {OPTIONAL['terms']}"
        if self._facts is None or self._collated(loop.examples[:1])["labels"].is_floating_point():
            reasons["zero-target"] = "batches have no tensor 'labels' of classes"
        if self._padding is None:
            reasons["padding"] = "collate does not pad rows [rows, length], as far as can be seen"
        function = loop.step or loop.train
        if function is not None and not accepts(function, "accumulation"):
            reasons["short-window"] = (
                "step takes no accumulation=, the micro-batches of a full window; short "
                "micro-batches are tried under micro-batch"
            )
        return reasons

    def run(self, cut: Cut, setting: Setting = PLAIN) -> Observation:
        """One step on fresh weights."""
        start = time.perf_counter()
        with self._group():
            found = self._run(cut, setting)
        self._slowest = max(self._slowest, time.perf_counter() - start)
        return found

    def run_ranks(self, shares: Sequence[Cut], setting: Setting = PLAIN) -> list[Observation]:
        """One step on each rank of a process group, each on its own share."""

        def work(rank: int) -> Observation:
            inner, model = self._models(setting)
            found = self._step(inner, model, self._batches(shares[rank], setting), setting)
            return replace(found, after=weights(inner))

        return in_ranks(work, len(shares), seconds=PATIENCE + 40 * self._slowest)

    def sharded(self, examples: int, world: int) -> Sequence[tuple[int, ...]] | None:
        """What the subject's own ``shard`` says."""
        if self.loop.shard is None:
            return None
        indices = list(range(examples))
        return [tuple(map(int, self.loop.shard(indices, rank, world))) for rank in range(world)]

    def chained(self, cut: Cut, setting: Setting = PLAIN) -> Observation | None:
        """Each micro-batch as an effective batch of its own, on the weights of the one before."""
        with self._group():
            inner, model = self._models(setting)
            found = []
            for micro in cut:
                before = weights(inner)
                found.append(self._step(inner, model, self._batches((micro,), setting), setting))
                if not found[-1].updates and not norm(
                    combine([before, weights(inner)], [1.0, -1.0])
                ):
                    return None
        return Observation(combine([one.gradient for one in found], [1.0] * len(found)))

    def padding_sides(self) -> tuple[Literal["right", "left"], ...]:
        """The one on which the subject's own collator pads."""
        return () if self._padding is None else (self._padding.side,)

    def counts(
        self, micro: tuple[int, ...], setting: Setting = PLAIN
    ) -> Mapping[str, tuple[str, float]]:
        """Of every tensor of the batch."""
        return counts_of(self._batch(micro, setting))

    def shape(self, micro: tuple[int, ...]) -> tuple[int, int] | None:
        """That of ``input_ids``."""
        batch = self._batch(micro, PLAIN)
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        return (ids.shape[0], ids.shape[1]) if isinstance(ids, Tensor) and ids.dim() == 2 else None

    def evaluate(
        self, batch_size: int, setting: Setting = PLAIN, examples: Sequence[int] | None = None
    ) -> dict[str, float]:
        """The subject's own evaluation, over batches of a size."""
        with self._group():
            _, model = self._models(setting)
            return self._evaluate(model, batch_size, setting, examples)

    def _evaluate(
        self,
        model: nn.Module,
        batch_size: int,
        setting: Setting,
        examples: Sequence[int] | None = None,
    ) -> dict[str, float]:
        assert self.loop.evaluate is not None
        chosen = tuple(range(self.size) if examples is None else examples)
        starts = range(0, len(chosen), batch_size)
        cut = tuple(chosen[start : start + batch_size] for start in starts)
        return numbers(self.loop.evaluate(model, self._batches(cut, setting)))

    def _group(self) -> contextlib.AbstractContextManager[None]:
        return alone() if self.loop.ranks else contextlib.nullcontext()

    def _run(self, cut: Cut, setting: Setting) -> Observation:
        inner, model = self._models(setting)
        if setting.evaluate_first:
            self._evaluate(model, 2, setting)
            seed_all(setting.seed)
        return self._step(inner, model, self._batches(cut, setting), setting)

    def _models(self, setting: Setting) -> tuple[nn.Module, nn.Module]:
        """The user's model with fresh weights, and the one that the loop gets."""
        seed_all(setting.seed)
        inner = self.loop.model()
        inner.load_state_dict(self._initial)
        if setting.dtype is not None:
            inner.to(setting.dtype)
        if setting.shift is not None:
            shift_weights(inner, setting.shift.by)
        if not setting.dropout:
            silence_dropout(inner)
        model = inner if self.loop.wrap is None else self.loop.wrap(inner)
        model.zero_grad()
        seed_all(setting.seed)
        return inner, model

    def _batches(self, cut: Cut, setting: Setting) -> list[Any]:
        return [self._batch(micro, setting) for micro in cut]

    def _batch(self, micro: Sequence[int], setting: Setting) -> Any:
        examples = [self.loop.examples[index] for index in micro]
        batch = self._collated(examples, packed=setting.packed)
        batch = self._edited(batch, micro, setting)
        if setting.padding:
            fills = None if self._padding is None else self._padding.fills
            batch = add_padding(
                batch, setting.padding, side=setting.side, filler=setting.filler, fills=fills
            )
        return batch if setting.dtype is None else cast(batch, setting.dtype)

    def _collated(self, examples: Sequence[Any], *, packed: bool = False) -> Any:
        function = self.loop.pack if packed else self.loop.collate
        assert function is not None
        return function(copy.deepcopy(list(examples)))  # it may change what it is given

    def _edited(self, batch: Any, micro: Sequence[int], setting: Setting) -> Any:
        changed = {at for at, index in enumerate(micro) if index in setting.altered}
        if setting.twins:
            changed |= {at for at, index in enumerate(micro) if index in micro[:at]}
        masked = {at for at, index in enumerate(micro) if index in setting.masked}
        if not (changed or masked or setting.borders_masked):
            return batch
        side = "right" if self._padding is None else self._padding.side
        where = places(batch, [self._lengths[index] for index in micro], side)
        if changed:
            batch = alter(batch, [where[at] for at in changed])
        if masked:
            batch = mask_targets(batch, [where[at] for at in masked])
        return mask_borders(batch, where) if setting.borders_masked else batch

    def _step(
        self, inner: nn.Module, model: nn.Module, micros: list[Any], setting: Setting
    ) -> Observation:
        function = self.loop.step or self.loop.train
        assert function is not None
        options: dict[str, Any] = {} if setting.term is None else {"term": setting.term}
        if accepts(function, "accumulation"):
            options["accumulation"] = setting.window or len(micros)
        before = weights(inner)
        dropping = contextlib.nullcontext() if setting.dropout else WithoutDropout()
        with scaled_gradients(inner, setting.scale), optimizer_steps(inner) as steps, dropping:
            reported = function(model, micros, **options)
        return observe(inner, before, steps, numbers(reported))


def seed_all(seed: int) -> None:
    """Seed every random number generator that a loop may draw from."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def silence_dropout(model: nn.Module) -> None:
    """Set every dropout probability of a model to 0, as modules and as numbers on modules."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def numbers(reported: Any) -> dict[str, float]:
    """What a loop returned, as numbers by name; what is not a number is left out."""
    if reported is None:
        return {}
    values = reported if isinstance(reported, Mapping) else {"loss": reported}
    return {
        str(name): float(value.detach() if isinstance(value, Tensor) else value)
        for name, value in values.items()
        if isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)
    }
