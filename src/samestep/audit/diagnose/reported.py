"""Why a reported number changes with the split, and whether the reported loss is the objective."""

import math
from collections.abc import Iterator, Sequence

import torch

from samestep.audit.causes import UNEXPLAINED, Diagnosis
from samestep.audit.diagnose.split import diagnose_split, is_faulty
from samestep.audit.diagnose.state import compare_left
from samestep.audit.experiments import Experiments, merged
from samestep.audit.gradients import global_norm, scale
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
    number = experiments.run(split).reported[key]
    diagnosis = explain_by_parts(number, alone, examples=list(map(len, split)), cause=cause)
    if diagnosis.cause != UNEXPLAINED:
        return diagnosis
    if faulty:  # a number that follows from the gradient, such as its norm
        return diagnose_split(experiments, split)
    return Diagnosis(cause, diagnosis.residual, diagnosis.evidence) if loss else diagnosis


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
    gradient = experiments.small_gradient(at)
    length = global_norm(gradient)
    if not length:
        return None
    along = scale(gradient, 1 / length)
    slope, step, uncertainty = _steady_slope(experiments, at, line=along)
    bound = max(MAX_SLOPE_ERROR, SAFETY * uncertainty)
    if bound > MAX_UNCERTAINTY:
        return None
    factor = slope / length
    error = max(
        abs(_slope(experiments, at, line=line, step=step) - factor * _dot(gradient, line)) / length
        for line in (_with_random_signs(along, seed) for seed in (1, 2))
    )
    residual = error / max(abs(factor), 1e-12)
    if abs(factor) < MAX_SLOPE_ERROR or residual > bound:
        text = f"slopes of the reported loss miss the gradient's by {residual:.1e}"
        return Diagnosis("reported-not-optimised", residual, text)
    return None if split is not None else _wrong_count(experiments, factor, bound=bound)


def _steady_slope(
    experiments: Experiments, split: Split, *, line: Gradient
) -> tuple[float, float, float]:
    """The slope along a line, the displacement that shows it best, and how uncertain it is.

    A loss that is computed or logged in few digits needs longer displacements.
    """
    noise = max(experiments.coarsest_rounding, experiments.noise_floor)
    noise *= abs(experiments.run(split).reported["loss"])
    found = []
    for step in STEPS:
        slope, half = (
            _slope(experiments, split, line=line, step=each) for each in (step, step / 2)
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


def _slope(experiments: Experiments, split: Split, *, line: Gradient, step: float) -> float:
    """Of the reported loss along a direction of unit length."""
    ahead, behind = (
        experiments.rerun(split, perturbation=Perturbation(scale(line, sign * step)))
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
