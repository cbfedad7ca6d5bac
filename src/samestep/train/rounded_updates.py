"""How much of an update survives the rounding of weights in low precision.

Neighbouring bfloat16 numbers lie 1/128 to 1/256 of their size apart: an update that is smaller than
half of that leaves the weight as it was, in this step and in every other one.
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from samestep.engine.gradients import LOW_PRECISION_DTYPES
from samestep.engine.step import StepReport

log = logging.getLogger("samestep")

_SAMPLE = 1024
"""Elements of each weight that are looked at."""

_UPDATES = 3
"""Updates that are looked at, so that a warm-up's first one does not stand for all."""


def changed_share(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """The share of elements that are not equal to what they were.

    Args:
        before: Tensors.
        after: As many, of the same shapes.

    Returns:
        From 0 to 1; 0 of no elements.
    """
    elements = sum(tensor.numel() for tensor in before)
    changed = sum(int((one != two).sum()) for one, two in zip(before, after, strict=True))
    return changed / elements if elements else 0.0


class UpdateWatch:
    """Looks at the first updates of a run, and says once how many weights of low precision moved.

    Args:
        model: The model; nothing is done if no weight that trains is of low precision.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights = [
            weight
            for weight in model.parameters()
            if weight.requires_grad and weight.dtype in LOW_PRECISION_DTYPES
        ]
        self._left = _UPDATES if self._weights else 0
        self._shares: list[float] = []
        self._before: list[Tensor] = []

    def before_step(self) -> None:
        """Remember a sample of the weights."""
        if self._left:
            self._before = self._sample()

    def after_step(self, report: StepReport, *, lr: float, last: bool) -> None:
        """Compare, and warn after the last of the first updates.

        Args:
            report: What the step did; a skipped one does not count.
            lr: Its learning rate.
            last: Whether the run ends with it.
        """
        if not self._left or report.skipped is not None:
            return
        self._shares.append(changed_share(self._before, self._sample()))
        self._left = 0 if last else self._left - 1
        self._before = []
        if self._left == 0:
            log.warning(
                "weights in %s: the update changed %s of them in step %d (learning rate %.2g); the "
                "rest rounded back to what it was. Use float32 weights (--precision float32), or a "
                "larger learning rate",
                str(self._weights[0].dtype).removeprefix("torch."),
                f"{self._shares[-1]:.0%}" if self._shares[-1] >= 0.01 else "less than 1%",
                len(self._shares),
                lr,
            )

    @torch.no_grad()
    def _sample(self) -> list[Tensor]:
        local = [w.to_local() if isinstance(w, DTensor) else w for w in self._weights]
        return [w.flatten()[:: max(1, w.numel() // _SAMPLE)].clone() for w in local]
