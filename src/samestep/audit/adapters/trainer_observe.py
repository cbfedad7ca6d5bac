"""What a step of a trainer leaves: the gradients that its optimizer is given, and what it logs."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from samestep.audit.adapters.instrument import has_gradients, scalars_of
from samestep.audit.gradients import global_norm, sketch, sketch_fold
from samestep.audit.subject import Gradient, Observation
from samestep.errors import CheckError

LEARNING_RATE = 0.1
"""Of plain SGD. With one update a run it does not matter: gradients are seen, not differences."""

_NO_METRICS = ("grad_norm", "learning_rate", "epoch", "step", "total_flos")
"""Logged numbers that are no measure of the model, beside those of time."""


class RecordingSGD(torch.optim.SGD):
    """Plain SGD that keeps the sum of the gradients that it is given.

    Args:
        model: Its trainable weights are updated.

    Attributes:
        gradient: What is kept of it, by the name of the weight, summed over the updates.
        updates: How many there were.
    """

    def __init__(self, model: nn.Module) -> None:
        self.gradient: Gradient = {}
        self.updates = 0
        self._skipped = 0
        self._then: Callable[[], None] | None = None
        self._fold = sketch_fold(model)
        self._weights = [(n, w) for n, w in model.named_parameters() if w.requires_grad]
        super().__init__([weight for _, weight in self._weights], lr=LEARNING_RATE)

    def skip(self, updates: int, *, then: Callable[[], None]) -> None:
        """Forget the first updates; then call this."""
        self._skipped, self._then = updates, then

    def step(self, closure: Any = None) -> Any:
        """Record, then update; the rate is constant, whatever a schedule wants."""
        loss = None if closure is None else closure()
        self.updates += 1
        with torch.no_grad():
            for name, weight in self._weights:
                if weight.grad is None:
                    continue
                kept = sketch(weight.grad, self._fold)
                self.gradient[name] = self.gradient.get(name, 0) + kept  # a new tensor each time
                weight.add_(weight.grad, alpha=-LEARNING_RATE)
        if self._then is not None and self._skipped == self.updates:
            self.gradient, self.updates, self._skipped = {}, 0, 0
            self._then()
        return loss


def install_optimizer(trainer: Any) -> RecordingSGD:
    """Give a trainer our optimizer, and a schedule that it does not follow."""
    recording = RecordingSGD(trainer.model)

    def create_optimizer(model: Any = None) -> Any:
        del model
        return trainer.optimizer

    def create_scheduler(num_training_steps: int, optimizer: Any = None) -> Any:
        del num_training_steps, optimizer
        # It moves, so that one that moves once a micro-batch is seen; the update does not follow.
        trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(recording, lambda n: 1 / (1 + n))
        return trainer.lr_scheduler

    trainer.optimizer, trainer.lr_scheduler = recording, None
    trainer.create_optimizer, trainer.create_scheduler = create_optimizer, create_scheduler
    return recording


def observe_trainer(
    trainer: Any, optimizer: RecordingSGD, *, initial: Mapping[str, Tensor]
) -> Observation:
    """What a trainer did.

    Args:
        trainer: After its run.
        optimizer: The one that it was given.
        initial: Weights and buffers before the run, by name.

    Raises:
        CheckError: It did not step the optimizer.
    """
    if not optimizer.updates:
        raise CheckError("the trainer ended without an update by its optimizer")
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    reported = scalars_of(logs[-1]) if logs else {}
    reported = _unrounded(reported, trainer.state.log_history[-1])
    rounding = torch.finfo(next(trainer.model.parameters()).dtype).eps
    gradient = optimizer.gradient
    moved = _moved_otherwise(trainer.model, gradient, initial=initial)
    if moved is not None:
        before = math.hypot(*(float(initial[name].norm()) for name in moved))
        rounding *= before / max(LEARNING_RATE * global_norm(moved), 1e-300)
        gradient = moved
    return Observation(
        gradient,
        reported=only_metrics(reported),
        rounding=rounding,
        updates=optimizer.updates if moved is None else 0,
        leaves_gradients=has_gradients(trainer.model),
    )


def _unrounded(reported: dict[str, float], summary: Mapping[str, Any]) -> dict[str, float]:
    """What was logged, with more digits of the loss where the log rounds it and the summary not.

    Args:
        reported: The numbers of the last log.
        summary: The entry after it, which has the mean of the losses of the run.
    """
    mean = summary.get("train_loss")
    if isinstance(mean, float) and reported.get("loss") == round(mean, 4):
        return {**reported, "loss": mean}
    return reported


def _moved_otherwise(
    model: nn.Module, gradient: Gradient, *, initial: Mapping[str, Tensor]
) -> Gradient | None:
    """What the weights moved along, if that is not what the optimizer was given."""
    moved, otherwise, fold = {}, False, sketch_fold(model)
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        before = initial[name].to(weight.dtype)
        moved[name] = sketch((before - weight.detach()) / LEARNING_RATE, fold)
        seen = gradient.get(name, torch.zeros_like(moved[name]))
        rounding = torch.finfo(weight.dtype).eps * float(before.norm()) / LEARNING_RATE
        error = float((moved[name] - seen).norm())
        otherwise = otherwise or error > 1e-3 * float(seen.norm()) + 10 * rounding
    return moved if otherwise else None


def only_metrics(values: Mapping[str, float]) -> dict[str, float]:
    """Numbers that say something of the model: not of time, of progress, or of the optimizer."""
    timed = ("_runtime", "_per_second", "_time")
    return {
        name: value
        for name, value in values.items()
        if not name.endswith(timed) and name.removeprefix("eval_") not in _NO_METRICS
    }
