"""Names why a size of the loop's own changes the gradient of a batch, where a known law fits."""

from collections.abc import Iterator, Sequence

from samestep.audit.causes import Diagnosis
from samestep.audit.experiments import Experiments
from samestep.audit.gradients import (
    are_independent,
    compare_gradients,
    global_norm,
    is_finite,
    least_squares,
    relative_difference,
)
from samestep.audit.hypotheses import SplitEvidence, hypotheses
from samestep.audit.subject import Gradient, Knob, Split

SHOWN = 3
"""Names of weights in a line of evidence."""

WHOLE_NUMBER = 1e-6
"""How far a scale may be from a whole number and still be one."""

NO_COPY = 1e-4
"""How far a number of copies may be from a whole one."""

MOST_COPIES = 3
"""Of the example that came least often."""


def diagnose_knob(
    experiments: Experiments, split: Split, *, knob: Knob, value: object
) -> Diagnosis:
    """Why a value of a knob gives another gradient than the subject's own.

    Args:
        experiments: The subject's.
        split: The split that was run.
        knob: The knob and which of its values.
        value: That value.
    """
    own = experiments.unclipped_gradient(split)
    observed = experiments.unclipped_gradient(split, knob=knob)
    if not is_finite(observed) or not global_norm(observed):
        what = "no gradient at all" if is_finite(observed) else "a gradient that is not finite"
        return Diagnosis("knob-dependent", 1.0, f"with this value there is {what}")
    diagnosis = _left_out(experiments, own, observed)
    diagnosis = diagnosis or _by_parts(experiments, split, observed, own=own, value=value)
    diagnosis = diagnosis or _by_scale(experiments, own, observed)
    diagnosis = diagnosis or repeats_of(experiments, split, observed, own=own)
    if diagnosis is not None:
        return diagnosis
    difference = compare_gradients(observed, own)
    text = f"x {difference.ratio:.6g}, cosine {difference.cosine:.6f}, by no law that is known"
    return Diagnosis("knob-dependent", difference.relative_difference, text)


def _left_out(experiments: Experiments, own: Gradient, observed: Gradient) -> Diagnosis | None:
    """Weights that get no gradient any more while all others are as they were."""
    every = compare_gradients(observed, own, most=len(own) + 1).worst
    at_fault = [name for name, size in every if not size <= experiments.residual_tolerance]
    gone = [
        name
        for name in at_fault
        if name in own and not (name in observed and float(observed[name].norm()))
    ]
    size = global_norm(own)
    exact = [name for name in own if name not in at_fault and float(own[name].norm()) > 1e-6 * size]
    if not gone or gone != at_fault or not exact:
        return None
    rest = f" and {len(gone) - SHOWN} more" if len(gone) > SHOWN else ""
    text = f"no gradient: {', '.join(gone[:SHOWN])}{rest}; the other weights are exact"
    return Diagnosis("weights-left-out", 0.0, text)


def _by_parts(
    experiments: Experiments, split: Split, observed: Gradient, *, own: Gradient, value: object
) -> Diagnosis | None:
    """The laws of a split, if the value cuts the one micro-batch into parts of examples."""
    if len(split) > 1 or isinstance(value, bool) or not isinstance(value, int) or value < 1:
        return None
    counts = experiments.subject.example_counts()
    difference = relative_difference(observed, own)
    for inner in _inner_splits(split[0], value):
        try:
            alone = [experiments.unclipped_gradient((micro,)) for micro in inner]
        except Exception:  # the subject's code: it may refuse so few examples
            continue
        evidence = SplitEvidence(
            split=observed,
            whole=own,
            alone=alone,
            examples=[len(micro) for micro in inner],
            targets=None if counts is None else [sum(counts[i].targets for i in m) for m in inner],
            denominators=[experiments.denominators(micro) for micro in (*inner, split[0])],
            residual_tolerance=experiments.residual_tolerance,
        )
        bound = min(experiments.residual_tolerance, 0.1 * difference)
        for hypothesis in hypotheses(evidence, experiments.causes.values()):
            residual = relative_difference(hypothesis.gradient, observed)
            if residual > bound:
                continue
            sizes = "+".join(str(len(micro)) for micro in inner)
            text = f"parts of {sizes} examples weighted {hypothesis.weighting}"
            apart = least_squares(own, alone).residual
            if apart > experiments.residual_tolerance and not hypothesis.scales_whole:
                text = f"{text}; {apart:.1e} of the undivided gradient is in no part"
                return Diagnosis("batch-coupled-term", residual, text)
            return Diagnosis(hypothesis.cause, residual, text)
    return None


def _inner_splits(micro_batch: tuple[int, ...], value: int) -> Iterator[Split]:
    """Parts of so many examples, and so many parts."""
    number = len(micro_batch)
    for size in dict.fromkeys((value, -(-number // value))):
        if 0 < size < number:
            yield tuple(micro_batch[at : at + size] for at in range(0, number, size))


def _by_scale(experiments: Experiments, own: Gradient, observed: Gradient) -> Diagnosis | None:
    """A whole multiple, or one over it, of the same gradient."""
    fit = least_squares(observed, [own])
    if fit.residual > experiments.residual_tolerance or not fit.coefficients[0]:
        return None
    times = float(fit.coefficients[0])
    for cause, factor in (("unscaled-sum", times), ("divided-twice", 1 / times)):
        if round(factor) > 1 and abs(factor - round(factor)) <= WHOLE_NUMBER * factor:
            return Diagnosis(cause, fit.residual, f"the same gradient x {times:.6g}")
    return Diagnosis("knob-dependent", fit.residual, f"the same gradient x {times:.6g}")


def repeats_of(
    experiments: Experiments, split: Split, observed: Gradient, *, own: Gradient
) -> Diagnosis | None:
    """Examples that are dropped or repeated, where both gradients are sums over examples.

    Args:
        experiments: The subject's.
        split: Its examples.
        observed: The gradient in question.
        own: The gradient that it should be.

    Returns:
        None where one of the two is no sum of the examples' own, or where all weigh alike.
    """
    members = [index for micro_batch in split for index in micro_batch]
    try:
        alone = [experiments.unclipped_gradient(((index,),)) for index in members]
    except Exception:  # the subject's code: it may refuse a single example
        return None
    of_own, of_observed = least_squares(own, alone), least_squares(observed, alone)
    bound = experiments.residual_tolerance
    if max(of_own.residual, of_observed.residual) > bound or not all(map(global_norm, alone)):
        return None
    if not are_independent(alone):
        return None
    pairs = zip(of_observed.coefficients, of_own.coefficients, strict=True)
    times = [float(a / b) if b else 1.0 for a, b in pairs]
    copies = _copies(times)
    odd = {i: t for i, t in zip(members, copies, strict=True) if t != 1}
    if not odd:
        return None
    dropped = not any(odd.values())
    text = ", ".join(f"example {index} x {count}" for index, count in odd.items())
    cause = "dropped-examples" if dropped else "duplicated-examples"
    return Diagnosis(cause, of_observed.residual, text)


def _copies(times: Sequence[float]) -> list[int]:
    """How often each example came, from what each weighs; all once if those are no counts.

    The lightest of them came once, twice, or up to `MOST_COPIES` times.
    """
    least = min((each for each in times if abs(each) > NO_COPY), default=0.0)
    for copies in range(1, MOST_COPIES + 1):
        counts = [each * copies / least for each in times] if least > 0 else []
        if counts and all(abs(count - round(count)) <= NO_COPY for count in counts):
            return [round(count) for count in counts]
    return [1] * len(times)
