"""What a run of a trainer shows: the gradient that its optimizer was given, and its log."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from samestep.audit.adapters.loop import numbers
from samestep.audit.adapters.training import LEARNING_RATE, Recorder
from samestep.audit.subject import Gradient, Observation
from samestep.errors import CheckError

OTHER_NUMBERS = ("grad_norm", "learning_rate", "epoch", "step", "total_flos")
"""Logged numbers that are no measure of the model, beside those of time."""


def observed(trainer: Any, recorder: Recorder, initial: Mapping[str, Tensor]) -> Observation:
    """What a trainer did.

    Args:
        trainer: After its run.
        recorder: The optimizer that it was given.
        initial: Weights and buffers before the run, by name.

    Raises:
        CheckError: It did not step the optimizer.
    """
    if not recorder.updates:
        raise CheckError("the trainer ended without an update by its optimizer")
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    reported = numbers(logs[-1]) if logs else {}
    precision = torch.finfo(next(trainer.model.parameters()).dtype).eps
    gradient = recorder.gradient
    moved = _moved(trainer, gradient, initial)
    if moved is not None:  # something else than the optimizer changed the weights
        size = math.hypot(*(float(one.norm()) for one in moved.values()))
        before = math.hypot(*(float(initial[one].norm()) for one in moved))
        precision, gradient = precision * before / max(LEARNING_RATE * size, 1e-300), moved
    return Observation(
        gradient,
        reported=measures(reported),
        rounding=precision,
        updates=recorder.updates if moved is None else 0,
    )


def _moved(trainer: Any, gradient: Gradient, initial: Mapping[str, Tensor]) -> Gradient | None:
    """What the weights moved along, if that is not what the optimizer was given."""
    moved, other = {}, False
    for name, weight in trainer.model.named_parameters():
        if not weight.requires_grad:
            continue
        before = initial[name].to(weight.dtype)
        moved[name] = ((before - weight.detach()) / LEARNING_RATE).to("cpu", torch.float64)
        given = gradient.get(name, torch.zeros_like(moved[name]))
        rounding = torch.finfo(weight.dtype).eps * float(before.norm()) / LEARNING_RATE
        error = float((moved[name] - given).norm())
        other = other or error > 1e-3 * float(given.norm()) + 10 * rounding
    return moved if other else None


def measures(values: Mapping[str, float]) -> dict[str, float]:
    """Numbers that say something of the model: not of time, of progress, or of the optimizer."""
    timed = ("_runtime", "_per_second", "_time")
    return {
        name: value
        for name, value in values.items()
        if not name.endswith(timed) and name.removeprefix("eval_") not in OTHER_NUMBERS
    }
