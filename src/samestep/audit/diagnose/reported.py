"""Why a reported number changes with the split, and whether the reported loss is the objective."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from samestep.audit.causes import UNEXPLAINED, Diagnosis
from samestep.audit.diagnose.coupling import PADDING_COLUMNS, diagnose_seen_padding
from samestep.audit.diagnose.split import diagnose_split, is_faulty
from samestep.audit.diagnose.state import compare_left
from samestep.audit.experiments import Experiments
from samestep.audit.gradients import global_norm, relative_difference, scale
from samestep.audit.splits import merged
from samestep.audit.subject import Gradient, Perturbation, Split

STEPS = (2e-6, 2e-5, 2e-4, 2e-3, 2e-2)
"""Lengths of the displacement along which the loss is watched, both ways; the first that shows a
slope that half of it shows too."""

SAFETY = 10.0
"""How many times its uncertainty a slope may be off."""

MAX_UNCERTAINTY = 0.05
"""Relative error of slopes from which on no objective could be told from another."""

MAX_SLOPE_ERROR = 1e-4
"""Relative difference of slopes above which two objectives differ, or more where the reported loss
has few digits."""

MAX_PREDICTION_ERROR = 1e-6
"""Relative difference up to which a number is explained by those of the parts."""


def diagnose_number(experiments: Experiments, split: Split, *, key: str) -> Diagnosis:
    """Why a number that the loop reports changes with the split.

    Args:
        experiments: The subject's.
        split: The split that changes it.
        key: The number's name.
    """
    loss = is_loss(key)
    other = diagnose_objective(experiments, split) if key == "loss" else None
    faulty = is_faulty(experiments, split)
    if faulty and other is None and loss:
        return diagnose_split(experiments, split)  # it reports truly what it wrongly optimises
    if not faulty:
        left = compare_left(experiments, experiments.run(split), experiments.run(merged(split)))
        if left is not None:
            return left.diagnosis()
    alone = [experiments.run((micro,)).reported.get(key, math.nan) for micro in split]
    cause = "reported-not-optimised" if loss else "metric-mean-of-means"

    def read(**changes: object) -> float:
        return experiments.run(split, **changes).reported.get(key, math.nan)

    diagnosis = explain_by_parts(read(), alone, examples=list(map(len, split)), cause=cause)
    if not loss:
        diagnosis = with_padding(experiments, diagnosis, read=read)
    if diagnosis.cause != UNEXPLAINED:
        return diagnosis
    if faulty:  # a number that follows from the gradient, such as its norm
        return diagnose_split(experiments, split)
    return Diagnosis(cause, diagnosis.residual, diagnosis.evidence) if loss else diagnosis


def with_padding(
    experiments: Experiments, diagnosis: Diagnosis, *, read: Callable[..., float]
) -> Diagnosis:
    """A diagnosis of a number, unless more padding changes the number: then that comes first.

    Args:
        experiments: The subject's.
        diagnosis: Without looking at padding.
        read: The number, under changed settings.
    """
    if "padding" in experiments.subject.missing():
        return diagnosis
    for side in experiments.subject.padding_sides():
        plain, padded = read(), read(extra_padding=PADDING_COLUMNS, padding_side=side)
        change = relative_change(padded, plain)
        if change <= max(experiments.tolerance, MAX_PREDICTION_ERROR):
            continue
        text = f"{PADDING_COLUMNS} more columns of padding make {padded:.6g} of {plain:.6g}"
        seen = diagnose_seen_padding(experiments)
        if seen is not None:  # the forward of real tokens sees it, whatever is scored
            return replace(seen, evidence=f"{text}; {seen.evidence}")
        beside = () if diagnosis.cause == UNEXPLAINED else (diagnosis.cause,)
        return Diagnosis("padding-scored", change, text, beside)
    return diagnosis


def explain_by_parts(
    number: float, parts: Sequence[float], *, examples: Sequence[int], cause: str
) -> Diagnosis:
    """A number of the whole from those of the parts: their mean, their sum, the last one.

    Args:
        number: Of the whole.
        parts: Of each part alone.
        examples: How many each part holds.
        cause: To name if one of these explains the number.
    """
    shown = " ".join(f"{part:.6g}" for part in parts)
    guesses = _combinations(parts, examples)
    best, words = min((relative_change(number, guess), words) for words, guess in guesses)
    if best > MAX_PREDICTION_ERROR:
        text = f"of the parts alone: {shown}; together {number:.6g}"
        return Diagnosis(UNEXPLAINED, best, text)
    return Diagnosis(cause, best, f"{words} of the parts' own {shown}")


def _combinations(parts: Sequence[float], examples: Sequence[int]) -> Iterator[tuple[str, float]]:
    yield "the mean", sum(parts) / len(parts)
    weighted = sum(part * count for part, count in zip(parts, examples, strict=True))
    yield "the mean by examples", weighted / sum(examples)
    yield "the sum", sum(parts)
    yield "the last", parts[-1]
    yield "the first", parts[0]
    if all(part > 0 for part in parts):
        yield "the geometric mean", math.exp(sum(map(math.log, parts)) / len(parts))


def is_loss(key: str) -> bool:
    """Whether a number is a loss, not a metric."""
    return key.endswith("loss")


def relative_change(number: float, reference: float) -> float:
    """Of a number; 0 where both are not numbers, infinite where one is."""
    if math.isnan(number) or math.isnan(reference):
        return 0.0 if math.isnan(number) and math.isnan(reference) else math.inf
    return abs(number - reference) / max(abs(reference), 1e-12)


def diagnose_objective(experiments: Experiments, split: Split | None = None) -> Diagnosis | None:
    """Compare slopes of the reported loss with the gradient, along it and along random directions.

    Args:
        experiments: The subject's.
        split: Where; None: the whole batch.

    Returns:
        None if the loss has too few digits to tell, or if it has the gradient that was applied,
        up to a factor that no known wrong count explains (sums and means are both reported); else
        the cause.
    """
    at = experiments.whole_batch if split is None else split
    slopes = _slopes(experiments, at)
    if slopes is None:
        return None
    factor, residual, bound = slopes
    if abs(factor) < MAX_SLOPE_ERROR or residual > bound:
        text = f"slopes of the reported loss miss the gradient's by {residual:.1e}"
        if experiments.run(at, watch_moves=True).draws:
            text += "; random numbers are drawn during backward"
            return Diagnosis("recomputed-differently", residual, text)
        return Diagnosis("reported-not-optimised", residual, text)
    return None if split is not None else _wrong_count(experiments, factor, bound=bound)


def recomputed_differently(experiments: Experiments) -> Diagnosis | None:
    """Whether dropout draws other masks where a forward is computed again for its backward.

    Returns:
        None where dropout changes nothing, where the gradient is that of the reported loss with
        dropout on, or where it is not that with dropout off either.
    """
    at, on = experiments.whole_batch, {"dropout": True}
    dropped = experiments.run(at, **on)
    moved = relative_difference(dropped.gradient, experiments.run(at).gradient)
    if moved <= experiments.tolerance:
        return None
    draws = experiments.run(at, **on, watch_moves=True).draws
    still = experiments.run(at, watch_moves=True).draws
    seen = "random numbers are drawn during backward, as where a forward runs again"
    if not math.isfinite(dropped.reported.get("loss", math.nan)):
        if not draws or still:
            return None
        return Diagnosis("recomputed-differently", 0.0, f"with dropout on, {seen}")
    with_masks = _slopes(experiments, at, **on)
    if with_masks is None or with_masks[1] <= with_masks[2]:
        return None
    without = _slopes(experiments, at)
    if without is None or without[1] > without[2]:
        return None
    text = (
        f"with dropout on, slopes of the reported loss miss the gradient's by {with_masks[1]:.1e}, "
        f"without by {without[1]:.1e}"
    )
    text = f"{text}; {seen}" if draws else text
    return Diagnosis("recomputed-differently", with_masks[1], text)


def _slopes(
    experiments: Experiments, at: Split, **changes: object
) -> tuple[float, float, float] | None:
    """How long the loss's gradient is over the one applied, how far it is off, and how far it may.

    Returns:
        None if the loss has too few digits to tell, or if there is no gradient.
    """
    gradient = experiments.small_gradient(at, **changes)
    length = global_norm(gradient)
    if not length:
        return None
    along = scale(gradient, 1 / length)
    slope, step, uncertainty = _steady_slope(experiments, at, line=along, **changes)
    bound = max(MAX_SLOPE_ERROR, SAFETY * uncertainty)
    if bound > MAX_UNCERTAINTY:
        return None
    factor = slope / length
    error = max(
        abs(
            _slope(experiments, at, line=line, step=step, **changes) - factor * _dot(gradient, line)
        )
        / length
        for line in (_with_random_signs(along, seed) for seed in (1, 2))
    )
    return factor, error / max(abs(factor), 1e-12), bound


def _steady_slope(
    experiments: Experiments, split: Split, *, line: Gradient, **changes: object
) -> tuple[float, float, float]:
    """The slope along a line, the displacement that shows it best, and how uncertain it is.

    A loss that is computed or logged in few digits needs longer displacements.
    """
    noise = max(experiments.coarsest_rounding, experiments.noise_floor)
    noise *= abs(experiments.run(split, **changes).reported["loss"])
    found = []
    for step in STEPS:
        slope, half = (
            _slope(experiments, split, line=line, step=each, **changes) for each in (step, step / 2)
        )
        error = abs(slope - half) + noise / step
        uncertainty = error / abs(slope) if slope else math.inf
        found.append((uncertainty, slope, step))
        if uncertainty <= MAX_SLOPE_ERROR / SAFETY:
            break
    uncertainty, slope, step = min(found)
    # A loss that does not move at all has no slope, whatever its digits.
    return slope, step, 0.0 if math.isinf(uncertainty) else uncertainty


def _wrong_count(experiments: Experiments, factor: float, *, bound: float) -> Diagnosis | None:
    """A gradient that is the report's times targets over another count of the same batch."""
    counts = experiments.subject.example_counts()
    targets = 0 if counts is None else sum(each.targets for each in counts)
    for name, (cause, count) in experiments.denominators(experiments.whole_batch[0]).items():
        if cause == "example-weighted" or not targets or count == targets:
            continue
        residual = abs(factor * targets / count - 1)
        if residual < bound:
            text = f"the loss is reported over {targets} targets, optimised over {name}: {count:g}"
            return Diagnosis(cause, residual, text)
    return None


def _slope(
    experiments: Experiments, split: Split, *, line: Gradient, step: float, **changes: object
) -> float:
    """Of the reported loss along a direction of unit length."""
    ahead, behind = (
        experiments.rerun(split, **changes, perturbation=Perturbation(scale(line, sign * step)))
        for sign in (1.0, -1.0)
    )
    return (ahead.reported["loss"] - behind.reported["loss"]) / (2 * step)


def _with_random_signs(line: Gradient, seed: int) -> Gradient:
    """The same sizes with random signs."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor * (torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1)
        for name, tensor in line.items()
    }


def _dot(gradient: Gradient, line: Gradient) -> float:
    return sum(float((tensor * line[name]).sum()) for name, tensor in gradient.items())
