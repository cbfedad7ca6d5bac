"""Verdicts: is the step the same, and did the training differ by more than seeds do?"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from samestep.study.results import ArmResult, Results
from samestep.study.statistics import Estimate, mean_interval

_TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "mixed": 5e-2, "bfloat16": 5e-2}
"""Relative difference of gradients up to which a step is the same: what rounding makes of it."""

Outcome = Literal["worse", "better", "small", "unresolved", "one seed", "diverged", "no reference"]


@dataclass(frozen=True)
class ArmComparison:
    """One arm beside the reference of its group.

    Attributes:
        arm: Its label.
        group: Its group.
        same_step: Whether its gradient is the reference's; None if it was not compared.
        gradient_difference: The largest relative difference over steps and seeds.
        cosine: The smallest cosine over them.
        ratio: Smallest and largest norm over norm.
        outcome: What came of the training: "worse" or "better" than the reference by more than
            the noise between seeds, "small" (resolved, but smaller than that), "unresolved"
            (not distinguished from no difference), or why there is no claim.
        change: Evaluation loss minus the reference's, mean over seeds; None without both.
        interval: Its 95 % interval over the paired seeds; None with fewer than two.
        seed_std: Standard deviation of the reference's evaluation loss over seeds; None likewise.
        headline: Whether the step is the same, in two words.
        explanation: Why, with the evidence; it continues the headline.
        training: What came of the training, with the evidence.
    """

    arm: str
    group: str
    same_step: bool | None
    gradient_difference: float | None
    cosine: float | None
    ratio: tuple[float, float] | None
    outcome: Outcome
    change: float | None
    interval: Estimate | None
    seed_std: float | None
    headline: str
    explanation: str
    training: str

    @property
    def verdict(self) -> str:
        """Headline, explanation and training in one text."""
        return f"{self.headline}{self.explanation} {self.training}"


def compare_arms(results: Results) -> list[ArmComparison]:
    """Each arm but the references, beside the reference of its group.

    Args:
        results: The results.

    Returns:
        The comparisons, in the order of the arms.
    """
    tolerance = _TOLERANCE[results.precision]
    comparisons = []
    for arms in results.groups().values():
        reference = next((arm for arm in arms if arm.reference), None)
        comparisons += [
            _compare(arm, reference, tolerance=tolerance) for arm in arms if not arm.reference
        ]
    return comparisons


def final_losses(arm: ArmResult) -> dict[int, float]:
    """The last evaluation loss of each run that finished, by seed.

    Args:
        arm: The arm.

    Returns:
        Loss by seed, without the runs that diverged.
    """
    return {run.seed: run.evaluations.loss[-1] for run in arm.finished()}


def summarise(results: Results) -> list[str]:
    """One sentence for each arm over all groups, those that exact arithmetic covers together.

    Args:
        results: The results.

    Returns:
        The sentences.
    """
    compared = [each for each in compare_arms(results) if each.gradient_difference is not None]
    same = [each for each in compared if each.same_step]
    sentences = []
    if same:
        labels = ", ".join(dict.fromkeys(each.arm for each in same))
        largest = max(each.gradient_difference or 0.0 for each in same)
        sentences.append(
            f"{labels}: the same step as the undivided batch (gradient within {largest:.0e})."
        )
    different: dict[str, list[ArmComparison]] = {}
    for each in compared:
        if not each.same_step:
            different.setdefault(each.arm, []).append(each)
    for label, comparisons in different.items():
        sizes = [each.gradient_difference or 0.0 for each in comparisons]
        outcomes = Counter(_OUTCOMES[each.outcome] for each in comparisons)
        training = ", ".join(
            outcome
            if len(comparisons) == 1
            else f"{outcome} in {number} of {len(comparisons)} groups"
            for outcome, number in outcomes.items()
        )
        size = _format_sizes(min(sizes), max(sizes))
        sentences.append(f"{label}: gradient off by {size}; {training}.")
    return sentences


def format_change(change: float | None) -> str:
    """A change with its sign; tiny ones with their power of ten.

    Args:
        change: The change, or None where there is none.

    Returns:
        Such as "+0.0194", "-2e-06" or "-".
    """
    if change is None:
        return "-"
    return f"{change:+.4f}" if change == 0 or abs(change) >= 5e-4 else f"{change:+.0e}"


def format_range(low: float, high: float) -> str:
    """Two numbers, or one where they read the same.

    Args:
        low: The smaller.
        high: The larger.

    Returns:
        Such as "1.1 to 1.2".
    """
    first, last = (f"{end:.3g}" if end < 100 else f"{end:,.0f}" for end in (low, high))
    return first if first == last else f"{first} to {last}"


def _format_sizes(low: float, high: float) -> str:
    first, last = (f"{end:.0%}" if end < 10 else f"{end:,.0f} times" for end in (low, high))
    return first if first == last else f"{first} to {last}"


def _compare(arm: ArmResult, reference: ArmResult | None, *, tolerance: float) -> ArmComparison:
    differences, cosines, ratios = (
        [value for run in arm.runs for value in getattr(run.gradients, column)]
        for column in ("relative_difference", "cosine", "ratio")
    )
    same_step = max(differences) <= tolerance if differences else None
    losses = final_losses(arm)
    reference_losses = final_losses(reference) if reference else {}
    paired = [losses[seed] - reference_losses[seed] for seed in losses if seed in reference_losses]
    change = float(np.mean(paired)) if paired else None
    interval = mean_interval(paired) if len(paired) > 1 else None
    seed_std = (
        float(np.std(list(reference_losses.values()), ddof=1))
        if len(reference_losses) > 1
        else None
    )
    outcome = _outcome(reference, change, interval=interval, seed_std=seed_std)
    headline, explanation = _explain_step(
        arm, same_step, differences=differences, cosines=cosines, ratios=ratios
    )
    return ArmComparison(
        arm=arm.label,
        group=arm.group,
        same_step=same_step,
        gradient_difference=max(differences, default=None),
        cosine=min(cosines, default=None),
        ratio=(min(ratios), max(ratios)) if ratios else None,
        outcome=outcome,
        change=change,
        interval=interval,
        seed_std=seed_std,
        headline=headline,
        explanation=explanation,
        training=_explain_outcome(
            arm, outcome, change=change, interval=interval, seed_std=seed_std
        ),
    )


def _outcome(
    reference: ArmResult | None,
    change: float | None,
    *,
    interval: Estimate | None,
    seed_std: float | None,
) -> Outcome:
    if reference is None:
        return "no reference"
    if change is None:
        return "diverged"
    if interval is None or seed_std is None:
        return "one seed"
    if interval.low <= 0 <= interval.high:
        return "unresolved"
    if abs(change) <= seed_std:
        return "small"
    return "worse" if change > 0 else "better"


_OUTCOMES: dict[Outcome, str] = {
    "worse": "trained worse",
    "better": "trained better",
    "small": "trained differently, by less than seeds do",
    "unresolved": "no difference after training that these seeds show",
    "one seed": "one seed, so no claim about the training",
    "diverged": "diverged",
    "no reference": "no exact arm to compare the training with",
}

_CAUSES = {
    "mean-of-means": "each micro-batch is divided by its own number of targets",
    "sum": "the sum is never divided, so its size follows the number of targets",
    "exact": "which exact arithmetic does not explain: the model itself depends on the split, or "
    "the layout does",
}


def _explain_step(
    arm: ArmResult,
    same_step: bool | None,
    *,
    differences: Sequence[float],
    cosines: Sequence[float],
    ratios: Sequence[float],
) -> tuple[str, str]:
    """Headline and explanation of a comparison."""
    if same_step is None:
        return "Step not compared", "."
    if same_step:
        return "Same step", (
            f": at the same weights its gradient differs from the undivided batch's by "
            f"{max(differences):.1e} at most, which is rounding."
        )
    largest = max(differences)
    size = f"{largest:.0%}" if largest < 10 else f"{largest:,.0f} times the length"
    return "Different step", (
        f", because {_CAUSES[arm.normalisation]}: at the same weights its gradient "
        f"is off by up to {size} of the undivided batch's (cosine {min(cosines):.3f}, length x "
        f"{format_range(min(ratios), max(ratios))})."
    )


def _explain_outcome(
    arm: ArmResult,
    outcome: Outcome,
    *,
    change: float | None,
    interval: Estimate | None,
    seed_std: float | None,
) -> str:
    """What came of the training, with the evidence and the runs that are left out."""
    diverged = len(arm.runs) - len(arm.finished())
    tail = f" {diverged} of {len(arm.runs)} runs diverged and are left out." if diverged else ""
    if outcome == "no reference":
        return "No exact arm in its group to compare the training with." + tail
    if outcome == "diverged":
        return "No run to compare: it, or the reference, diverged with every seed." + tail
    assert change is not None
    if outcome == "one seed":
        return (
            f"After training its evaluation loss is {format_change(change)} from the reference's; "
            "one seed: no claim about noise." + tail
        )
    assert interval is not None
    assert seed_std is not None
    evidence = (
        f"evaluation loss {format_change(change)} (95 % interval {format_change(interval.low)} to "
        f"{format_change(interval.high)} over {len(arm.finished())} paired seeds; seeds of the "
        f"reference differ by {seed_std:.4f})"
    )
    return {
        "worse": f"It trained worse: {evidence}.",
        "better": f"It trained better: {evidence}.",
        "small": f"The training can be told apart, but by less than seeds differ: {evidence}.",
        "unresolved": f"These seeds show no difference after training: {evidence}.",
    }[outcome] + tail
