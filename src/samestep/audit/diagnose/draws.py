"""Random numbers of a loop's own, which no seed of the audit reaches: seen where they are drawn."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from samestep.audit.experiments import Experiments
from samestep.audit.gradients import relative_difference
from samestep.audit.splits import merged
from samestep.audit.subject import Gradient, Split


class _RandomOperations(TorchDispatchMode):
    """Counts the operations that draw random numbers.

    Args:
        skips: Let every one draw once in vain before, so that it gets other numbers.
    """

    def __init__(self, *, skips: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.number = 0
        self._skips = skips

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        draws = torch.Tag.nondeterministic_seeded in function.tags
        self.number += draws
        if draws and self._skips:
            function(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def drawn_each_time(experiments: Experiments, split: Split, **changes: object) -> float | None:
    """How far the gradient changes with random numbers that every micro-batch draws, relative.

    Args:
        experiments: The subject's.
        split: The split at fault.
        **changes: The settings that it was run under.

    Returns:
        None if a split draws no more often than the whole batch, or if it does not matter.
    """
    try:
        own, plain = _watched(experiments, split, changes)
        _, whole = _watched(experiments, merged(split), changes)
        if plain.number <= whole.number:
            return None
        other, _ = _watched(experiments, split, changes, skips=True)
    except Exception:  # some compiled code cannot run under a watch
        return None
    moved = relative_difference(other, own)
    return moved if moved > experiments.residual_tolerance else None


def _watched(
    experiments: Experiments, split: Split, changes: Mapping[str, object], *, skips: bool = False
) -> tuple[Gradient, _RandomOperations]:
    with _RandomOperations(skips=skips) as operations:
        return experiments.rerun(split, **changes).gradient, operations
