"""Divides: from terms to a micro-batch's share of the objective, and to the values reported.

A micro-batch's share of the objective is the sum of weight * total / count over its terms, and is
what the step runs backward (`objective_share`). The values of the report are the same totals, added
up over all micro-batches and ranks and divided once (`TermAccumulator`, `reduce_totals`).
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from samestep.engine.counts import targets_per_sequence, weights_per_target
from samestep.engine.exact_sum import exact_parts, rounded_sum
from samestep.engine.terms import (
    Constant,
    Counts,
    Coupled,
    LossResult,
    MicroBatch,
    Term,
    Unit,
    named_terms,
)
from samestep.errors import NotFiniteError, StepError

log = logging.getLogger("samestep")

_LOW_PRECISION = (torch.bfloat16, torch.float16)

_named_as_low: set[tuple[str, torch.dtype]] = set()
"""Terms of which it was said that their total is of low precision, each with its type."""

TermKind: TypeAlias = tuple[Unit, float]
"""A term's unit and weight."""

TermTotals: TypeAlias = dict[str, dict[str, Any]]
"""What one rank sends to the others of each term, as JSON: "total" (`exact_parts`), "unit",
"weight", "nonfinite", the number of the first micro-batch whose total was not finite, or None, and
"graph", whether its total had a graph in any micro-batch."""


@dataclass(frozen=True)
class TermSum:
    """A term reduced to one number of one unit: what the step divides and adds up."""

    total: Tensor
    unit: Unit
    weight: float


def divisor(name: str, unit: Unit, *, counts: Counts) -> float:
    """The number that a term of this unit is divided by.

    Args:
        name: The term's name, for the error.
        unit: The term's unit.
        counts: The counts over the whole effective batch.

    Returns:
        The count; 0 if the batch holds none of the unit.

    Raises:
        StepError: Nobody counted the unit.
    """
    if isinstance(unit, Constant):
        return unit.value
    if unit not in counts:
        units = ", ".join(map(repr, counts)) or "nothing"
        raise StepError(
            f"term {name!r} is a sum over unit {unit!r}, which nobody counted (counted: {units}). "
            f"Pass counters={{{unit!r}: function of a micro-batch}}, or give micro-batches with "
            "'labels', whose 'token', 'sequence' and 'example' are counted by default"
        )
    return counts[unit]


def reduce_terms(
    loss: LossResult, micro_batch: MicroBatch, *, normalize: Unit
) -> dict[str, TermSum]:
    """What a loss returned, as one 0-d sum for each term (a single term is called "loss").

    Args:
        loss: The loss's result for this micro-batch.
        micro_batch: The micro-batch.
        normalize: The unit that "token" terms are to be normalised by.

    Returns:
        The sums by name.

    Raises:
        StepError: The loss returned no terms, or the normalisation needs other totals.
    """
    return {
        name: _sum_term(name, term, micro_batch=micro_batch, normalize=normalize)
        for name, term in named_terms(loss).items()
    }


def _sum_term(name: str, term: Any, *, micro_batch: MicroBatch, normalize: Unit) -> TermSum:
    if isinstance(term, Coupled):
        raise StepError(
            f"term {name!r} couples the examples of the whole batch, so it needs a pass over all "
            "micro-batches first: declare it by passing samestep.TwoPass(loss_fn)"
        )
    if not isinstance(term, Term):
        raise StepError(f"term {name!r} of the loss is {type(term).__name__}, not a Term")
    unit = normalize if term.unit == "token" else term.unit
    by_sequence = term.unit == "token" and unit == "sequence"
    total = _at_least_float32(name, term.total)
    if total.dim() == 0:
        if by_sequence:
            raise StepError(
                f"term {name!r}: normalize='sequence' needs a total for each sequence, "
                "[sequences], but the total is one number. Return per-sequence sums, or weigh "
                "the targets by samestep.target_weights and give the unit 'sequence'"
            )
        return TermSum(total, unit, term.weight)
    if micro_batch.get("token_weights") is not None:
        raise StepError(
            f"term {name!r} has totals by sequence, but the micro-batch weighs tokens: weigh the "
            "targets by samestep.target_weights and return one number"
        )
    targets, weights = targets_per_sequence(micro_batch)
    if term.total.shape != targets.shape:
        raise StepError(
            f"term {name!r} has {len(term.total)} totals for {len(targets)} sequences: "
            "return one total a sequence, in reading order, or one number"
        )
    if by_sequence:
        weights = weights_per_target(targets, weights)
    return TermSum((total * weights.to(total)).sum(), unit, term.weight)


def _at_least_float32(name: str, total: Tensor) -> Tensor:
    """The total in float32 at least; once a term, what to do if it was rounded before."""
    if total.dtype not in _LOW_PRECISION:
        return total
    if (name, total.dtype) not in _named_as_low:
        _named_as_low.add((name, total.dtype))
        log.warning(
            "term %r is a sum in %s, which keeps %s digits: it is rounded, otherwise under every "
            "split. Sum in float32: losses.float().sum(). Under torch.autocast mind that a product "
            "(losses @ weights) is rounded; (losses.float() * weights).sum() is not",
            name,
            str(total.dtype).removeprefix("torch."),
            "two to three" if total.dtype == torch.bfloat16 else "three to four",
        )
    return total.float()


def objective_share(sums: Mapping[str, TermSum], counts: Counts) -> Tensor | None:
    """This micro-batch's share of the objective: sum of weight * total / count.

    Args:
        sums: The terms of the micro-batch.
        counts: The counts of the whole effective batch.

    Returns:
        0-d, or None if nothing in it is to be optimised: every term is a metric (weight 0),
        is detached, or is in a unit of which the batch holds none.

    Raises:
        StepError: Nobody counted a term's unit.
    """
    share: Tensor | None = None
    for name, term in sums.items():
        count = divisor(name, term.unit, counts=counts)
        if term.weight == 0 or count == 0 or not term.total.requires_grad:
            continue
        summand = term.total * (term.weight / count)
        share = summand if share is None else share + summand
    return share


class TermAccumulator:
    """Running sums of the terms, kept on their device until they are read once at the end."""

    def __init__(self) -> None:
        self._totals: dict[str, list[Tensor]] = {}
        self._kinds: dict[str, TermKind] = {}
        self._with_graph: set[str] = set()

    def add(self, sums: Mapping[str, TermSum]) -> None:
        """Add one micro-batch.

        Args:
            sums: Its terms, of `reduce_terms`.

        Raises:
            StepError: A term changed its unit or weight between micro-batches.
        """
        for name, term in sums.items():
            _check_same_kind(self._kinds, name, kind=(term.unit, term.weight))
            self._totals.setdefault(name, []).append(term.total.detach())
            if term.total.requires_grad:
                self._with_graph.add(name)

    def totals(self) -> TermTotals:
        """The sums over this rank's micro-batches, as JSON, for `reduce_totals`."""
        values = iter(_read([total for each in self._totals.values() for total in each]))
        return {
            name: self._total(name, [next(values) for _ in each])
            for name, each in self._totals.items()
        }

    def _total(self, name: str, totals: list[float]) -> dict[str, Any]:
        nonfinite = [index for index, total in enumerate(totals) if not math.isfinite(total)]
        unit, weight = self._kinds[name]
        return {
            "total": exact_parts(totals),
            "nonfinite": nonfinite[0] if nonfinite else None,
            "unit": {"constant": unit.value} if isinstance(unit, Constant) else unit,
            "weight": weight,
            "graph": name in self._with_graph,
        }


def _read(totals: Sequence[Tensor]) -> list[float]:
    """The numbers of 0-d tensors; a device is waited for once."""
    on_cpu = {
        device: iter(torch.stack([one.double() for one in totals if one.device == device]).tolist())
        for device in {one.device for one in totals}
    }
    return [next(on_cpu[one.device]) for one in totals]


def reduce_totals(
    totals_by_rank: Sequence[TermTotals], counts: Counts
) -> tuple[float, dict[str, float]]:
    """The objective, and each term's total / count.

    Args:
        totals_by_rank: `TermAccumulator.totals` of every rank, in their order.
        counts: The counts over all micro-batches of all ranks.

    Returns:
        The objective and the values by term, without weights. A term in a unit of which there
        was none has the value 0.

    Raises:
        NotFiniteError: A term is not finite.
        StepError: A term has a total although its unit counts 0, or another unit or weight on
            another rank.
    """
    totals: dict[str, list[float]] = {}
    kinds: dict[str, TermKind] = {}
    problems = []
    for rank, rank_totals in enumerate(totals_by_rank):
        for name, term in rank_totals.items():
            unit = term["unit"]
            unit = Constant(unit["constant"]) if isinstance(unit, dict) else unit
            _check_same_kind(kinds, name, kind=(unit, term["weight"]))
            totals.setdefault(name, []).extend(term["total"])
            if term["nonfinite"] is not None:
                of_rank = f" of rank {rank}" if len(totals_by_rank) > 1 else ""
                problems.append(
                    f"term {name!r} is {term['total'][0]} in micro-batch "
                    f"{term['nonfinite']}{of_rank}"
                )
    values = {}
    for name, parts in totals.items():
        total, unit = rounded_sum(parts), kinds[name][0]
        count = divisor(name, unit, counts=counts)
        if count == 0 and total != 0 and math.isfinite(total):
            problems.append(f"term {name!r} sums to {total} over unit {unit!r}, of which 0")
        values[name] = total / count if count else 0.0
    if problems:
        error = StepError if all(map(math.isfinite, values.values())) else NotFiniteError
        raise error(
            "the step was not taken: " + "; ".join(problems) + ". The weights are unchanged"
        )
    return math.fsum(kinds[name][1] * value for name, value in values.items()), values


def _check_same_kind(kinds: dict[str, TermKind], name: str, *, kind: TermKind) -> None:
    if kinds.setdefault(name, kind) != kind:
        raise StepError(
            f"term {name!r} was {kinds[name]} (unit, weight) in one micro-batch and {kind} in "
            "another of the same batch: they must agree"
        )
