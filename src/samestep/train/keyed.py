"""A loss whose dropout belongs to a step."""

from typing import Any

from samestep.engine.terms import LossFn, LossResult
from samestep.engine.two_pass import TwoPass
from samestep.models.dropout import key_dropout


def keyed(loss_fn: LossFn, *, seed: int, step: int) -> LossFn:
    """The loss, with the model's dropout keyed to (seed, step, example) before each forward.

    Args:
        loss_fn: The loss.
        seed: The run's seed.
        step: The step's number.

    Returns:
        A loss; declared by `samestep.TwoPass` if the given one is.
    """

    def with_keys(model: Any, micro: Any) -> LossResult:
        key_dropout(model, micro, seed=seed, step=step)
        return loss_fn(model, micro)

    return TwoPass(with_keys) if isinstance(loss_fn, TwoPass) else with_keys
