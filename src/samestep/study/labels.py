"""What arms and groups are called: only what varies is said."""

from collections.abc import Sequence

from samestep.study.spec import Arm


def label(arm: Arm, grid: Sequence[Arm]) -> str:
    """The name of an arm within its group.

    Args:
        arm: The arm.
        grid: All arms of the study.

    Returns:
        Its own name, or its split, its normalisation if that is a wrong one, and its padding if
        the study varies it.
    """
    if arm.name is not None:
        return arm.name
    words = [arm.split]
    if any(other.normalisation != "exact" for other in grid):
        words.append("exact" if arm.normalisation == "exact" else f"{arm.normalisation} (wrong)")
    if len({other.padding for other in grid}) > 1:
        words.append("packed" if arm.padding == "none" else f"padding {arm.padding}")
    return " ".join(words)


def group_title(arm: Arm, grid: Sequence[Arm], *, cut_targets: int) -> str:
    """The name of an arm's group.

    Args:
        arm: The arm.
        grid: All arms of the study.
        cut_targets: How many targets a cut completion keeps.
    """
    words = [f"batch {arm.batch}"]
    if len({other.lr for other in grid}) > 1:
        words.append(f"learning rate {arm.lr:g}")
    if len({other.cut for other in grid}) > 1:
        words.append(
            f"{arm.cut:.0%} of completions cut to {cut_targets} tokens"
            if arm.cut
            else "completions as they are"
        )
    return ", ".join(words)
