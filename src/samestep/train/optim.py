"""Optimizers and learning-rate schedules: two tables, and what is made of their rows.

Importing this needs no PyTorch: settings check names against the tables.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from samestep.errors import ConfigError
from samestep.utils.plugins import load_object

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

Schedule = Callable[[float], float]
"""Maps progress after warm-up, 0 at the peak and 1 at the end, to a factor of the peak rate."""


class OptimizerSettings(Protocol):
    """The settings that optimizer and learning rate depend on."""

    optimizer: str
    lr: float
    weight_decay: float
    schedule: str
    warmup: float


@dataclass(frozen=True)
class OptimizerRow:
    """A row of `OPTIMIZERS`.

    Attributes:
        factory: ``module:name`` of a subclass of ``torch.optim.Optimizer``, called with parameter
            groups, ``lr`` and the options; or of a function (parameter groups, settings) that
            returns an optimizer.
        about: What it is, for the docs.
        options: Further keyword arguments of the class.
        state_per_weight: Elements of state for each element of a weight, to foresee memory.
    """

    factory: str
    about: str
    options: Mapping[str, Any] = field(default_factory=dict)
    state_per_weight: int = 2


OPTIMIZERS = {
    "adamw": OptimizerRow("torch.optim:AdamW", "AdamW, fused", {"fused": True}),
    "sgd": OptimizerRow(
        "torch.optim:SGD", "Stochastic gradient descent without momentum", state_per_weight=0
    ),
    "adafactor": OptimizerRow(
        "torch.optim:Adafactor", "Adafactor, with little state", state_per_weight=0
    ),
}
"""What ``optimizer`` may name."""


def _linear(progress: float) -> float:
    """Falls in a straight line to 0."""
    return 1 - progress


def _cosine(progress: float) -> float:
    """Falls along half a cosine to 0."""
    return (1 + math.cos(math.pi * progress)) / 2


def _constant(progress: float) -> float:
    """Stays at the peak."""
    return 1.0


SCHEDULES: dict[str, Schedule] = {"linear": _linear, "cosine": _cosine, "constant": _constant}
"""What ``schedule`` may name; the first lines of their docstrings are in the docs."""


def load_optimizer(name: str) -> Callable[[list[dict[str, Any]], OptimizerSettings], "Optimizer"]:
    """What builds an optimizer from parameter groups and settings.

    Args:
        name: A row of `OPTIMIZERS`, or ``file.py:name`` or ``package.module:name`` of a subclass
            of ``torch.optim.Optimizer`` or of a function (parameter groups, settings).

    Returns:
        (parameter groups, settings) to the optimizer.

    Raises:
        ConfigError: There is no such object, or it is neither; or, when it is called, it fails or
            returns no optimizer.
    """
    from torch.optim import Optimizer

    row = OPTIMIZERS.get(name) or OptimizerRow(name, "")
    factory = load_object(row.factory, what="optimizer")
    is_class = isinstance(factory, type)
    if not callable(factory) or (is_class and not issubclass(factory, Optimizer)):
        what = f"the class {factory.__name__}" if is_class else f"a {type(factory).__name__}"
        raise ConfigError(
            f"optimizer: {name} is {what}, not a subclass of torch.optim.Optimizer, nor a function "
            "(parameter groups, settings) that returns one"
        )

    def build(groups: list[dict[str, Any]], settings: OptimizerSettings) -> Optimizer:
        try:
            if is_class:
                optimizer = factory(groups, lr=settings.lr, **row.options)
            else:
                optimizer = factory(groups, settings)
        except Exception as error:  # the user's code may raise anything
            raise ConfigError(
                f"optimizer: {name} could not be built: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(optimizer, Optimizer):
            raise ConfigError(
                f"optimizer: {name} returned a {type(optimizer).__name__}, not a "
                "torch.optim.Optimizer"
            )
        return optimizer

    return build


def build_optimizer(model: "nn.Module", settings: OptimizerSettings) -> "Optimizer":
    """The optimizer over the weights that require gradients.

    Args:
        model: The model.
        settings: ``optimizer``, ``lr``, ``weight_decay`` (on tensors of two dimensions and more:
            biases and norms do not decay).

    Returns:
        The optimizer.

    Raises:
        ConfigError: As for `load_optimizer`.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [w for w in weights if w.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [w for w in weights if w.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return load_optimizer(settings.optimizer)(groups, settings)


def state_per_weight(name: str) -> int:
    """Elements of optimizer state for each element of a weight: as in the table, else 2."""
    row = OPTIMIZERS.get(name)
    return 2 if row is None else row.state_per_weight


def load_schedule(name: str) -> Schedule:
    """A schedule by its name.

    Args:
        name: A row of `SCHEDULES`, or ``file.py:name`` or ``package.module:name`` of a function
            of progress.

    Returns:
        The function.

    Raises:
        ConfigError: There is no such object, or it is not a function from progress in [0, 1] to a
            finite factor, at least 0.
    """
    if name in SCHEDULES:
        return SCHEDULES[name]
    schedule = load_object(name, what="schedule")
    if not callable(schedule):
        raise ConfigError(
            f"schedule: {name} is a {type(schedule).__name__}, not a function of progress in [0, 1]"
        )
    for progress in (0.0, 0.5, 1.0):
        try:
            factor = schedule(progress)
        except Exception as error:  # the user's code may raise anything
            raise ConfigError(
                f"schedule: {name} fails at progress {progress}: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(factor, int | float) or not 0 <= factor < math.inf:
            raise ConfigError(
                f"schedule: {name} gives {factor!r} at progress {progress}, not a finite factor, "
                "at least 0"
            )
    checked: Schedule = schedule
    return checked


def learning_rate(step: int, *, total: int, settings: OptimizerSettings) -> float:
    """The learning rate of a step: a pure function, so a resumed run needs no schedule state.

    Args:
        step: From 0.
        total: Steps of the whole run.
        settings: ``lr``, ``schedule``, ``warmup``.

    Returns:
        The learning rate. It rises linearly over the warm-up, reaches ``lr``, and then follows
        the schedule, whose progress would be 1 at step ``total``.
    """
    warmup = settings.warmup if settings.warmup >= 1 else settings.warmup * total
    if step < warmup:
        return settings.lr * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1.0, total - warmup)
    return settings.lr * load_schedule(settings.schedule)(progress)


def set_learning_rate(optimizer: "Optimizer", lr: float) -> None:
    """Give every parameter group the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr
