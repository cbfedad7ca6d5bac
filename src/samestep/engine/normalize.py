"""Adds sums up over micro-batches and reads them out as values per unit."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from samestep.engine.counts import sequence_targets
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


@dataclass(frozen=True)
class TermSum:
    """A term reduced to one number of one unit: what the step divides and adds up."""

    total: Tensor
    unit: Unit
    weight: float


def divisor(name: str, unit: Unit, counts: Counts) -> float:
    """The number that a term of this unit is divided by.

    Args:
        name: The term's name, for the error.
        unit: The term's unit.
        counts: What was counted.

    Returns:
        The count; 0 if the batch holds none of the unit.

    Raises:
        StepError: Nobody counted the unit.
    """
    if isinstance(unit, Constant):
        return unit.value
    if unit not in counts:
        known = ", ".join(repr(known) for known in counts) or "nothing"
        raise StepError(
            f"term {name!r} is a sum over unit {unit!r}, which nobody counted (counted: {known}). "
            f"Pass counters={{{unit!r}: function of a micro-batch}}, or give micro-batches with "
            "'labels', whose 'token', 'sequence' and 'example' are counted by default"
        )
    return counts[unit]


def reduce_terms(loss: LossResult, micro: MicroBatch, *, normalize: Unit) -> dict[str, TermSum]:
    """What a loss returned, as one 0-d sum for each term (a single term is called "loss").

    Args:
        loss: The loss's result for this micro-batch.
        micro: The micro-batch.
        normalize: The unit that "token" terms are to be normalised by.

    Returns:
        The sums by name.

    Raises:
        StepError: The loss returned no terms, or the normalisation needs other totals.
    """
    return {name: _reduce(name, term, micro, normalize) for name, term in named_terms(loss).items()}


def _reduce(name: str, term: Any, micro: MicroBatch, normalize: Unit) -> TermSum:
    if isinstance(term, Coupled):
        raise StepError(
            f"term {name!r} couples the examples of the whole batch, so it needs a pass over all "
            "micro-batches first: declare it by passing samestep.TwoPass(loss_fn)"
        )
    if not isinstance(term, Term):
        raise StepError(f"term {name!r} of the loss is {type(term).__name__}, not a Term")
    unit = normalize if term.unit == "token" else term.unit
    if term.total.dim() == 0:
        if term.unit == "token" and unit == "sequence":
            raise StepError(
                f"term {name!r}: normalize='sequence' needs a total for each sequence, "
                "[sequences], but the total is one number. Return per-sequence sums, or weigh "
                "the targets by samestep.target_weights and give the unit 'sequence'"
            )
        return TermSum(term.total, unit, term.weight)
    if micro.get("token_weights") is not None:
        raise StepError(
            f"term {name!r} has totals by sequence, but the micro-batch weighs tokens: weigh the "
            "targets by samestep.target_weights and return one number"
        )
    targets, weights = sequence_targets(micro)
    if term.total.shape != targets.shape:
        raise StepError(
            f"term {name!r} has {len(term.total)} totals for {len(targets)} sequences: "
            "return one total a sequence, in reading order, or one number"
        )
    if term.unit == "token" and unit == "sequence":
        weights = weights / targets.where(targets > 0, 1)
    return TermSum((term.total * weights.to(term.total)).sum(), unit, term.weight)


TermKind: TypeAlias = tuple[Unit, float]
"""A term's unit and weight."""

TermTotals: TypeAlias = dict[str, dict[str, Any]]
"""What one rank found of each term: total, unit, weight, and the first micro-batch that was not
finite."""


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
        count = divisor(name, term.unit, counts)
        if term.weight == 0 or count == 0 or not term.total.requires_grad:
            continue
        part = term.total * (term.weight / count)
        share = part if share is None else share + part
    return share


class TermAccumulator:
    """Running sums of the terms, kept on their device until they are read once at the end."""

    def __init__(self) -> None:
        self._totals: dict[str, list[Tensor]] = {}
        self._kinds: dict[str, TermKind] = {}

    def add(self, sums: Mapping[str, TermSum]) -> None:
        """Add one micro-batch.

        Raises:
            StepError: A term changed its unit or weight between micro-batches.
        """
        for name, term in sums.items():
            _check_same_kind(self._kinds, name, (term.unit, term.weight))
            self._totals.setdefault(name, []).append(term.total.detach())

    def facts(self) -> TermTotals:
        """What `reduce_totals` needs of this rank, as JSON."""
        return {name: self._fact(name) for name in self._totals}

    def _fact(self, name: str) -> dict[str, Any]:
        numbers = torch.stack([total.double() for total in self._totals[name]]).tolist()
        bad = [i for i, number in enumerate(numbers) if not math.isfinite(number)]
        unit, weight = self._kinds[name]
        return {
            "total": numbers[bad[0]] if bad else math.fsum(numbers),
            "bad": bad[0] if bad else None,
            "unit": {"constant": unit.value} if isinstance(unit, Constant) else unit,
            "weight": weight,
        }


def reduce_totals(facts: Sequence[TermTotals], counts: Counts) -> tuple[float, dict[str, float]]:
    """The objective, and each term's total / count.

    Args:
        facts: `TermAccumulator.facts` of every rank, in their order.
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
    for rank, of_rank in enumerate(facts):
        for name, fact in of_rank.items():
            unit = fact["unit"]
            unit = Constant(unit["constant"]) if isinstance(unit, dict) else unit
            _check_same_kind(kinds, name, (unit, fact["weight"]))
            totals.setdefault(name, []).append(fact["total"])
            if fact["bad"] is not None:
                where = f" of rank {rank}" if len(facts) > 1 else ""
                problems.append(
                    f"term {name!r} is {fact['total']} in micro-batch {fact['bad']}{where}"
                )
    values = {}
    for name, numbers in totals.items():
        total, unit = sum(numbers), kinds[name][0]
        count = divisor(name, unit, counts)
        if count == 0 and total != 0 and math.isfinite(total):
            problems.append(f"term {name!r} sums to {total} over unit {unit!r}, of which 0")
        values[name] = total / count if count else 0.0
    if problems:
        kind = StepError if all(map(math.isfinite, values.values())) else NotFiniteError
        raise kind("the step was not taken: " + "; ".join(problems) + ". The weights are unchanged")
    return math.fsum(kinds[name][1] * value for name, value in values.items()), values


def _check_same_kind(kinds: dict[str, TermKind], name: str, kind: TermKind) -> None:
    if kinds.setdefault(name, kind) != kind:
        raise StepError(
            f"term {name!r} was {kinds[name]} (unit, weight) in one micro-batch and {kind} in "
            "another of the same batch: they must agree"
        )
