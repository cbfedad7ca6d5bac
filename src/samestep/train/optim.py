"""Optimizers and learning-rate schedules: two tables, and what is made of their rows.

Importing this needs no PyTorch: settings check names against the tables.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
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
    betas: tuple[float, float] | None
    eps: float | None
    momentum: float | None
    lr: float
    lr_by_name: dict[str, float]
    weight_decay: float
    weight_decay_by_name: dict[str, float]
    loraplus_lr_ratio: float | None
    schedule: str
    warmup: float
    cooldown: float
    min_lr_ratio: float


_LORA_B = re.compile(r"\blora_(embedding_)?B\b")
"""In the names of adapters' second matrices, which LoRA+ (arXiv:2402.12354) lets learn faster."""

OPTIONS = ("betas", "eps", "momentum")
"""Settings that are keyword arguments of optimizers; None: an optimizer's own default."""


@dataclass(frozen=True)
class OptimizerRow:
    """A row of `OPTIMIZERS`.

    Attributes:
        factory: ``module:name`` of a subclass of ``torch.optim.Optimizer``, called with parameter
            groups, ``lr`` and the options; or of a function (parameter groups, settings) that
            returns an optimizer.
        about: What it is, for the docs.
        options: Further keyword arguments of the class.
        takes: Which settings of `OPTIONS` it takes.
        state_per_weight: Elements of state for each element of a weight, to foresee memory.
        state_bytes: Bytes of such an element; None: as many as of the weight's.
        needs: Packages of the extra ``quant``.
    """

    factory: str
    about: str
    options: Mapping[str, Any] = field(default_factory=dict)
    takes: tuple[str, ...] = ()
    state_per_weight: int = 2
    state_bytes: int | None = None
    needs: tuple[str, ...] = ()


_FEW_BITS = "samestep.train.few_bits:few_bits"

OPTIMIZERS = {
    "adamw": OptimizerRow(
        "torch.optim:AdamW", "AdamW, fused", {"fused": True}, takes=("betas", "eps")
    ),
    "sgd": OptimizerRow(
        "torch.optim:SGD",
        "Stochastic gradient descent; `momentum` is 0 unless it is set",
        takes=("momentum",),
        state_per_weight=0,
    ),
    "muon": OptimizerRow(
        "samestep.train.muon:muon",
        "Muon for the matrices of layers, PyTorch's own, and AdamW for all other weights",
        takes=("betas", "eps", "momentum"),
        state_per_weight=1,
    ),
    "adafactor": OptimizerRow(
        "torch.optim:Adafactor", "Adafactor, with little state", state_per_weight=0
    ),
    "adamw_8bit": OptimizerRow(
        _FEW_BITS,
        "AdamW with moments of 8 bits (arXiv:2110.02861), bitsandbytes' own",
        takes=("betas", "eps"),
        state_bytes=1,
        needs=("bitsandbytes",),
    ),
    "lion": OptimizerRow(
        _FEW_BITS,
        "Lion (arXiv:2302.06675), bitsandbytes' own",
        takes=("betas",),
        state_per_weight=1,
        state_bytes=4,
        needs=("bitsandbytes",),
    ),
    "lion_8bit": OptimizerRow(
        _FEW_BITS,
        "Lion with a moment of 8 bits, bitsandbytes' own",
        takes=("betas",),
        state_per_weight=1,
        state_bytes=1,
        needs=("bitsandbytes",),
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


def _wsd(progress: float) -> float:
    """Stays at the peak, and falls in a straight line over the last steps (`cooldown`)."""
    return 1 - progress


def _cooldown(progress: float) -> float:
    """Stays at the peak, and falls as 1 - √progress over the last steps (`cooldown`)."""
    return 1 - math.sqrt(progress)


COOLDOWNS: dict[str, Schedule] = {"wsd": _wsd, "cooldown": _cooldown}
"""Schedules that fall in the last steps alone; progress runs from 0 to 1 over these."""

SCHEDULES: dict[str, Schedule] = {
    "linear": _linear,
    "cosine": _cosine,
    "constant": _constant,
    **COOLDOWNS,
}
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
                given = {name: getattr(settings, name) for name in OPTIONS}
                chosen = {name: value for name, value in given.items() if value is not None}
                optimizer = factory(groups, lr=settings.lr, **row.options, **chosen)
            else:
                optimizer = factory(groups, settings)
        except ConfigError:
            raise
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
    weights = {name: w for name, w in model.named_parameters() if w.requires_grad}
    hidden = hidden_matrices(model)
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for vectors in (False, True):
        for name, weight in weights.items():
            if (weight.dim() < 2) is not vectors:
                continue
            decay = 0.0 if vectors else settings.weight_decay
            decay = _by_name(settings.weight_decay_by_name, name, decay)
            scale = _by_name(settings.lr_by_name, name, settings.lr) / settings.lr
            if settings.loraplus_lr_ratio is not None and _LORA_B.search(name):
                scale *= settings.loraplus_lr_ratio
            kind = {"lr_scale": scale} if scale != 1 else {}
            if settings.optimizer == "muon":
                kind["hidden"] = id(weight) in hidden
            group = {"params": [], "weight_decay": decay, **kind}
            groups.setdefault((vectors, decay, *kind.items()), group)["params"].append(weight)
    _check_patterns(settings, list(weights))
    return load_optimizer(settings.optimizer)(list(groups.values()), settings)


def hidden_matrices(model: "nn.Module") -> set[int]:
    """The weights of layers that are matrices: neither embeddings nor an output layer.

    Args:
        model: The model.

    Returns:
        Their ids.
    """
    from torch import nn

    outer: list[nn.Module] = [
        module for module in model.modules() if isinstance(module, nn.Embedding)
    ]
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if callable(find_head) else None
    outer += [head] if isinstance(head, nn.Module) else []
    excluded = {id(weight) for module in outer for weight in module.parameters()}
    return {id(weight) for weight in model.parameters() if weight.dim() == 2} - excluded


def _by_name(values: Mapping[str, float], name: str, default: float) -> float:
    """The value of the first pattern that is found in a name."""
    return next((value for part, value in values.items() if re.search(part, name)), default)


def _check_patterns(settings: OptimizerSettings, names: Sequence[str]) -> None:
    """Refuse a pattern that no weight that trains has in its name."""
    unused = [
        f"{setting}: {pattern!r} is in the name of no weight that trains"
        for setting in ("lr_by_name", "weight_decay_by_name")
        for pattern in getattr(settings, setting)
        if not any(re.search(pattern, name) for name in names)
    ]
    if unused:
        raise ConfigError("\n".join([*unused, _some_names(names)]))


def _some_names(names: Sequence[str]) -> str:
    """A line with names of weights from all over the model."""
    shown = list(names)[:: max(1, len(names) // 6)]
    return f"(names are such as {', '.join(shown)})"


def freeze(model: "nn.Module", patterns: Sequence[str]) -> None:
    """Let weights not train.

    Args:
        model: The model.
        patterns: Regular expressions; weights in whose names one is found are frozen.

    Raises:
        ConfigError: A pattern is in the name of no weight that trains, or none would be left.
    """
    weights = {name: w for name, w in model.named_parameters() if w.requires_grad}
    found = {part: [name for name in weights if re.search(part, name)] for part in patterns}
    unused = [part for part, names in found.items() if not names]
    problems = [f"freeze: {part!r} is in the name of no weight that trains" for part in unused]
    if problems:
        raise ConfigError("\n".join([*problems, _some_names(list(weights))]))
    frozen = {name for names in found.values() for name in names}
    if frozen >= weights.keys():
        raise ConfigError("freeze: nothing would be left to train")
    for name in frozen:
        weights[name].requires_grad_(False)


def state_per_weight(settings: OptimizerSettings) -> int:
    """Elements of optimizer state for each element of a weight: as in the table, else 2.

    Args:
        settings: ``optimizer``, ``momentum``.

    Returns:
        Their number.
    """
    row = OPTIMIZERS.get(settings.optimizer)
    return 2 if row is None else row.state_per_weight or int(bool(settings.momentum))


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
        settings: ``lr``, ``schedule``, ``warmup``, ``cooldown``, ``min_lr_ratio``.

    Returns:
        The learning rate. It rises linearly over the warm-up, reaches ``lr``, and then follows
        the schedule, whose progress would be 1 at step ``total``, down to its floor.
    """
    warmup = settings.warmup if settings.warmup >= 1 else settings.warmup * total
    if step < warmup:
        return settings.lr * (step + 1) / (warmup + 1)
    start = warmup
    if settings.schedule in COOLDOWNS:
        falling = settings.cooldown if settings.cooldown >= 1 else settings.cooldown * total
        start = max(warmup, total - falling)
    progress = max(0.0, step - start) / max(1.0, total - start)
    floor = settings.min_lr_ratio
    return settings.lr * (floor + (1 - floor) * load_schedule(settings.schedule)(progress))


def set_learning_rate(optimizer: "Optimizer", lr: float) -> None:
    """Give every parameter group the learning rate, times the scale of its own."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
