"""The arms of a study: the grid expanded, the reference of each group, what they are called."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from samestep.study.spec import (
    GRID_FIELDS,
    Block,
    Normalisation,
    PaddingChoice,
    StudySpec,
    split_sizes,
)


@dataclass(frozen=True)
class Arm:
    """One configuration; it runs once for each seed.

    Attributes:
        batch: Examples a step.
        split: Micro-batch x accumulation.
        normalisation: What its loss is divided by.
        padding: The layout that the spec asks for.
        lr: Peak learning rate.
        cut: Share of the rows whose completion is cut.
        seeds: The seeds.
        name: Its name in the spec, or None.
    """

    batch: int
    split: str
    normalisation: Normalisation
    padding: PaddingChoice
    lr: float
    cut: float
    seeds: tuple[int, ...]
    name: str | None = None

    @property
    def micro_batch(self) -> int:
        """Examples a micro-batch."""
        return split_sizes(self.split)[0]

    @property
    def configuration(self) -> tuple[Any, ...]:
        """Everything but seeds and name; arms that agree in it are the same arm."""
        return (self.batch, self.split, self.normalisation, self.padding, self.lr, self.cut)

    @property
    def group(self) -> tuple[Any, ...]:
        """Arms that agree in it are compared: they differ only in what must not matter."""
        return (self.batch, self.lr, self.cut)


def expand_grid(spec: StudySpec) -> list[Arm]:
    """The arms of a study.

    Args:
        spec: The study.

    Returns:
        Each configuration once, in the order of the spec.
    """
    blocks = spec.arms or (Block(**{name: getattr(spec, name) for name in GRID_FIELDS}),)
    return list({arm.configuration: arm for block in blocks for arm in _arms_of(block)}.values())


def _arms_of(block: Block) -> Iterator[Arm]:
    combinations = itertools.product(
        block.cut, block.lr, block.normalisation, block.split, block.padding
    )
    for cut, lr, normalisation, split, padding in combinations:
        yield Arm(
            batch=block.batch,
            split=split,
            normalisation=normalisation,
            padding=padding,
            lr=lr,
            cut=cut,
            seeds=block.seeds,
            name=block.name,
        )


def reference_arms(arms: Sequence[Arm]) -> dict[tuple[Any, ...], Arm]:
    """The arm that each group is compared with: exact, with the largest micro-batch.

    Args:
        arms: All arms of the study.

    Returns:
        The reference by `Arm.group`; a group without an exact arm has none.
    """
    references: dict[tuple[Any, ...], Arm] = {}
    for arm in arms:
        best = references.get(arm.group)
        if arm.normalisation == "exact" and (best is None or arm.micro_batch > best.micro_batch):
            references[arm.group] = arm
    return references


def arm_label(arm: Arm, arms: Sequence[Arm]) -> str:
    """The name of an arm within its group; only what varies in the study is in it.

    Args:
        arm: The arm.
        arms: All arms of the study.

    Returns:
        Its name in the spec, or its split, its normalisation if the study has a wrong one, and its
        padding if the study varies it.
    """
    if arm.name is not None:
        return arm.name
    words = [arm.split]
    if any(each.normalisation != "exact" for each in arms):
        words.append("exact" if arm.normalisation == "exact" else f"{arm.normalisation} (wrong)")
    if len({each.padding for each in arms}) > 1:
        words.append("packed" if arm.padding == "none" else f"padding {arm.padding}")
    return " ".join(words)


def group_title(arm: Arm, arms: Sequence[Arm], *, cut_targets: int) -> str:
    """The name of an arm's group; only what varies in the study is in it.

    Args:
        arm: The arm.
        arms: All arms of the study.
        cut_targets: How many targets a cut completion keeps.

    Returns:
        Its batch, with its learning rate and its share of cut completions if they vary.
    """
    words = [f"batch {arm.batch}"]
    if len({each.lr for each in arms}) > 1:
        words.append(f"learning rate {arm.lr:g}")
    if len({each.cut for each in arms}) > 1:
        words.append(
            f"{arm.cut:.0%} of completions cut to {cut_targets} tokens"
            if arm.cut
            else "completions as they are"
        )
    return ", ".join(words)
