"""The axis of the next step: what leaks from one accumulation window into the one after it."""

from dataclasses import dataclass

from samestep.audit.axes.axis import Measurement, within_noise
from samestep.audit.causes import Diagnosis
from samestep.audit.diagnose.split import is_faulty
from samestep.audit.diagnose.state import compare_left
from samestep.audit.experiments import Experiments
from samestep.audit.gradients import (
    compare_gradients,
    global_norm,
    relative_difference,
)
from samestep.audit.splits import sizes_of
from samestep.audit.subject import Observation, Split
from samestep.errors import CheckError

SHOWN = 3
"""Names of weights in a line of evidence."""

MIN_LEFT_OVER = 1e-3
"""Share of a weight's gradient from which on it holds another step's; less may be its noise."""


@dataclass(frozen=True)
class _Second:
    """The second of two steps, and what emptying the gradients between them changes.

    Attributes:
        split: How the batch was cut.
        kept: The step as it is.
        emptied: The step after ``.grad`` was emptied.
        holding: The weights whose gradient still holds the first step's.
        clean: Those whose gradient does not, though the first step left one.
    """

    split: Split
    kept: Observation
    emptied: Observation
    holding: tuple[str, ...]
    clean: tuple[str, ...]


def next_step(experiments: Experiments) -> Measurement:
    """The second of two steps in a row from the same weights, whole against split.

    A loop that empties no gradient at all leaves that to what follows it, as ``step`` does: then
    the audit empties them. One that empties some, or in some cuts, forgets the others.
    """
    if not experiments.is_deterministic:
        raise CheckError("the same run from the same seed gives another gradient: see micro-batch")
    split, batch = experiments.mixed_split, experiments.whole_batch
    # The noise of two steps takes many runs to measure: only where something differs.
    two = experiments.departing(steps_before=1)
    of_split, of_whole = (_second_step(experiments, two, each) for each in (split, batch))
    none_is_clean = not of_split.clean and not of_whole.clean and not experiments.subject.clears
    if not none_is_clean and (of_split.holding or of_whole.holding):
        return _left_over(two, of_whole if of_whole.holding else of_split)
    if is_faulty(experiments, split):
        raise CheckError(
            "the first of two steps depends on the cut already: what the second adds shows once "
            "micro-batch is exact"
        )
    if none_is_clean:
        two = experiments.departing(steps_before=1, clear_between=True)
        return _compared(experiments, two, of_split.emptied, of_whole.emptied, split=split)
    return _compared(experiments, two, of_split.kept, of_whole.kept, split=split)


def _second_step(experiments: Experiments, two: Experiments, split: Split) -> _Second:
    """Two steps in a row, with and without the gradients that the first one left."""
    first = experiments.run(split)
    try:
        kept = two.run(split)
        emptied = two.run(split, clear_between=True) if first.leaves_gradients else kept
    except Exception as error:  # the subject's code: it need not know of a second step
        raise CheckError(
            f"a second step on the same model fails ({type(error).__name__}: {error}); make what "
            "belongs to a model, such as its optimizer, in model()"
        ) from error
    size = global_norm(first.gradient)
    changed = {
        name: relative_difference({name: kept.gradient[name]}, {name: emptied.gradient[name]})
        for name, gradient in first.gradient.items()
        if float(gradient.norm()) > 1e-6 * size
        and name in kept.gradient
        and name in emptied.gradient
    }
    holding = tuple(name for name, change in changed.items() if change > MIN_LEFT_OVER)
    if holding and relative_difference(kept.gradient, emptied.gradient) <= two.tolerance:
        holding = ()
    noise = 10 * experiments.tolerance
    clean = tuple(name for name, change in changed.items() if change <= noise)
    return _Second(split, kept, emptied, holding, clean)


def _left_over(two: Experiments, second: _Second) -> Measurement:
    difference = compare_gradients(second.kept.gradient, second.emptied.gradient)
    rest = f" and {len(second.holding) - SHOWN} more" if len(second.holding) > SHOWN else ""
    text = (
        f"the second step's gradient of {', '.join(second.holding[:SHOWN])}{rest} holds what the "
        f"first step left in .grad; that of {len(second.clean)} other weights does not"
    )
    return Measurement.of(
        difference,
        f"the second of two steps, {sizes_of(second.split)}, with and without what the first left",
        exact=False,
        noise_floor=two.noise_floor,
        diagnose=lambda: Diagnosis("gradients-left-over", 0.0, text),
    )


def _compared(
    experiments: Experiments,
    two: Experiments,
    observed: Observation,
    expected: Observation,
    *,
    split: Split,
) -> Measurement:
    """The second step of a split against that of the whole batch."""
    reason = f"the second of two steps, {sizes_of(split)} against {sizes_of(two.whole_batch)}"
    difference = compare_gradients(observed.gradient, expected.gradient)
    differs = not within_noise(difference, experiments, two)
    left = compare_left(two, observed, expected, tolerance=experiments.tolerance)
    if left is None and not differs:
        return Measurement.of(difference, reason, exact=True, noise_floor=_noise(two))
    if left is None:
        what = "something that is kept from one step to the next moves once a micro-batch"
        cause = "state-per-micro-batch"
    else:
        what, cause = left.evidence, left.cause
    diagnosis = Diagnosis(cause, 0.0, f"the first step is exact, the second is not: {what}")
    if left is not None and not differs:
        return Measurement.of_left(left, reason, diagnose=lambda: diagnosis)
    return Measurement.of(
        difference, reason, exact=False, noise_floor=two.noise_floor, diagnose=lambda: diagnosis
    )


def _noise(two: Experiments) -> float | None:
    """The noise of two steps where it had to be measured; else that of one is shown."""
    return two.noise_floor if "noise_floor" in vars(two) else None
