"""What is tried once, before the first step of a model and a loss: does it add up?

A loss that returns a mean, or that couples its examples, and a model that keeps statistics of its
batches, would make the step depend on the split in silence. So one micro-batch is cut in two, and
its sums are compared with those of the whole: two forwards without a graph, a few more where they
differ, to measure what rounding explains.
"""

import contextlib
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import FunctionType, MethodType
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from samestep.engine.batch_statistics import BufferWatch
from samestep.engine.counts import add_counts, count_parts
from samestep.engine.cut import Halves, cut_in_two
from samestep.engine.modes import eval_mode
from samestep.engine.normalize import reduce_terms
from samestep.engine.parallel import is_sharded, unwrap
from samestep.engine.terms import Counter, Counts, Coupled, LossFn, MicroBatch, Unit, named_terms
from samestep.errors import StepError, StopRequestedError
from samestep.utils.agreement import FACTOR, relative_differences, rounding_noise
from samestep.utils.random_numbers import same_random_numbers

log = logging.getLogger("samestep")

_tried: WeakKeyDictionary[nn.Module, set[Any]] = WeakKeyDictionary()
"""The losses that were tried on each model, and of which it was said why they were not."""

_ROUNDINGS = 16
"""Roundings of a sum that need no measurement to be taken for rounding."""

_LAW_SHARE = 0.05
"""A law explains a difference if it leaves less than this share of it."""


@dataclass(frozen=True)
class _Sum:
    """What a loss summed over some micro-batches under one name.

    Attributes:
        value: The total, float64; of any shape for a part of a coupled term.
        unit: Its unit, None for a coupled term.
        weight: Its weight.
        eps: The relative rounding of the type that it came in.
    """

    value: Tensor
    unit: Unit | None
    weight: float
    eps: float


_Sums: TypeAlias = dict[str, _Sum]


class SumCheck:
    """Tries a model and a loss once, on the first micro-batch that can be cut.

    Args:
        model: The model, in the mode of the step.
        loss_fn: The loss.
        normalize: As for `samestep.step`.
        counters: As for `samestep.step`.
        enabled: Whether to try at all.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        *,
        normalize: Unit,
        counters: Mapping[str, Counter] | None,
        enabled: bool,
    ) -> None:
        self._model, self._loss_fn = model, loss_fn
        self._normalize, self._counters = normalize, counters or {}
        self._key = (_identity(loss_fn), any(module.training for module in model.modules()))
        on_meta = any(weight.is_meta for weight in model.parameters())
        self._due = enabled and not on_meta and self._key not in _tried.get(model, ())

    def __call__(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Try, if that is still to be done.

        Args:
            micro_batches: Those of a step, or the next one of an evaluation.

        Raises:
            StepError: A term is no sum over its examples, or the forward changes buffers of the
                model otherwise if the micro-batch is cut.
        """
        if not self._due or not micro_batches:
            return
        if is_sharded(self._model):  # every rank would have to run the model equally often
            self._done("under fully_shard no rank can run the model alone")
            return
        halves: Halves | str = ""
        for micro_batch in micro_batches:
            halves = cut_in_two(micro_batch, fits=self._counts_fit)
            if isinstance(halves, Halves):
                break
        watch = BufferWatch(unwrap(self._model))
        with torch.no_grad(), _plain_execution():
            try:
                reason = self._try(halves, micro_batches[0], watch)
            finally:
                watch.restore()
                torch.clear_autocast_cache()  # casts made here have no graph
        self._done(reason)

    def _try(self, halves: Halves | str, micro_batch: MicroBatch, watch: BufferWatch) -> str | None:
        """Compare; why it could not be done, or None."""
        if isinstance(halves, str):
            if watch:
                self._run([micro_batch])
                _check_buffers(watch.changed(), "and the micro-batch could not be cut to compare")
            return halves
        whole = self._counted(self._run([halves.whole]), halves)
        changed = watch.changed()
        if whole is None:
            return "the loss fails on it"  # and will say so itself
        if changed:
            self._compare_buffers(changed, halves, watch)
            watch.restore()
        parts = self._run(halves.parts)
        if parts is None:
            return "the loss fails on a part of it"
        suspects = _suspects(whole, parts)
        if not suspects:
            return None
        if self._is_random(halves):
            with eval_mode(self._model):
                if self._is_random(halves):
                    return "the loss or the model draws random numbers that no seed repeats"
                whole, parts = self._run([halves.whole]) or {}, self._run(halves.parts) or {}
                suspects = self._beyond_noise(_suspects(whole, parts), whole, parts, halves)
        else:
            suspects = self._beyond_noise(suspects, whole, parts, halves)
        self._judge(suspects, whole, halves)
        return None

    def _run(self, micro_batches: Sequence[MicroBatch], *, seed: int = 0) -> _Sums | None:
        """The sums over micro-batches; None if the loss fails, which the step itself will show."""
        sums: _Sums = {}
        for micro_batch in micro_batches:
            try:
                with same_random_numbers(seed):
                    found = self._sums_of(micro_batch)
            except StopRequestedError:
                raise
            except Exception:
                return None
            if sums and (
                found.keys() != sums.keys()
                or any(found[name].value.shape != sums[name].value.shape for name in sums)
            ):
                return None
            for name, one in found.items():
                before = sums[name].value if name in sums else torch.zeros_like(one.value)
                sums[name] = _Sum(before + one.value, one.unit, one.weight, one.eps)
        return sums

    def _sums_of(self, micro_batch: MicroBatch) -> _Sums:
        result = named_terms(self._loss_fn(unwrap(self._model), micro_batch))
        terms = {name: term for name, term in result.items() if not isinstance(term, Coupled)}
        reduced = reduce_terms(terms, micro_batch, normalize=self._normalize) if terms else {}
        sums = {
            name: _Sum(term.total.double(), term.unit, term.weight, _eps(terms[name].total))
            for name, term in reduced.items()
        }
        for name, term in result.items():
            if isinstance(term, Coupled) and term.gather == "sum":
                sums[name] = _Sum(term.part.double(), None, term.weight, _eps(term.part))
        return sums

    def _counted(self, sums: _Sums | None, halves: Halves) -> _Sums | None:
        """The sums whose unit the micro-batch holds: the step refuses others by itself."""
        counts = self._counts([halves.whole])
        return sums and {
            name: one
            for name, one in sums.items()
            if not isinstance(one.unit, str) or counts.get(one.unit)
        }

    def _counts_fit(self, halves: Halves) -> bool:
        """Whether the parts hold as much of every unit as the whole."""
        try:
            whole, parts = self._counts([halves.whole]), self._counts(halves.parts)
        except Exception:
            return False
        return whole.keys() == parts.keys() and all(
            abs(whole[unit] - parts[unit]) <= 1e-9 * abs(whole[unit]) for unit in whole
        )

    def _counts(self, micro_batches: Sequence[MicroBatch]) -> Counts:
        return add_counts([count_parts([one], self._counters) for one in micro_batches])

    def _is_random(self, halves: Halves) -> bool:
        """Whether other random numbers give other sums."""
        one, other = self._run([halves.whole]), self._run([halves.whole], seed=1)
        return one is None or other is None or bool(_suspects(one, other))

    def _beyond_noise(
        self, suspects: list[str], whole: _Sums, parts: _Sums, halves: Halves
    ) -> list[str]:
        """The sums that differ by more than rounding explains."""
        if not suspects:
            return []

        def values(micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
            found = self._run(micro_batches) or {}
            return [found[name].value for name in suspects]

        ways: list[Sequence[MicroBatch]] = [[halves.whole], halves.parts]
        noises = [rounding_noise(partial(values, way)) for way in ways]
        return [
            name
            for name, *noise in zip(suspects, *noises, strict=True)
            if _relative(whole[name].value, parts[name].value)
            > FACTOR * max(*noise, whole[name].eps)
        ]

    def _compare_buffers(self, names: list[str], halves: Halves, watch: BufferWatch) -> None:
        """Refuse buffers that a forward of the whole leaves otherwise than those of the parts."""

        def after(micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
            watch.restore()
            self._run(micro_batches)
            return watch.values(names)

        whole, parts = after([halves.whole]), after(halves.parts)
        noise = rounding_noise(lambda: after([halves.whole]))
        differ = relative_differences(whole, parts).tolist()
        _check_buffers(
            [
                name
                for name, one, bound, value in zip(names, differ, noise, whole, strict=True)
                if not one <= FACTOR * max(bound, _eps(value))
            ],
            "otherwise if the micro-batch is cut in two",
        )

    def _judge(self, suspects: list[str], whole: _Sums, halves: Halves) -> None:
        if not suspects:
            return
        first, second = self._run(halves.parts[:1]) or {}, self._run(halves.parts[1:]) or {}
        counts = [self._counts([part]) for part in halves.parts]
        for name in suspects:
            term = whole[name]
            values = (term.value, first[name].value, second[name].value)
            law = _law(values, term.unit, counts)
            own_unit = term.unit is None or term.unit in self._counters
            if law is None and term.weight == 0:  # such as a most likely token that changes
                continue
            problem = _problem(name, values, law)
            if law is None and own_unit:
                log.warning("%s. If its rows are no examples by themselves, all is well", problem)
                continue
            raise StepError(
                f"the step was not taken: {problem}. Return the sum (reduction='sum') and let the "
                "step divide by the count of the whole batch; a term that couples its examples is "
                "a samestep.Coupled. check_sums=False leaves this check out. The weights are "
                "unchanged"
            )

    def _done(self, reason: str | None) -> None:
        self._due = False
        _tried.setdefault(self._model, set()).add(self._key)
        if reason:
            log.info("whether the loss sums over its examples was not checked: %s", reason)


def _check_buffers(names: list[str], how: str) -> None:
    if names:
        raise StepError(
            f"the step was not taken: a forward changes the buffer {names[0]!r}"
            + (f" and {len(names) - 1} others" if len(names) > 1 else "")
            + f" of the model, {how}: statistics of the batch that depend on how it is split. "
            "Freeze them (.eval() on that module), or use one without running statistics, such "
            "as LayerNorm or GroupNorm. The weights and buffers are unchanged"
        )


def _suspects(some: _Sums, others: _Sums) -> list[str]:
    """The sums that differ by more than a few roundings; none that are not finite."""
    return [
        name
        for name, one in some.items()
        if name in others
        and one.value.isfinite().all()
        and others[name].value.isfinite().all()
        and _relative(one.value, others[name].value) > _ROUNDINGS * one.eps
    ]


def _relative(one: Tensor, other: Tensor) -> float:
    return float(relative_differences([one], [other])[0])


def _eps(value: Tensor) -> float:
    return float(torch.finfo(value.dtype).eps) if value.is_floating_point() else 0.0


def _law(
    values: tuple[Tensor, Tensor, Tensor], unit: Unit | None, counts: Sequence[Counts]
) -> str | None:
    """Which mean the whole is of its parts, in words; None if it is none."""
    whole, first, second = values
    laws = {"a mean over its rows": (1.0, 1.0)}
    if isinstance(unit, str) and all(count.get(unit) for count in counts):
        laws[f"a mean over unit {unit!r}"] = (counts[0][unit], counts[1][unit])
    for other in ("token", "example"):
        if all(count.get(other) for count in counts):
            laws.setdefault(f"a mean over {other}s", (counts[0][other], counts[1][other]))
    gap = float((whole - first - second).norm())
    errors = {
        name: float((whole - (a * first + b * second) / (a + b)).norm())
        for name, (a, b) in laws.items()
    }
    best = min(errors, key=lambda name: errors[name])
    return best if errors[best] < _LAW_SHARE * gap else None


def _problem(name: str, values: tuple[Tensor, Tensor, Tensor], law: str | None) -> str:
    whole, first, second = (
        float(value.norm()) if value.dim() else float(value) for value in values
    )
    found = f"it looks like {law}" if law else "it is a mean, or it couples its examples"
    return (
        f"term {name!r} is no sum over the examples of a micro-batch: one gives {whole:.6g}, but "
        f"cut in two {first:.6g} and {second:.6g}; {found}, so the step would depend on the split"
    )


def _plain_execution() -> contextlib.AbstractContextManager[Any]:
    """Without compiling anew for the shapes of parts."""
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    stance: Callable[[str], contextlib.AbstractContextManager[Any]] = torch.compiler.set_stance
    return stance("force_eager")


def _identity(loss_fn: Any) -> Any:
    """What tells losses apart, for functions that are made anew for each step too."""
    if isinstance(loss_fn, partial):
        return ("partial", _identity(loss_fn.func))
    if isinstance(loss_fn, MethodType):
        return (loss_fn.__func__.__code__, id(loss_fn.__self__))
    if isinstance(loss_fn, FunctionType):
        cells = [cell.cell_contents for cell in loss_fn.__closure__ or () if _is_filled(cell)]
        return (loss_fn.__code__, *(_identity(cell) for cell in cells if callable(cell)))
    inner = getattr(loss_fn, "loss_fn", None)
    if callable(inner):
        return (type(loss_fn), _identity(inner))
    return (type(loss_fn), id(loss_fn))


def _is_filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True
