"""Adds sums up over micro-batches and reads them out as values per unit."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from samestep.errors import NotFiniteError, StepError
from samestep.terms import Constant, Counts, Sum, Unit, divisor

Kind: TypeAlias = tuple[Unit, float]
"""A term's unit and weight."""

Facts: TypeAlias = dict[str, dict[str, Any]]
"""What one rank found of each term: total, unit, weight, and the first micro-batch that was not
finite."""


def objective_share(sums: Mapping[str, Sum], counts: Counts) -> Tensor | None:
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


class Tally:
    """Running sums of the terms, kept on their device until they are read once at the end."""

    def __init__(self) -> None:
        self._totals: dict[str, list[Tensor]] = {}
        self._kinds: dict[str, Kind] = {}

    def add(self, sums: Mapping[str, Sum]) -> None:
        """Add one micro-batch.

        Raises:
            StepError: A term changed its unit or weight between micro-batches.
        """
        for name, term in sums.items():
            _same_kind(self._kinds, name, (term.unit, term.weight))
            self._totals.setdefault(name, []).append(term.total.detach())

    def facts(self) -> Facts:
        """What `read` needs of this rank, as JSON."""
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


def read(facts: Sequence[Facts], counts: Counts) -> tuple[float, dict[str, float]]:
    """The objective, and each term's total / count.

    Args:
        facts: `Tally.facts` of every rank, in their order.
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
    kinds: dict[str, Kind] = {}
    problems = []
    for rank, of_rank in enumerate(facts):
        for name, fact in of_rank.items():
            unit = fact["unit"]
            unit = Constant(unit["constant"]) if isinstance(unit, dict) else unit
            _same_kind(kinds, name, (unit, fact["weight"]))
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


def _same_kind(kinds: dict[str, Kind], name: str, kind: Kind) -> None:
    if kinds.setdefault(name, kind) != kind:
        raise StepError(
            f"term {name!r} was {kinds[name]} (unit, weight) in one micro-batch and {kind} in "
            "another of the same batch: they must agree"
        )
