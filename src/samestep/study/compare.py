"""Verdicts: is the step the same, and did the training differ by more than seeds do?"""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np

from samestep.study.results import ArmResult, Results
from samestep.study.statistics import Estimate, mean_interval

TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 5e-2}
"""Relative difference of gradients up to which a step is the same: what rounding makes of it."""

Outcome = Literal["worse", "better", "small", "unresolved", "one seed", "diverged", "no reference"]


@dataclass(frozen=True)
class Comparison:
    """One arm beside the reference of its group.

    Attributes:
        arm: Its label.
        group: Its group.
        same_step: Whether its gradient is the reference's; None if it was not compared.
        gradient_difference: The largest relative difference found.
        cosine: The smallest cosine found.
        ratio: Smallest and largest norm over norm.
        outcome: What came of the training: "worse" or "better" than the reference by more than
            the noise between seeds, "small" (told apart, but by less than that), "unresolved"
            (not told from no difference), or why there is no claim.
        change: Evaluation loss minus the reference's, mean over seeds; None without both.
        interval: Its 95 % interval over the paired seeds; None with fewer than two.
        noise: Standard deviation of the reference's evaluation loss over seeds; None likewise.
        headline: Whether the step is the same, in two words.
        because: Why, with the evidence.
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
    noise: float | None
    headline: str
    because: str
    training: str

    @property
    def verdict(self) -> str:
        """All of it in words."""
        return f"{self.headline}{self.because} {self.training}"


def compare(results: Results) -> list[Comparison]:
    """Each arm but the references, beside the reference of its group.

    Args:
        results: The results.

    Returns:
        The comparisons, in the order of the arms.
    """
    tolerance = TOLERANCE[str(results.spec["dtype"])]
    comparisons = []
    for arms in results.groups().values():
        reference = next((arm for arm in arms if arm.reference), None)
        comparisons += [_compare(arm, reference, tolerance) for arm in arms if not arm.reference]
    return comparisons


def final_losses(arm: ArmResult) -> dict[int, float]:
    """The last evaluation loss of each run that finished, by seed."""
    return {run.seed: run.evaluations.loss[-1] for run in arm.finished()}


def in_short(results: Results) -> list[str]:
    """One sentence for each arm over all groups, those that exact arithmetic covers together.

    Args:
        results: The results.

    Returns:
        The sentences.
    """
    compared = [one for one in compare(results) if one.gradient_difference is not None]
    same = [one for one in compared if one.same_step]
    sentences = []
    if same:
        labels = ", ".join(dict.fromkeys(one.arm for one in same))
        most = max(one.gradient_difference or 0.0 for one in same)
        sentences.append(
            f"{labels}: the same step as the undivided batch (gradient within {most:.0e})."
        )
    by_label: dict[str, list[Comparison]] = {}
    for one in compared:
        if not one.same_step:
            by_label.setdefault(one.arm, []).append(one)
    for label, group in by_label.items():
        sizes = [one.gradient_difference or 0.0 for one in group]
        outcomes = Counter(_OUTCOMES[one.outcome] for one in group)
        told = ", ".join(
            name if len(group) == 1 else f"{name} in {number} of {len(group)} groups"
            for name, number in outcomes.items()
        )
        sentences.append(f"{label}: gradient off by {_off(min(sizes), max(sizes))}; {told}.")
    return sentences


_OUTCOMES: dict[Outcome, str] = {
    "worse": "trained worse",
    "better": "trained better",
    "small": "trained differently, by less than seeds do",
    "unresolved": "no difference after training that these seeds show",
    "one seed": "one seed, so no claim about the training",
    "diverged": "diverged",
    "no reference": "no exact arm to compare the training with",
}


def _off(low: float, high: float) -> str:
    first, last = (f"{one:.0%}" if one < 10 else f"{one:,.0f} times" for one in (low, high))
    return first if first == last else f"{first} to {last}"


def _compare(arm: ArmResult, reference: ArmResult | None, tolerance: float) -> Comparison:
    differences, cosines, ratios = (
        [value for run in arm.runs for value in getattr(run.gradients, column)]
        for column in ("relative_difference", "cosine", "ratio")
    )
    same = max(differences) <= tolerance if differences else None
    own, base = final_losses(arm), final_losses(reference) if reference else {}
    paired = [own[seed] - base[seed] for seed in own if seed in base]
    interval = mean_interval(paired) if len(paired) > 1 else None
    noise = float(np.std(list(base.values()), ddof=1)) if len(base) > 1 else None
    change = float(np.mean(paired)) if paired else None
    outcome = _outcome(reference, change, interval, noise)
    headline, because = _step_words(arm, same, differences, cosines, ratios)
    return Comparison(
        arm=arm.label,
        group=arm.group,
        same_step=same,
        gradient_difference=max(differences, default=None),
        cosine=min(cosines, default=None),
        ratio=(min(ratios), max(ratios)) if ratios else None,
        outcome=outcome,
        change=change,
        interval=interval,
        noise=noise,
        headline=headline,
        because=because,
        training=_outcome_words(arm, outcome, change, interval, noise),
    )


def _outcome(
    reference: ArmResult | None,
    change: float | None,
    interval: Estimate | None,
    noise: float | None,
) -> Outcome:
    if reference is None:
        return "no reference"
    if change is None:
        return "diverged"
    if interval is None or noise is None:
        return "one seed"
    if interval.low <= 0 <= interval.high:
        return "unresolved"
    if abs(change) <= noise:
        return "small"
    return "worse" if change > 0 else "better"


_BECAUSE = {
    "mean-of-means": "each micro-batch is divided by its own number of targets",
    "sum": "the sum is never divided, so its size follows the number of targets",
    "exact": "which exact arithmetic does not explain: the model itself depends on the split, or "
    "the layout does",
}


def _step_words(
    arm: ArmResult,
    same: bool | None,
    differences: list[float],
    cosines: list[float],
    ratios: list[float],
) -> tuple[str, str]:
    if same is None:
        return "Step not compared", "."
    if same:
        return "Same step", (
            f": at the same weights its gradient differs from the undivided batch's by "
            f"{max(differences):.1e} at most, which is rounding."
        )
    largest = max(differences)
    size = f"{largest:.0%}" if largest < 10 else f"{largest:,.0f} times the length"
    return "Different step", (
        f", because {_BECAUSE[arm.normalisation]}: at the same weights its gradient "
        f"is off by up to {size} of the undivided batch's (cosine {min(cosines):.3f}, length x "
        f"{span(min(ratios), max(ratios))})."
    )


def signed(change: float | None) -> str:
    """A change with its sign; tiny ones with their power of ten."""
    if change is None:
        return "-"
    return f"{change:+.4f}" if change == 0 or abs(change) >= 5e-4 else f"{change:+.0e}"


def span(low: float, high: float) -> str:
    """Two numbers, or one where they read the same."""
    first, last = (f"{end:.3g}" if end < 100 else f"{end:,.0f}" for end in (low, high))
    return first if first == last else f"{first} to {last}"


def _outcome_words(
    arm: ArmResult,
    outcome: Outcome,
    change: float | None,
    interval: Estimate | None,
    noise: float | None,
) -> str:
    lost = len(arm.runs) - len(arm.finished())
    tail = f" {lost} of {len(arm.runs)} runs diverged and are left out." if lost else ""
    if outcome == "no reference":
        return "No exact arm in its group to compare the training with." + tail
    if outcome == "diverged":
        return "No run to compare: it, or the reference, diverged with every seed." + tail
    assert change is not None
    if outcome == "one seed":
        return (
            f"After training its evaluation loss is {signed(change)} from the reference's; "
            "one seed: no claim about noise." + tail
        )
    assert interval is not None
    assert noise is not None
    measured = (
        f"evaluation loss {signed(change)} (95 % interval {signed(interval.low)} to "
        f"{signed(interval.high)} over {len(arm.finished())} paired seeds; seeds of the reference "
        f"differ by {noise:.4f})"
    )
    return {
        "worse": f"It trained worse: {measured}.",
        "better": f"It trained better: {measured}.",
        "small": f"The training can be told apart, but by less than seeds differ: {measured}.",
        "unresolved": f"These seeds show no difference after training: {measured}.",
    }[outcome] + tail
