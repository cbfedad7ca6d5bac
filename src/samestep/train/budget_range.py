"""The budgets of a micro-batch that can be chosen on a kind of device."""

from dataclasses import dataclass, replace

import torch

from samestep.train.micro_batches import DEFAULT_MICRO_TOKENS


@dataclass(frozen=True)
class BudgetRange:
    """What can be chosen on a kind of device.

    Attributes:
        measured: Budgets of the two measurements; further pairs where those run out of memory.
        budgets: Each about twice the one before, so that noise in a measurement seldom changes the
            choice, and no more than keeps such a device busy, so that it never costs much memory.
        least_for_speed: Less is chosen only for want of memory: where other programs disturb the
            clock, the fixed costs of small micro-batches are easily missed, and those are
            remembered for good.
        fixed_share: The choice is the smallest budget that spends at most this share of the time
            on fixed costs: twice the budget would save half of it, for twice the activations.
        unmeasured: The budget where nothing can be measured.
    """

    measured: tuple[tuple[int, int], ...]
    budgets: tuple[int, ...]
    least_for_speed: int
    fixed_share: float
    unmeasured: int


ON_CPU = BudgetRange(
    measured=((256, 1024),),
    budgets=(256, 448, 896, 1792),
    least_for_speed=448,
    fixed_share=0.12,
    unmeasured=DEFAULT_MICRO_TOKENS,
)
LOW_PRECISION_ON_CPU = replace(ON_CPU, fixed_share=0.06)
"""With products of low precision, a measurement shows half of what is fixed.

oneDNN makes code for every product of a new shape, which takes about as long as the gradients of
all weights; and micro-batches without padding hardly ever have the same shape, but those that are
measured several times have.
"""

ON_ACCELERATOR = BudgetRange(
    measured=((2048, 8192), (512, 2048), (128, 512)),
    budgets=(256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536),
    least_for_speed=8192,
    fixed_share=0.03,
    unmeasured=8192,
)
"""An accelerator is busy with thousands of tokens only; memory decides more often than time."""


def budget_range(device: torch.device, *, precision: str = "float32") -> BudgetRange:
    """What can be chosen on a device.

    Args:
        device: Of the model.
        precision: Of the products, as in the settings.

    Returns:
        The budgets, and how one is chosen.
    """
    if device.type != "cpu":
        return ON_ACCELERATOR
    return LOW_PRECISION_ON_CPU if precision in ("mixed", "bfloat16") else ON_CPU
