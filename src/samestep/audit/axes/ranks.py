"""The axis of ranks: the same effective batch on two processes, and the bug behind a difference."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from samestep.audit.axes.axis import Measurement
from samestep.audit.causes import UNEXPLAINED, Diagnosis
from samestep.audit.diagnose.coupling import coupling
from samestep.audit.diagnose.sizes import shortened_after_adding
from samestep.audit.diagnose.split import diagnose_split
from samestep.audit.experiments import Experiments
from samestep.audit.gradients import (
    are_independent,
    compare_gradients,
    is_finite,
    least_squares,
    linear_combination,
    relative_difference,
    scale,
)
from samestep.audit.subject import Gradient, Observation, Split
from samestep.errors import CheckError, DeadlockError

WORLD = 2


def ranks(experiments: Experiments) -> Measurement:
    """Two ranks with different counts; the first way of sharing that is inexact is reported.

    One micro-batch a rank shows what the ranks do by themselves; two a rank add the accumulation;
    then a rank without targets, and the examples as the subject's own sampler deals them.
    """
    subject, tolerance = experiments.subject, experiments.tolerance
    single, double = (
        rank_shares(subject.size, num_micro_batches=number, uniform=subject.uniform)
        for number in (1, 2)
    )
    measurement = _measure(experiments, single, what="1 micro-batch a rank")
    if measurement.is_exact(tolerance):
        measurement = _measure(experiments, double, what="2 micro-batches a rank")
    if measurement.is_exact(tolerance) and "masking" not in subject.missing():
        what = "the last rank without targets"
        measurement = _measure(experiments, single, what=what, masked_examples=single[-1][0])
    odd = subject.size - 1 + subject.size % 2
    if measurement.is_exact(tolerance):
        try:
            return _as_dealt(experiments, odd) or measurement
        except CheckError as error:  # what was seen before stands
            failed = f"{measurement.reason}; {odd} examples by its own loader: {error}"
            return replace(measurement, reason=failed)
    return measurement


def _as_dealt(experiments: Experiments, number: int) -> Measurement | None:
    """An odd number of examples as the subject's own loader, or its ``shard``, deals them.

    A loader that repeats examples to give each rank as many is exact if the loop leaves them out.
    """
    examples = tuple(range(number))
    dealt = experiments.run_dealt_on_ranks(examples, -(-number // WORLD), WORLD)
    shares = [] if dealt is None else [each.split for each in dealt if each.split]
    if dealt is not None and len(shares) == len(dealt):
        return _measure(
            experiments,
            shares,
            what=f"{number} examples as the trainer's loader deals",
            batch=(examples,),
            seen=[each.observation for each in dealt],
        )
    shards = experiments.subject.shard(number, WORLD)
    if shards is None:
        return None
    what = f"{number} examples as the sampler deals"
    return _measure(experiments, [(shard,) for shard in shards], what=what, batch=(examples,))


def rank_shares(size: int, *, num_micro_batches: int, uniform: bool = False) -> list[Split]:
    """The micro-batches of each rank: fewer examples on the first.

    Args:
        size: Examples of the effective batch.
        num_micro_batches: Of a rank; 1 where a rank has too few examples for 2.
        uniform: All micro-batches must be of one size: as many examples on each.
    """
    border = size // 2 if uniform else max(1, size * 3 // 8)
    shares: list[Split] = []
    for first, last in ((0, border), (border, size)):
        middle = first + (last - first + 1) // 2
        halved = num_micro_batches == 2 and border >= 2
        bounds = [(first, middle), (middle, last)] if halved else [(first, last)]
        shares.append(tuple(tuple(range(start, end)) for start, end in bounds))
    return shares


def _measure(
    experiments: Experiments,
    shares: Sequence[Split],
    *,
    what: str,
    masked_examples: tuple[int, ...] = (),
    batch: Split | None = None,
    seen: Sequence[Observation] | None = None,
) -> Measurement:
    """The gradient of the ranks against that of one process with all examples.

    Args:
        experiments: The subject's.
        shares: The micro-batches of each rank.
        what: How they were dealt, in words.
        masked_examples: Examples without targets.
        batch: The examples that the ranks should see; None: those of the shares.
        seen: What the ranks saw, if they ran already.
    """
    if batch is None:
        indices = {index for share in shares for micro_batch in share for index in micro_batch}
        batch = (tuple(sorted(indices)),)
    masked = {"masked_examples": masked_examples}
    whole = experiments.run(batch, **masked).gradient
    sizes = " and ".join("+".join(str(len(micro)) for micro in share) for share in shares)
    reason = f"{WORLD} ranks with {sizes} examples against 1 with all: {what}"
    try:
        observations = seen or experiments.run_on_ranks(shares, **masked)
    except DeadlockError as error:
        if not masked_examples:
            raise
        hung = Diagnosis("ranks-not-synchronised", 0.0, str(error))
        return Measurement(reason, exact=False, diagnose=lambda: hung)
    apart = _difference_between(observations)
    if apart > experiments.tolerance:
        evidence = f"the ranks' own results differ by {apart:.1e} after the step"
        return Measurement.of(
            compare_gradients(observations[-1].gradient, observations[0].gradient),
            reason,
            diagnose=lambda: Diagnosis("ranks-not-synchronised", 0.0, evidence),
        )
    gradient = observations[0].gradient
    difference = compare_gradients(gradient, whole)
    if experiments.clips:
        gradient = experiments.small_gradient_of_ranks(shares, **masked)
        whole = experiments.small_gradient(batch, **masked)
        small = compare_gradients(gradient, whole)
        if small.relative_difference > experiments.small_tolerance:
            difference = small
            reason += ", with gradients too small to be clipped"
        elif difference.relative_difference > experiments.tolerance:
            evidence = f"with gradients too small to be clipped: {small.relative_difference:.1e}"
            natural, bound = observations[0].gradient, experiments.residual_tolerance
            partial = shortened_after_adding(natural, gradient, bound=bound)
            clipped = partial or Diagnosis(
                "clip-per-micro-batch", small.relative_difference, evidence
            )
            return Measurement.of(difference, reason, diagnose=lambda: clipped)
    return Measurement.of(
        difference,
        reason,
        diagnose=lambda: _diagnose(
            experiments,
            shares,
            gradient=gradient,
            whole=whole,
            masked_examples=masked_examples,
            examples=batch[0],
        ),
    )


def _difference_between(observations: Sequence[Observation]) -> float:
    """The largest difference between ranks: of gradients, or of the weights that they moved."""
    first = observations[0]
    differences = []
    for other in observations[1:]:
        differences.append(relative_difference(other.gradient, first.gradient))
        if first.weights_after is not None and other.weights_after is not None:
            differences.append(relative_difference(other.weights_after, first.weights_after))
    return max(differences)


def _diagnose(
    experiments: Experiments,
    shares: Sequence[Split],
    *,
    gradient: Gradient,
    whole: Gradient,
    masked_examples: tuple[int, ...],
    examples: Sequence[int],
) -> Diagnosis:
    """Why the ranks together give another gradient than one alone.

    Args:
        experiments: The subject's.
        shares: The micro-batches of each rank.
        gradient: After the step, the same on all ranks.
        whole: The gradient of all examples, undivided, on one.
        masked_examples: Examples without targets.
        examples: Those that the ranks should see.

    Returns:
        The bug that predicts the gradient.
    """
    if not is_finite(gradient):
        return Diagnosis("rank-local-count", 0.0, "the rank without targets divides 0 by 0")
    masked = {"masked_examples": masked_examples}
    own = [experiments.unclipped_gradient(share, **masked) for share in shares]
    combination = least_squares(gradient, own)
    evidence = f"on the ranks' own gradients: {combination} (residual {combination.residual:.0e})"
    dealt = [index for share in shares for micro_batch in share for index in micro_batch]
    predictions = []  # what is seen to be repeated or missing before the laws that may fit alike
    if len(set(dealt)) < len(dealt):
        repeated = experiments.unclipped_gradient((tuple(dealt),), **masked)
        predictions.append(("duplicated-examples", repeated))
    missing = sorted(set(examples) - set(dealt))
    if missing:
        kept = experiments.unclipped_gradient((tuple(sorted(set(dealt))),), **masked)
        predictions.append(("dropped-examples", kept))
        evidence = f"no rank sees {', '.join(f'example {index}' for index in missing)}; {evidence}"
    predictions += _predictions(shares, own, whole=None if masked_examples else whole)
    scored = [(relative_difference(guess, gradient), name) for name, guess in predictions]
    best = min(scored)[0]
    # The first of those that fit alike: a multiple of the whole says more than of the ranks' own.
    allowed = max(10 * best, 1e-3 * experiments.residual_tolerance)
    cause = next(name for residual, name in scored if residual <= allowed)
    if best > experiments.residual_tolerance:
        within = _within_a_rank(experiments, shares, whole=whole, masked_examples=masked_examples)
        again = (
            None if masked_examples else _reduced_again(experiments, shares, gradient, whole=whole)
        )
        return within or again or Diagnosis(UNEXPLAINED, best, evidence)
    local = cause in ("rank-local-count", "world-scaled")
    if local and least_squares(whole, own).residual > experiments.residual_tolerance:
        coupled = coupling(experiments, shares[0] + shares[-1], **masked)
        if coupled is None or coupled > experiments.residual_tolerance:
            return Diagnosis("batch-coupled-term", best, evidence)
    return Diagnosis(cause, best, evidence)


def _within_a_rank(
    experiments: Experiments,
    shares: Sequence[Split],
    *,
    whole: Gradient,
    masked_examples: tuple[int, ...],
) -> Diagnosis | None:
    """What makes the same micro-batches inexact on one rank already, if they are."""
    split = tuple(micro_batch for share in shares for micro_batch in share)
    masked = {"masked_examples": masked_examples} if masked_examples else {}
    gradient = experiments.unclipped_gradient(split, **masked)
    if relative_difference(gradient, whole) <= experiments.small_tolerance:
        return None
    diagnosis = diagnose_split(experiments, split, **masked)
    if diagnosis.cause == UNEXPLAINED:
        return None
    evidence = f"so do these micro-batches on one rank; {diagnosis.evidence}"
    return replace(diagnosis, evidence=evidence)


def _reduced_again(
    experiments: Experiments, shares: Sequence[Split], gradient: Gradient, *, whole: Gradient
) -> Diagnosis | None:
    """Whether what was summed over ranks is summed again with each later micro-batch.

    Then a micro-batch weighs as many times the ranks, over what it does in the whole, as others
    come after it on its rank.
    """
    number = len(shares[0])
    if number < 2 or any(len(share) != number for share in shares):
        return None
    own = [experiments.unclipped_gradient((micro,)) for share in shares for micro in share]
    seen, expected = least_squares(gradient, own), least_squares(whole, own)
    residual = max(seen.residual, expected.residual)
    if residual > experiments.residual_tolerance or not are_independent(own):
        return None
    for at, (times, of_whole) in enumerate(
        zip(seen.coefficients, expected.coefficients, strict=True)
    ):
        later = number - 1 - at % number
        if abs(times - WORLD**later * of_whole) > 1e-6 * abs(times):
            return None
    text = (
        f"micro-batches weigh x {WORLD} for each that comes after them on their rank: gradients "
        "that were summed over ranks are still in .grad when it is summed again"
    )
    return Diagnosis("world-scaled", residual, text)


def _predictions(
    shares: Sequence[Split], own: Sequence[Gradient], *, whole: Gradient | None
) -> Iterator[tuple[str, Gradient]]:
    """The whole by the number of ranks; each rank's own, averaged, added up, or divided again.

    Args:
        shares: The micro-batches of each rank.
        own: The gradient of each rank's share on one process.
        whole: Of all; None where the ranks give it if none lacks targets, and so no multiple of it.
    """
    if whole is not None:
        yield "world-scaled", scale(whole, float(WORLD))
        yield "world-divided", scale(whole, 1 / WORLD)
    yield "rank-local-count", linear_combination(own, [1 / WORLD] * len(own))
    yield "world-scaled", linear_combination(own, [1.0] * len(own))
    yield "world-divided", linear_combination(own, [1 / WORLD**2] * len(own))
    examples = [sum(map(len, share)) for share in shares]
    shared = [count / sum(examples) for count in examples]
    yield "rank-local-count", linear_combination(own, shared)
    for gradient in own:
        yield "ranks-not-synchronised", gradient
