"""The axis of knobs: sizes of the loop's own that may not change the step."""

from samestep.audit.axes.axis import Measurement, within_noise
from samestep.audit.blame import blamed
from samestep.audit.diagnose.knobs import diagnose_knob
from samestep.audit.diagnose.state import compare_left
from samestep.audit.experiments import Experiments
from samestep.audit.gradients import compare_gradients
from samestep.audit.splits import sizes_of
from samestep.audit.subject import Knob, Split
from samestep.errors import CheckError


def knobs(experiments: Experiments) -> Measurement:
    """Each value of each knob against the subject's own, whole and cut; the worst is reported."""
    if not experiments.is_deterministic:
        raise CheckError("the same run from the same seed gives another gradient: see micro-batch")
    results = [
        _of_value(experiments, (name, at), value)
        for name, values in experiments.subject.knobs.items()
        for at, value in enumerate(values)
    ]
    measured = [each for each in results if isinstance(each, Measurement)]
    failed = [each for each in results if isinstance(each, str)]
    if not measured:
        raise CheckError("; ".join(failed))
    worst = max(measured, key=lambda each: (each.exact is False, each.size))
    if worst.exact:
        tried = ", ".join(f"{n} {_shown(v)}" for n, v in experiments.subject.knobs.items())
        return _with(worst, "; ".join([f"{tried}, against the subject's own", *failed]))
    return _with(worst, "; ".join([worst.reason, *failed]))


def _shown(values: object) -> str:
    return " ".join(map(repr, values)) if isinstance(values, list | tuple) else repr(values)


def _with(measurement: Measurement, reason: str) -> Measurement:
    fields = {**vars(measurement), "reason": reason}
    return Measurement(**fields)


def _of_value(experiments: Experiments, knob: Knob, value: object) -> Measurement | str:
    """The worst of the whole batch and of a cut, with one value; or why it could not be run."""
    batch, split = experiments.whole_batch, experiments.mixed_split
    try:
        of_whole = _of_split(experiments, batch, knob, value)
        return of_whole if of_whole.exact is False else _of_split(experiments, split, knob, value)
    except Exception as error:  # the subject is the user's code: it may refuse a value
        return f"{knob[0]}={value!r}: {blamed(error)}"


def _of_split(experiments: Experiments, split: Split, knob: Knob, value: object) -> Measurement:
    reason = f"{knob[0]}={value!r} against the subject's own, {sizes_of(split)}"
    turned = experiments.departing(knob=knob)
    own, observed = experiments.run(split), turned.run(split)
    difference = compare_gradients(observed.gradient, own.gradient)
    if within_noise(difference, experiments, turned):
        if experiments.clips:
            difference = compare_gradients(
                turned.small_gradient(split), experiments.small_gradient(split)
            )
            reason += ", with gradients too small to be clipped"
        if difference.relative_difference <= experiments.small_tolerance:
            left = compare_left(turned, observed, own, tolerance=experiments.tolerance)
            if left is None:
                return Measurement.of(difference, reason, exact=True)
            return Measurement.of_left(left, reason)
    return Measurement.of(
        difference,
        reason,
        exact=False,
        diagnose=lambda: diagnose_knob(experiments, split, knob=knob, value=value),
    )
