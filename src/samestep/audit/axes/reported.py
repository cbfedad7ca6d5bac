"""The axes that are judged by numbers: what a loop reports, and what an evaluation says."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import torch

from samestep.audit.axes.axis import Measurement
from samestep.audit.causes import UNEXPLAINED, Diagnosis
from samestep.audit.diagnose.reported import (
    diagnose_number,
    diagnose_objective,
    explain_by_parts,
    is_loss,
    relative_change,
    with_padding,
)
from samestep.audit.experiments import TOLERANCE_FACTOR, Experiments
from samestep.audit.gradients import noise_estimate
from samestep.audit.splits import sizes_of, uneven_split
from samestep.errors import CheckError

Numbers = Mapping[str, float]

MAX_CANCELLED = 1e-6
"""Relative change up to which a number may be one that cancels almost to nothing, whose own
rounding is then measured before it is judged."""


PAIRED = 3
"""Examples, of which each two are evaluated together."""

MAX_MEAN_ERROR = 1e-3
"""How far beyond two numbers, relative, another may be and still be a mean of them that was logged
in few digits."""


def evaluation_batch(experiments: Experiments) -> Measurement:
    """The evaluation batch size: loss and every metric, at the same weights."""
    size, sizes = experiments.subject.size, (1, 2, 3)
    reference = experiments.evaluate(size)
    by_size = {each: experiments.evaluate(each) for each in sizes}
    steady = steady_numbers(reference, experiments.evaluate(size))

    def diagnose(key: str) -> Diagnosis:
        if is_loss(key):
            coupled = _coupling(experiments, key)
            if coupled > max(experiments.tolerance, 1e-9):
                text = f"two equal examples together miss the mean of the two by {coupled:.1e}"
                return Diagnosis("batch-coupled-term", coupled, text)
        batches = uneven_split(size)
        alone = [experiments.evaluate(len(batch), batch).get(key, math.nan) for batch in batches]
        diagnosis = explain_by_parts(
            by_size[3][key],
            alone,
            examples=list(map(len, batches)),
            cause="eval-mean-of-means" if is_loss(key) else "metric-mean-of-means",
        )

        def read(**changes: object) -> float:
            return experiments.evaluate(3, None, **changes).get(key, math.nan)

        padded = with_padding(experiments, diagnosis, read=read)
        if padded is not diagnosis or not (is_loss(key) or diagnosis.cause == UNEXPLAINED):
            return padded
        # A mean of batches is one however their rows are coupled; a metric need be no mean of rows.
        return _beyond_means(experiments, key) or diagnosis

    def perturbed(key: str) -> list[list[float]]:
        points = (None, *experiments.perturbations)
        return [
            [experiments.evaluate(each, perturbation=point)[key] for point in points]
            for each in (size, 1)
        ]

    return measure_numbers(
        experiments,
        steady,
        reference=reference,
        others=list(by_size.values()),
        reason=f"evaluation at batch {', '.join(map(str, sizes))} against {size}",
        diagnose=diagnose,
        perturbed=perturbed,
    )


def reported(experiments: Experiments) -> Measurement:
    """What the loop reports of itself: is it the same under every split, and what was optimised?"""
    splits, batch = experiments.splits, experiments.whole_batch
    reference = experiments.run(batch).reported
    if not reference:
        raise CheckError("the loop reports no numbers")
    steady = steady_numbers(reference, experiments.rerun(batch).reported)

    def perturbed(key: str) -> list[list[float]]:
        points = (None, *experiments.perturbations)
        return [
            [experiments.run(split, perturbation=point).reported[key] for point in points]
            for split in (batch, experiments.single_examples)
        ]

    measurement = measure_numbers(
        experiments,
        steady,
        reference=reference,
        others=[experiments.run(split).reported for split in splits],
        reason=f"what is reported at {', '.join(map(sizes_of, splits))} against the whole",
        diagnose=lambda key: diagnose_number(experiments, splits[0], key=key),
        perturbed=perturbed,
    )
    if not measurement.is_exact(experiments.tolerance) or "loss" not in steady:
        return measurement
    other = diagnose_objective(experiments)
    if other is None:
        return measurement
    return Measurement(
        "the change of the reported loss with the weights against the gradient",
        relative_difference=other.residual,
        exact=False,
        diagnose=lambda: other,
    )


def measure_numbers(
    experiments: Experiments,
    steady: Sequence[str],
    *,
    reference: Numbers,
    others: Sequence[Numbers],
    reason: str,
    diagnose: Callable[[str], Diagnosis],
    perturbed: Callable[[str], Sequence[Sequence[float]]],
) -> Measurement:
    """The worst change of any number; a loss comes before a metric.

    Args:
        experiments: The subject's.
        steady: The numbers that are the same when nothing changed.
        reference: The numbers of the whole batch.
        others: Those of the other splits.
        reason: What was compared.
        diagnose: Why a number changes.
        perturbed: Rows of a number's values while the weights move by roundings.

    Returns:
        The measurement; exact where only counts change.
    """
    changes = {
        key: max(relative_change(each.get(key, math.nan), reference[key]) for each in others)
        for key in steady
        if not _is_count(key, [reference, *others])
    }
    inexact = [
        key
        for key, change in changes.items()
        if not change <= experiments.tolerance
        and not (change < MAX_CANCELLED and _is_noise(change, perturbed(key)))
    ]
    losses = [key for key in inexact if is_loss(key)]
    worst = max(losses or inexact or changes, key=lambda key: changes[key], default=None)
    if worst is None:
        return Measurement(f"{reason}: nothing but counts", exact=True)
    key = worst
    shown = ", ".join(f"{other[key]:.6g}" for other in others if key in other)
    return Measurement(
        reason,
        relative_difference=changes[key],
        ratio=others[0].get(key, math.nan) / reference[key] if reference[key] else None,
        exact=not inexact,
        evidence=f"{key}: {reference[key]:.6g} against {shown}",
        diagnose=lambda: diagnose(key),
    )


def _is_noise(change: float, perturbed: Sequence[Sequence[float]]) -> bool:
    """Whether a number changes no more than it varies while the weights move by roundings."""
    noise = max(
        noise_estimate([{"": torch.tensor([value], dtype=torch.float64)} for value in values])
        for values in perturbed
    )
    return change <= TOLERANCE_FACTOR * noise


def _coupling(experiments: Experiments, key: str) -> float:
    """How far an evaluation of two examples of equal counts is from the mean of the two's own."""
    try:
        pair = experiments.evaluate(2, (0, 0), alter_repeats=True)[key]
        own = experiments.evaluate(2, (0,))[key]
        altered = experiments.evaluate(2, (0,), altered_examples=(0,))[key]
    except Exception:  # the subject is the user's code: it may refuse changed inputs
        return 0.0
    return relative_change(pair, (own + altered) / 2)


def _beyond_means(experiments: Experiments, key: str) -> Diagnosis | None:
    """Whether two examples together give a number that is no mean of their own, by any weights.

    Unlike `_coupling` it changes no input, so it can be asked of every evaluation.
    """
    alone = [experiments.evaluate(2, (at,)).get(key, math.nan) for at in range(PAIRED)]
    found, sums = [], True
    for first, second in itertools.combinations(range(PAIRED), 2):
        together = experiments.evaluate(2, (first, second)).get(key, math.nan)
        low, high = sorted((alone[first], alone[second]))
        size = max(low - together, together - high) / max(map(abs, (together, low, high, 1e-12)))
        found.append((size, first, second, together))
        sums = sums and relative_change(together, low + high) <= MAX_MEAN_ERROR
    size, first, second, together = max(found)
    if sums or not size > MAX_MEAN_ERROR:
        return None
    text = (
        f"examples {first} and {second} give {alone[first]:.6g} and {alone[second]:.6g} alone, "
        f"{together:.6g} in one batch: no mean of the two, by whatever weights"
    )
    return Diagnosis("batch-coupled-term", size, text)


def steady_numbers(first: Numbers, again: Numbers) -> list[str]:
    """The numbers that are the same when nothing changed: times and rates are not.

    Args:
        first: By name.
        again: Those of a repeat.
    """
    return [
        key for key, value in first.items() if relative_change(again.get(key, math.nan), value) == 0
    ]


def _is_count(key: str, measured: Sequence[Numbers]) -> bool:
    """Whether a number only counts, as micro-batches or padded tokens: a whole number each time."""
    values = [numbers[key] for numbers in measured if key in numbers]
    integral = all(math.isfinite(value) and value == round(value) for value in values)
    return integral and not is_loss(key) and max(map(abs, values), default=0.0) >= 1
