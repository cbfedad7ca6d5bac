"""Adds sums up over micro-batches and reads them out as values per unit."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from samestep.errors import StepError
from samestep.terms import Counts, Sum, Unit, divisor


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
        self._kinds: dict[str, tuple[Unit, float]] = {}

    def add(self, sums: Mapping[str, Sum]) -> None:
        """Add one micro-batch.

        Raises:
            StepError: A term changed its unit or weight between micro-batches.
        """
        for name, term in sums.items():
            kind = self._kinds.setdefault(name, (term.unit, term.weight))
            if kind != (term.unit, term.weight):
                raise StepError(
                    f"term {name!r} was {kind} (unit, weight) in one micro-batch and "
                    f"{(term.unit, term.weight)} in another of the same batch: they must agree"
                )
            self._totals.setdefault(name, []).append(term.total.detach())

    def read(self, counts: Counts) -> tuple[float, dict[str, float]]:
        """The objective, and each term's total / count.

        Args:
            counts: The counts over the same micro-batches.

        Returns:
            The objective and the values by term, without weights. A term in a unit of which
            there was none has the value 0.

        Raises:
            StepError: A term is not finite, or has a total although its unit counts 0.
        """
        values, problems = {}, []
        for name, totals in self._totals.items():
            numbers = torch.stack([total.double() for total in totals]).tolist()
            total, unit = math.fsum(numbers) if _finite(numbers) else math.nan, self._kinds[name][0]
            count = divisor(name, unit, counts)
            if not math.isfinite(total):
                bad = [i for i, number in enumerate(numbers) if not math.isfinite(number)]
                problems.append(f"term {name!r} is {numbers[bad[0]]} in micro-batch {bad[0]}")
            elif count == 0 and total != 0:
                problems.append(f"term {name!r} sums to {total} over unit {unit!r}, of which 0")
            values[name] = total / count if count else 0.0
        if problems:
            raise StepError(
                "the step was not taken: " + "; ".join(problems) + ". The weights are unchanged"
            )
        return math.fsum(self._kinds[name][1] * value for name, value in values.items()), values


def _finite(numbers: list[float]) -> bool:
    return all(math.isfinite(number) for number in numbers)
