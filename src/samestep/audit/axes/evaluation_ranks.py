"""The axis of an evaluation on ranks: two processes say what one says of the same batches."""

import math
from collections.abc import Sequence

from samestep.audit.axes.axis import Measurement
from samestep.audit.axes.ranks import WORLD
from samestep.audit.axes.reported import Numbers, measure_numbers, steady_numbers
from samestep.audit.causes import UNEXPLAINED, Diagnosis
from samestep.audit.diagnose.reported import MAX_PREDICTION_ERROR, is_loss, relative_change
from samestep.audit.experiments import Experiments
from samestep.audit.subject import Evaluated
from samestep.errors import CheckError

BATCH = 2
"""Of an evaluation, on one rank and on several: what a batch does is another axis's matter."""


def evaluation_ranks(experiments: Experiments) -> Measurement:
    """The evaluation on two ranks: of an even number of batches, then of an odd number of rows.

    The ranks are dealt the batches that one process has, so that only their number changes. What
    counts is what the first rank says: it writes the log.
    """
    size = experiments.subject.size
    measurement = _measure(experiments, size // (BATCH * WORLD) * BATCH * WORLD)
    if measurement.is_exact(experiments.tolerance):
        return _measure(experiments, size - 1 + size % 2)
    return measurement


def _measure(experiments: Experiments, number: int) -> Measurement:
    examples = tuple(range(number))
    reference = experiments.evaluate(BATCH, examples)
    steady = steady_numbers(reference, experiments.evaluate(BATCH, examples))
    ranks = _on_ranks(experiments, examples)

    def perturbed(key: str) -> list[list[float]]:
        points = (None, *experiments.perturbations)
        return [
            [experiments.evaluate(BATCH, examples, perturbation=point)[key] for point in points]
        ]

    return measure_numbers(
        experiments,
        steady,
        reference=reference,
        others=[ranks[0].numbers],
        reason=f"evaluation of {number} examples at batch {BATCH} on {WORLD} ranks against 1",
        diagnose=lambda key: _diagnose(experiments, ranks, key=key, examples=examples),
        perturbed=perturbed,
    )


def _on_ranks(experiments: Experiments, examples: Sequence[int]) -> list[Evaluated]:
    evaluate = getattr(experiments.subject, "evaluate_on_ranks", None)
    if evaluate is None:
        raise CheckError("the subject does not evaluate on several ranks")
    ranks: list[Evaluated] = evaluate(BATCH, experiments.settings, examples=examples, world=WORLD)
    return ranks


def _diagnose(
    experiments: Experiments, ranks: Sequence[Evaluated], *, key: str, examples: Sequence[int]
) -> Diagnosis:
    """Why ranks say another number: what they were dealt, or how they put it together."""
    said = " and ".join(f"{rank.numbers.get(key, math.nan):.6g}" for rank in ranks)
    text = f"the ranks say {said}"
    dealt = [example for rank in ranks for example in rank.examples]
    if sorted(dealt) != sorted(examples) and all(rank.examples for rank in ranks):
        cause = "duplicated-examples" if len({*dealt}) == len(examples) else "dropped-examples"
        return Diagnosis(cause, 0.0, f"{text}; they score {len(dealt)} rows of {len(examples)}")
    own = [experiments.evaluate(BATCH, rank.examples).get(key, math.nan) for rank in ranks]
    wider = experiments.evaluate(BATCH * WORLD, examples).get(key, math.nan)
    text = f"{text}; of their own examples {' and '.join(f'{each:.6g}' for each in own)}"
    return _by_own([rank.numbers for rank in ranks], own, wider, key=key, text=text)


def _by_own(
    numbers: Sequence[Numbers], own: Sequence[float], wider: float, *, key: str, text: str
) -> Diagnosis:
    """How the first rank's number follows from what each rank's examples give.

    Args:
        numbers: Of each rank.
        own: What one process says of the examples of each rank.
        wider: What one process says of batches as large as those of all ranks together.
        key: Of the number.
        text: Evidence so far.
    """
    mean = "eval-mean-of-means" if is_loss(key) else "metric-mean-of-means"
    guesses = [
        ("dropped-examples", own[0], "it is the first rank's own"),
        (mean, sum(own) / len(own), "it is their mean"),
        (mean, wider, "it is that of one process at a batch as large as both"),
        ("world-scaled", sum(own), "it is their sum"),
    ]
    number, *others = (each.get(key, math.nan) for each in numbers)
    fits = {
        cause: words
        for cause, guess, words in guesses
        if relative_change(number, guess) <= MAX_PREDICTION_ERROR
    }
    if len(fits) > 1 and all(relative_change(number, other) == 0 for other in others):
        fits.pop("dropped-examples", None)  # where each says its own, they say different numbers
    if len(fits) != 1:
        return Diagnosis(UNEXPLAINED, 0.0, "; ".join([text, *fits.values()]))
    cause, words = next(iter(fits.items()))
    return Diagnosis(cause, 0.0, f"{text}; {words}")
