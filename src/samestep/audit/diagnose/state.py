"""What a step leaves besides its gradient: weights, averages, buffers, rates, or no update at all.

And what moves between the micro-batches of a step, so that later ones see another model.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from samestep.audit.causes import Diagnosis
from samestep.audit.experiments import TOLERANCE_FACTOR, Experiments
from samestep.audit.gradients import (
    global_norm,
    is_finite,
    least_squares,
    norms,
    rank,
    relative_difference,
    subtract,
)
from samestep.audit.splits import merged
from samestep.audit.subject import Left, Observation, Split

COPIES = 5
"""Of an example, as micro-batches, that show whether something is carried over."""

TERMS = 2
"""Directions of their gradients where there is a second term."""

FACTORS: Sequence[Callable[[int], float]] = (lambda n: 1.0, lambda n: n, lambda n: 1 / n)
"""What bugs of counts multiply the gradient of so many copies by."""

SHOWN = 3
"""Names of weights and buffers in a line of evidence."""


@dataclass(frozen=True)
class LeftDifference:
    """What a step leaves otherwise than another.

    Attributes:
        cause: The cause that it is.
        size: The largest relative difference of anything.
        worst: The weights and buffers that differ, with their relative differences, worst first.
        evidence: A line for the reader.
    """

    cause: str
    size: float
    worst: tuple[tuple[str, float], ...]
    evidence: str

    def diagnosis(self) -> Diagnosis:
        """As a cause."""
        return Diagnosis(self.cause, 0.0, self.evidence)


def compare_left(
    experiments: Experiments,
    observed: Observation,
    expected: Observation,
    *,
    tolerance: float | None = None,
) -> LeftDifference | None:
    """What one step leaves otherwise than another, beyond what rounding makes.

    Args:
        experiments: The subject's, whose noise is measured.
        observed: The step in question.
        expected: The step that it should be.
        tolerance: A relative difference that is known to be noise; None: the subject's.

    Returns:
        None if both leave the same, or if the subject is random.
    """
    if observed.stepped != expected.stepped:
        return _without_update(observed)
    if observed.updates != expected.updates:
        text = f"{observed.updates} optimizer steps instead of {expected.updates}"
        return LeftDifference("optimizer-step-per-micro-batch", 1.0, (), text)
    left, other = observed.left, expected.left
    if left is None or other is None or not experiments.is_deterministic:
        return None
    differences = _differences(experiments, left, other, tolerance=tolerance)
    rates = _of_rates(left, other)
    if not differences and not rates:
        return None
    ranked = sorted(differences.items(), key=lambda pair: -pair[1])
    parts = [rates, _names(ranked, left)]
    size = max(differences.values(), default=1.0)
    text = "; ".join(filter(None, parts))
    return LeftDifference("state-per-micro-batch", size, tuple(ranked[:40]), text)


def _without_update(observed: Observation) -> LeftDifference:
    """One of the two made an update and the other none."""
    which = "this split" if not observed.stepped else "the undivided batch"
    text = (
        f"no update was made in {which}: the gradient stays in .grad, and what it came from is "
        "lost or leaks into the next step"
    )
    return LeftDifference("dropped-examples", 1.0, (), text)


def _differences(
    experiments: Experiments, left: Left, other: Left, *, tolerance: float | None
) -> dict[str, float]:
    """By name, the difference of the movements over the movement, where it is no noise."""
    known = experiments.tolerance if tolerance is None else tolerance
    expected = {
        name: moved
        for name, moved in other.moved.items()
        if name in left.moved and left.moved[name].shape == moved.shape
    }
    sizes = norms(expected)
    errors = norms({name: left.moved[name] - moved for name, moved in expected.items()})
    found = {}
    for name, error in errors.items():
        size = sizes[name]
        rounding = max(left.rounding[name], other.rounding.get(name, 0.0))
        # A weight that does not move has no tolerance of its own, however large the factor is.
        if error <= TOLERANCE_FACTOR * rounding + (known * size if size else 0.0):
            continue
        # Its noise takes many runs to measure: only where something differs.
        rounding = max(rounding, experiments.left_noise.get(name, 0.0))
        own = experiments.tolerance * size if size else 0.0
        if not error <= TOLERANCE_FACTOR * rounding + own:
            found[name] = error / size if size and math.isfinite(error) else math.inf
    return found


def _of_rates(left: Left, other: Left) -> str:
    """The learning rates that differ, in words; empty if none does."""
    if left.rates != other.rates and len(left.rates) == len(other.rates):
        return f"the learning rate of the update is {_shown(left.rates)}, not {_shown(other.rates)}"
    if left.rates_after != other.rates_after:
        return (
            f"the learning rate after the step is {_shown(left.rates_after)}, not "
            f"{_shown(other.rates_after)}"
        )
    return ""


def _shown(rates: tuple[tuple[float, ...], ...]) -> str:
    return ", ".join(f"{rate:.4g}" for each in rates for rate in sorted(set(each))) or "none"


def _names(ranked: list[tuple[str, float]], left: Left) -> str:
    """What ends elsewhere, in words: trained weights, and what no gradient moves."""
    parts = []
    kinds = [_kind(name, left) for name, _ in ranked]
    for words in dict.fromkeys(("trained weights", "no trained weights", *kinds)):
        own = [name for (name, _), kind in zip(ranked, kinds, strict=True) if kind == words]
        if own:
            rest = f" and {len(own) - SHOWN} more" if len(own) > SHOWN else ""
            parts.append(f"{', '.join(own[:SHOWN])}{rest} ({words})")
    return f"the step leaves other values in {' and in '.join(parts)}" if parts else ""


def _kind(name: str, left: Left) -> str:
    if " of " in name:
        return "state of the optimizer"
    return "trained weights" if name in left.trained else "no trained weights"


def moved_between(experiments: Experiments, split: Split, **changes: object) -> Diagnosis | None:
    """What moves between micro-batches, where their order changes the gradient.

    Args:
        experiments: The subject's.
        split: The split at fault.
        **changes: The settings that it was run under.

    Returns:
        None if the order does not matter, or if nothing is seen to move.
    """
    by_order = order_dependence(experiments, split, **changes)
    if by_order is None or by_order <= experiments.residual_tolerance:
        return None
    of_split, of_whole = (
        _times_moved(experiments.run(each, **changes, watch_moves=True))
        for each in (split, merged(split))
    )
    moving = [name for name, times in of_split.items() if times > of_whole.get(name, 0)]
    if not moving:
        return None
    rest = f" and {len(moving) - SHOWN} more" if len(moving) > SHOWN else ""
    text = (
        f"{', '.join(moving[:SHOWN])}{rest} moved between the micro-batches; in another order "
        f"they give a gradient that differs by {by_order:.1e}"
    )
    return Diagnosis("state-per-micro-batch", 0.0, text)


def moved_without_gradient(
    experiments: Experiments, split: Split, **changes: object
) -> Diagnosis | None:
    """What a step does to the weights even without a gradient, where a split does more of it.

    Args:
        experiments: The subject's.
        split: The split at fault, whose gradients are those of the whole batch.
        **changes: The settings that it was run under.
    """
    of_split, of_whole = (experiments.offset(each, **changes) for each in (split, merged(split)))
    size = global_norm(experiments.natural_gradient(merged(split), **changes))
    if global_norm(subtract(of_split, of_whole)) <= experiments.small_tolerance * size:
        return None
    text = (
        f"without any gradient the step moves the weights by {global_norm(of_split):.3g} in this "
        f"split and by {global_norm(of_whole):.3g} in the undivided batch; their gradients are "
        "the same"
    )
    return Diagnosis("state-per-micro-batch", 0.0, text)


def moves_beside(experiments: Experiments, split: Split, diagnosis: Diagnosis) -> Diagnosis:
    """A diagnosis of the gradient, with what else moves once a micro-batch beside it.

    A fault of the gradient moves weights and averages elsewhere, but no rate, and nothing between
    two backwards.
    """
    causes = (diagnosis.cause, *diagnosis.also)
    if {"state-per-micro-batch", "optimizer-step-per-micro-batch"} & {*causes}:
        return diagnosis
    of_split, of_whole = (
        experiments.run(each, watch_moves=True) for each in (split, merged(split))
    )
    if of_split.left is None or of_whole.left is None:
        return diagnosis
    rates = _of_rates(of_split.left, of_whole.left)
    before = _times_moved(of_whole)
    names = [name for name, times in _times_moved(of_split).items() if times > before.get(name, 0)]
    moving = f"{', '.join(names[:SHOWN])} moved between the micro-batches" if names else ""
    if not rates and not moving:
        return diagnosis
    text = "; ".join(filter(None, (diagnosis.evidence, f"besides, {rates or moving}")))
    also = (*diagnosis.also, "state-per-micro-batch")
    return replace(diagnosis, evidence=text, also=also)


def _times_moved(observed: Observation) -> dict[str, int]:
    times: dict[str, int] = {}
    for names in observed.moves:
        for name in names:
            times[name] = times.get(name, 0) + 1
    return times


def order_dependence(experiments: Experiments, split: Split, **changes: object) -> float | None:
    """How far the gradient changes with the order of the micro-batches, relative.

    Returns:
        None of a split that cannot be turned round: a smaller micro-batch cannot come first where
        sizes must be uniform.
    """
    sizes = {len(micro_batch) for micro_batch in split}
    if experiments.subject.uniform and len(sizes) > 1:
        split = experiments.mixed_split
        if len({len(micro_batch) for micro_batch in split}) > 1:
            return None
    gradient = experiments.small_gradient(split, **changes)
    turned = experiments.small_gradient(split[::-1], **changes)
    if not global_norm(subtract(gradient, turned)):
        return 0.0
    return relative_difference(turned, gradient)


def carried_over(experiments: Experiments, split: Split, **changes: object) -> str | None:
    """What shows that something is carried from micro-batch to micro-batch, in words.

    Copies of one example mean the same whatever values they meet and are counted by. As
    micro-batches of their own they give the gradient of one, times a factor that only their number
    sets, or that and a second term. Where something unseen moves (an attribute that is no buffer,
    a variable of the loop), the second copy gives what the first does not.

    Args:
        experiments: The subject's.
        split: One at fault, whose order matters.
        **changes: The settings that it was run under.
    """
    for example in dict.fromkeys((split[-1][-1], split[0][0], split[len(split) // 2][0])):
        alone = experiments.small_gradient(((example,),), **changes)
        copies = [
            experiments.small_gradient(((example,),) * number, **changes)
            for number in range(2, COPIES + 1)
        ]
        if not all(map(is_finite, (alone, *copies))):
            continue
        held = [gradient for gradient in (alone, *copies) if global_norm(gradient)]
        factors = [least_squares(gradient, [alone]) for gradient in copies]
        bound = experiments.residual_tolerance
        if rank(held) > TERMS:
            return f"copies of example {example} as micro-batches give ever other gradients"
        if max(fit.residual for fit in factors) <= bound:
            found = [fit.coefficients[0] for fit in factors]
            if not any(_is_law(found, law=law) for law in FACTORS):
                shown = " ".join(f"{factor:.4g}" for factor in found)
                return (
                    f"2 to {COPIES} copies of example {example} as micro-batches give its gradient "
                    f"times {shown}"
                )
    return None


def _is_law(factors: Sequence[float], *, law: Callable[[int], float]) -> bool:
    """Whether copies have these factors up to one that the first of them sets."""
    expected = [law(number) / law(2) * factors[0] for number in range(2, COPIES + 1)]
    largest = max(map(abs, expected))
    pairs = zip(factors, expected, strict=True)
    return all(abs(factor - other) <= 1e-6 * largest for factor, other in pairs)
