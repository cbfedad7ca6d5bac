"""The axis of the loader: the loop's own one deals the rows, and the step may not change."""

from collections import Counter
from collections.abc import Sequence

from samestep.audit.axes.axis import Measurement
from samestep.audit.causes import UNEXPLAINED, Diagnosis
from samestep.audit.diagnose.knobs import repeats_of
from samestep.audit.diagnose.split import is_faulty
from samestep.audit.experiments import Experiments
from samestep.audit.gradients import compare_gradients, relative_difference
from samestep.audit.hypotheses import SplitEvidence, hypotheses
from samestep.audit.splits import merged, sizes_of
from samestep.audit.subject import Dealt, Gradient, Split
from samestep.errors import CheckError

SIZE = 2
"""Examples of a micro-batch, as the loader is told."""


def loader(experiments: Experiments) -> Measurement:
    """A pass of the loader over all examples, and over one fewer, which its size does not cut."""
    measurement = None
    for number in (experiments.subject.size, experiments.subject.size - 1):
        measurement = _measure(experiments, tuple(range(number)))
        if not measurement.is_exact(experiments.tolerance):
            return measurement
    assert measurement is not None
    return measurement


def _measure(experiments: Experiments, examples: tuple[int, ...]) -> Measurement:
    """The step on what the loader deals against the step on the same examples, undivided."""
    if not experiments.is_deterministic:
        raise CheckError("the same run from the same seed gives another gradient: see micro-batch")
    dealt = experiments.run_dealt(examples, SIZE)
    whole = experiments.run((examples,)).gradient
    shown = f"{dealt.number} micro-batches" if dealt.split is None else sizes_of(dealt.split)
    reason = f"{len(examples)} examples as the loader deals them ({shown}) against all at once"
    difference = compare_gradients(dealt.observation.gradient, whole)
    small = difference.relative_difference <= experiments.tolerance
    if not small and _is_of_the_cut(experiments, dealt, examples, whole=whole):
        raise CheckError(
            f"{shown} change the step without the loader too: what it adds shows once "
            "micro-batch and short-window are exact"
        )
    return Measurement.of(
        difference,
        reason,
        diagnose=lambda: _diagnose(experiments, dealt, examples, whole=whole),
    )


def _is_of_the_cut(
    experiments: Experiments, dealt: Dealt, examples: Sequence[int], *, whole: Gradient
) -> bool:
    """Whether the same micro-batches without the loader are as wrong, or any cut is wrong."""
    observed = dealt.observation.gradient
    if dealt.split is not None:
        if _odd(dealt.split, examples):
            return False
        in_order = _in_order(experiments, dealt.split)
        if in_order is not None:
            return relative_difference(in_order, observed) <= experiments.tolerance
    if not is_faulty(experiments, experiments.mixed_split):
        return False
    return repeats_of(experiments, (tuple(examples),), observed, own=whole) is None


def _odd(split: Split, examples: Sequence[int]) -> str:
    """Examples that came more than once, or never, in words; empty if there are none."""
    times = Counter(merged(split)[0])
    parts = [
        f"example {index} came {_in_words(times[index])}" for index in examples if times[index] != 1
    ]
    return ", ".join(parts)


def _in_words(times: int) -> str:
    return {0: "never", 2: "twice"}.get(times, f"{times} times")


def _diagnose(
    experiments: Experiments, dealt: Dealt, examples: tuple[int, ...], *, whole: Gradient
) -> Diagnosis:
    """Why the loader's dealing changes the step."""
    observed = dealt.observation.gradient
    if dealt.split is None:
        repeated = repeats_of(experiments, (examples,), observed, own=whole)
        return repeated or Diagnosis(UNEXPLAINED, relative_difference(observed, whole), "")
    odd, times = _odd(dealt.split, examples), Counter(merged(dealt.split)[0])
    if odd:
        more = any(count > 1 for count in times.values())
        cause = "duplicated-examples" if more else "dropped-examples"
        return Diagnosis(cause, 0.0, odd)
    return _by_law(experiments, dealt.split, observed, whole=whole)


def _in_order(experiments: Experiments, split: Split) -> Gradient | None:
    """The gradient of the same cut without the loader; None where it cannot be run."""
    sizes = {len(micro_batch) for micro_batch in split[:-1]}
    regular = len(sizes) <= 1 and len(split[-1]) <= max(sizes, default=len(split[-1]))
    if experiments.subject.uniform and not regular:
        return None
    return experiments.run(split).gradient


def _by_law(
    experiments: Experiments, split: Split, observed: Gradient, *, whole: Gradient
) -> Diagnosis:
    """The law of a split whose micro-batches only the loader can make together."""
    counts = experiments.subject.example_counts()
    evidence = SplitEvidence(
        split=observed,
        whole=whole,
        alone=[experiments.run((micro,)).gradient for micro in split],
        examples=[len(micro) for micro in split],
        targets=None if counts is None else [sum(counts[i].targets for i in m) for m in split],
        denominators=[experiments.denominators(micro) for micro in (*split, *merged(split))],
        residual_tolerance=experiments.residual_tolerance,
    )
    difference = relative_difference(observed, whole)
    scored = [
        (relative_difference(each.gradient, observed), each)
        for each in hypotheses(evidence, experiments.causes.values())
    ]
    best = min(residual for residual, _ in scored)
    if best > min(experiments.residual_tolerance, 0.1 * difference):
        text = f"micro-batches of {sizes_of(split)}, each example once; by no law that is known"
        return Diagnosis(UNEXPLAINED, best, text)
    allowed = max(10 * best, 1e-3 * experiments.residual_tolerance)
    residual, hypothesis = next(pair for pair in scored if pair[0] <= allowed)
    text = f"micro-batches of {sizes_of(split)} weighted {hypothesis.weighting}"
    return Diagnosis(hypothesis.cause, residual, text)
