"""Batch-coupled terms, exact for any differentiable function, in two passes.

The first pass runs every micro-batch without a graph and gathers the statistic s; value(s) and
its derivative at s are then computed once. The second pass adds <derivative at s, part> to each
micro-batch's objective, whose gradient is by the chain rule that of value(s). The idea is that of
GradCache (arXiv:2101.06983), here for any statistic.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

from samestep.engine.collectives import (
    all_gather_object,
    all_reduce_sum,
    any_rank,
    gather_rows,
    rank,
    row_offset,
)
from samestep.engine.content import content_digest
from samestep.engine.normalize import TermSum
from samestep.engine.oom import memory_guard
from samestep.engine.parallel import Schedule, gather_micro_batch_results, is_sharded, unwrap
from samestep.engine.terms import (
    Coupled,
    LossFn,
    LossResult,
    MicroBatch,
    Term,
    constant,
    named_terms,
)
from samestep.errors import NotFiniteError, StepError
from samestep.utils.agreement import FACTOR, relative_differences, rounding_noise
from samestep.utils.random_numbers import same_random_numbers

PartShapes: TypeAlias = dict[str, tuple[str, list[int], str]]
"""How each coupled term is gathered, and the shape and device of its first part."""


@dataclass(frozen=True)
class TwoPass:
    """Declares that a loss returns `Coupled` terms, so that the step runs it twice.

    Attributes:
        loss_fn: The loss. Called twice on a micro-batch it must give the same statistic, so
            randomness in it must be keyed to the examples.

    Example:
        In-batch negatives: each output against those of the whole batch, not of its micro-batch.

        >>> import torch, samestep
        >>> def info_nce(outputs):
        ...     return -torch.diagonal((outputs @ outputs.T).log_softmax(dim=1)).mean()
        >>> def loss_fn(model, micro_batch):
        ...     return samestep.Coupled(model(micro_batch), info_nce, gather="rows")
        >>> _ = torch.manual_seed(0)
        >>> model, batch = torch.nn.Linear(3, 2).double(), torch.randn(6, 3).double()
        >>> gradients = []
        >>> for size in (6, 4, 1):
        ...     _ = samestep.backward(model, batch.split(size), samestep.TwoPass(loss_fn))
        ...     gradients.append(model.weight.grad.clone())
        >>> [torch.allclose(gradient, gradients[0]) for gradient in gradients]
        [True, True, True]
    """

    loss_fn: LossFn

    def __call__(self, model: nn.Module, micro_batch: MicroBatch) -> LossResult:
        """What the loss returns."""
        return self.loss_fn(model, micro_batch)


class GatheredTerms:
    """Coupled terms over a whole effective batch: their parts, then their values and gradients.

    With several ranks each adds its own micro-batches; `compute` gathers the parts of all.

    Args:
        sort: Put the parts in the order of what their micro-batches hold, so that the value and its
            gradient have the same bits on any ranks, in any order.
    """

    def __init__(self, *, sort: bool = False) -> None:
        self._sort = sort
        self._keys: list[str] = []
        self._parts: dict[str, list[Tensor]] = {}
        self._terms: dict[str, Coupled] = {}  # of the first micro-batch, which stand for all
        self._gradients: dict[str, list[Tensor]] = {}  # of the value, at each part
        self._values: dict[str, Tensor] = {}
        self._repeated: dict[str, list[Tensor]] = {}
        self._num_micro_batches = 0
        self._reports = True

    def add(self, loss: LossResult, micro_batch: MicroBatch) -> dict[str, Term]:
        """Keep the parts of one micro-batch.

        Args:
            loss: What the loss returned for it.
            micro_batch: It.

        Returns:
            The terms that are not coupled.

        Raises:
            StepError: Micro-batches do not have the same coupled terms.
        """
        terms, coupled = _split_terms(loss)
        if self._num_micro_batches == 0:
            self._terms = coupled
            self._parts = {name: [] for name in coupled}
        self._check_names(coupled)
        for name, term in coupled.items():
            self._parts[name].append(term.part.detach().double())
        self._num_micro_batches += 1
        if self._sort and coupled:
            self._keys.append(content_digest(micro_batch))
        return terms

    def shapes(self) -> PartShapes:
        """What this rank coupled, as JSON: `compute` takes that of every rank."""
        return {
            name: (term.gather, list(parts[0].shape), parts[0].device.type)
            for (name, term), parts in zip(self._terms.items(), self._parts.values(), strict=True)
        }

    def compute(self, shapes: Sequence[PartShapes]) -> None:
        """Compute each term's value at the whole statistic, and its gradient at every part.

        Args:
            shapes: `shapes` of every rank; those without a micro-batch have none, but take part.

        Raises:
            StepError: A value is not one finite number, or ranks do not have the same terms.
        """
        first_shapes = next((rank_shapes for rank_shapes in shapes if rank_shapes), {})
        for name, (gather, shape, device) in first_shapes.items():
            gather_parts = partial(_gather_sorted, keys=self._keys) if self._sort else _gather_parts
            statistic, places = gather_parts(
                self._parts.get(name, []), gather=gather, shape=shape, device=device
            )
            if name in self._terms:
                self._differentiate(name, statistic, places=places)
        self._reports = bool(self._terms) and not any(shapes[: rank()])

    def _differentiate(self, name: str, statistic: Tensor, *, places: Sequence[int]) -> None:
        term, parts = self._terms[name], self._parts[name]
        with torch.enable_grad():
            leaf = statistic.requires_grad_()
            value = term.value(leaf)
            _check_value(name, value)
            gradient = torch.zeros_like(statistic)
            if value.requires_grad:
                (gradient,) = torch.autograd.grad(value, leaf)
        self._values[name] = value.detach()
        if term.gather == "sum":
            self._gradients[name] = [gradient] * len(parts)
        else:
            self._gradients[name] = [
                gradient[place : place + len(part)]
                for place, part in zip(places, parts, strict=True)
            ]

    def values(self) -> dict[str, TermSum]:
        """The terms' values over the whole batch, without a graph, on the one rank that reports."""
        if not self._reports:
            return {}
        return {
            name: TermSum(value, constant(1), self._terms[name].weight)
            for name, value in self._values.items()
        }

    def value_of(self, name: str) -> Tensor:
        """A term's value over the whole batch, without a graph, on any rank with a micro-batch."""
        return self._values[name]

    def resolve(self, loss: LossResult, index: int) -> LossResult:
        """Put in the place of each coupled term one whose gradient is this micro-batch's share.

        Args:
            loss: What the loss returned in the second pass.
            index: The micro-batch.

        Returns:
            Terms only. Those of coupled ones add up over the micro-batches to value(s).

        Raises:
            StepError: The terms, or the shape of a part, are others than in the first pass.
        """
        if not self._terms:
            return loss
        terms, coupled = _split_terms(loss)
        self._check_names(coupled)
        for name, term in coupled.items():
            first = self._parts[name][index]
            if first.shape != term.part.shape:
                raise _not_repeatable(name)
            self._repeated.setdefault(name, []).append(_difference(first, term.part))
            share = (self._gradients[name][index] * term.part.double()).sum()
            value = self._values[name]
            if index > 0 or not self._reports:
                value = torch.zeros_like(value)
            # The share counts for its gradient alone; the reported number is the value itself.
            terms[name] = Term(value + (share - share.detach()), constant(1), term.weight)
        return terms

    def check_repeated(self, model: nn.Module, schedule: Schedule, *, loss_fn: LossFn) -> None:
        """Compare the passes, once for all micro-batches so that a GPU is waited for once.

        Passes that are equal bit for bit need no more. Else the noise of the statistic is measured
        (`samestep.utils.agreement`) on the micro-batch that differs most, in three forwards.

        Args:
            model: The model.
            schedule: This rank's micro-batches, as for `first_pass`.
            loss_fn: The loss.

        Raises:
            StepError: The second pass gave another statistic than the first.
        """
        if not isinstance(loss_fn, TwoPass):
            return
        differences = {name: torch.stack(each).tolist() for name, each in self._repeated.items()}
        differ = any(value != 0 for each in differences.values() for value in each)
        # Under FSDP2 every rank must take part in a forward.
        if not (any_rank(differ) if is_sharded(model) else differ):
            return
        micro_batch, _ = schedule[_most_different(list(differences.values()))]
        noise = _part_noise(model, micro_batch, loss_fn=loss_fn)
        for name, each in differences.items():
            if not all(value <= FACTOR * noise[name] for value in each):
                raise _not_repeatable(name)

    def _check_names(self, coupled: Mapping[str, Coupled]) -> None:
        if coupled.keys() != self._terms.keys():
            raise StepError(
                f"the loss returned the coupled terms {sorted(coupled)} for one micro-batch and "
                f"{sorted(self._terms)} for another: they must be the same. An empty micro-batch "
                "gives zeros, or no rows"
            )


def first_pass(
    model: nn.Module, schedule: Schedule, *, loss_fn: LossFn, sort: bool = False
) -> GatheredTerms:
    """Gather what a `TwoPass` loss couples; nothing is run for any other loss.

    Args:
        model: The model, in the mode of the step.
        schedule: This rank's micro-batches, of
            `samestep.engine.parallel.schedule_micro_batches`.
        loss_fn: The loss.
        sort: As for `GatheredTerms`.

    Returns:
        What `GatheredTerms.resolve` needs in the second pass.

    Raises:
        StepError: The coupled terms do not fit together, or have no finite value.
    """
    gathered = GatheredTerms(sort=sort)

    def run_micro_batches() -> PartShapes:
        for micro_batch, index in schedule:
            with memory_guard(micro_batch):
                result = loss_fn(unwrap(model), micro_batch)
            if index is not None:
                gathered.add(result, micro_batch)
        return gathered.shapes()

    if isinstance(loss_fn, TwoPass):
        with torch.no_grad():
            gathered.compute(gather_micro_batch_results(model, run_micro_batches))
    return gathered


def _gather_parts(
    parts: list[Tensor], *, gather: str, shape: list[int], device: str
) -> tuple[Tensor, list[int]]:
    """The statistic of all ranks' parts, and where the rows of each part of this rank start in it.

    A rank without parts takes part with zeros of a part's shape, or with no rows.
    """
    zeros = torch.zeros(
        shape if gather == "sum" else [0, *shape[1:]], dtype=torch.float64, device=device
    )
    if gather == "sum":
        return all_reduce_sum(torch.stack(parts).sum(0) if parts else zeros), []
    rows = torch.cat(parts) if parts else zeros
    starts = itertools.accumulate((len(part) for part in parts), initial=row_offset(len(rows)))
    return gather_rows(rows), list(starts)[: len(parts)]


def _gather_sorted(
    parts: list[Tensor], *, keys: Sequence[str], gather: str, shape: list[int], device: str
) -> tuple[Tensor, list[int]]:
    """`_gather_parts`, with the parts of all ranks in the order of their keys."""
    as_rows = [part[None] if gather == "sum" else part for part in parts]
    zeros = torch.zeros(
        [0, *(shape if gather == "sum" else shape[1:])], dtype=torch.float64, device=device
    )
    rows = gather_rows(torch.cat(as_rows) if parts else zeros)
    sizes_by_rank = all_gather_object([len(part) for part in as_rows])
    keys_by_rank = all_gather_object(list(keys))
    pieces = rows.split([size for sizes in sizes_by_rank for size in sizes])
    labels = [
        (key, number, at) for number, own in enumerate(keys_by_rank) for at, key in enumerate(own)
    ]
    order = sorted(range(len(labels)), key=lambda at: labels[at])
    statistic = torch.cat([pieces[at] for at in order])
    starts = itertools.accumulate((len(pieces[at]) for at in order), initial=0)
    start_of = dict(zip([labels[at][1:] for at in order], starts, strict=False))
    places = [start_of[rank(), at] for at in range(len(parts))]
    return (statistic.sum(0) if gather == "sum" else statistic), places


def _split_terms(loss: LossResult) -> tuple[dict[str, Term], dict[str, Coupled]]:
    named = named_terms(loss)
    coupled = {name: term for name, term in named.items() if isinstance(term, Coupled)}
    terms = {name: term for name, term in named.items() if not isinstance(term, Coupled)}
    return terms, coupled


def _check_value(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor) or value.dim() != 0:
        raise StepError(f"coupled term {name!r}: value(s) must be one number, a 0-d tensor")
    if not value.isfinite():
        raise NotFiniteError(
            f"the step was not taken: coupled term {name!r} is {value.item()} over the whole "
            "batch. The weights are unchanged"
        )


def _difference(first: Tensor, second: Tensor) -> Tensor:
    """The relative difference of a part between the passes: 0-d."""
    return relative_differences([first], [second.detach()])[0]


def _most_different(differences: Sequence[Sequence[float]]) -> int:
    """The micro-batch that differs most in any of the terms; the first if there is none."""
    largest = [max(each) for each in zip(*differences, strict=True)]
    return largest.index(max(largest)) if largest else 0


def _part_noise(model: nn.Module, micro_batch: MicroBatch, *, loss_fn: LossFn) -> dict[str, float]:
    """The relative rounding noise of each coupled part of a micro-batch.

    It is no less than a rounding of the part's type: compiled code does not show its operations.
    """
    floors: dict[str, float] = {}

    def parts() -> list[Tensor]:
        with same_random_numbers(), memory_guard(micro_batch):
            _, coupled = _split_terms(loss_fn(unwrap(model), micro_batch))
        for name, term in coupled.items():
            floors[name] = float(torch.finfo(term.part.dtype).eps)
        return [term.part for term in coupled.values()]

    measured = rounding_noise(parts)
    return {name: max(value, floors[name]) for name, value in zip(floors, measured, strict=True)}


def _not_repeatable(name: str) -> StepError:
    return StepError(
        f"coupled term {name!r}: the second pass gave another statistic than the first, so "
        "its gradient would be wrong. The loss or the model draws random numbers that are "
        "not tied to the examples (dropout, sampling): tie them, or turn them off"
    )
