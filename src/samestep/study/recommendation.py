"""What a study advises: which split to train with, and which arms to keep away from."""

from collections.abc import Sequence
from statistics import fmean

from samestep.study.comparison import ArmComparison, compare_arms
from samestep.study.results import ArmResult, Results


def recommend(results: Results) -> str:
    """The one sentence that a reader takes away; it says no more than the runs show.

    Args:
        results: The results.

    Returns:
        Which exact split is the fastest, and what the arms of another step cost.
    """
    compared = [each for each in compare_arms(results) if each.same_step is not None]
    if not compared:
        return "No advice: no arm was compared step by step with an exact one of its group."
    return " ".join([*_free_choice(results, compared), *_warnings(compared)])


def _free_choice(results: Results, compared: Sequence[ArmComparison]) -> list[str]:
    """Among splits of one step, the fastest; nothing to choose from, nothing said."""
    same = {(each.group, each.arm) for each in compared if each.same_step}
    if not same:
        return []
    groups = {group for group, _ in same}
    speeds: dict[str, list[float]] = {}
    for arm in results.arms:
        if (arm.group, arm.label) in same or (arm.reference and arm.group in groups):
            speeds.setdefault(arm.label, []).extend(_speeds(arm))
    measured = {label: fmean(found) for label, found in speeds.items() if found}
    labels = ", ".join(speeds)
    text = f"{labels} take the same step: choose among them by speed and memory alone"
    if not measured:
        return [f"{text}."]
    best = max(measured, key=lambda label: measured[label])
    return [f"{text}; here {best} was the fastest ({measured[best]:,.0f} tokens/s)."]


def _speeds(arm: ArmResult) -> list[float]:
    return [run.tokens_per_second for run in arm.finished()]


def _warnings(compared: Sequence[ArmComparison]) -> list[str]:
    """Arms of another step, and whether these runs show that they train worse."""
    different = [each for each in compared if not each.same_step]
    if not different:
        return []
    labels = ", ".join(dict.fromkeys(each.arm for each in different))
    worse = dict.fromkeys(each.arm for each in different if each.outcome == "worse")
    shown = (
        f"{', '.join(worse)} trained worse than the noise between seeds"
        if worse
        else "whether they also train worse, these runs do not show"
    )
    return [f"Keep away from {labels}: another step than the batch's own; {shown}."]
