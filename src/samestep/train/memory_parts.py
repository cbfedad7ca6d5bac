"""What a run holds in memory whatever its micro-batches are: weights, and what belongs to them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from samestep.train.precision import bytes_per_weight
from samestep.train.settings.base import TrainSettings

_NAMES = {
    "weight": "weights that train",
    "sum of gradients": "sums of gradients",
    "gradient": "gradients, as the optimizer takes them",
    "optimizer": "moments of the optimizer",
    "average": "moving average (ema)",
    "copy in bfloat16": "copies of weights in bfloat16",
}
"""What `bytes_per_weight` counts, of all weights together."""


def memory_parts(model: nn.Module, objective: Any, settings: TrainSettings) -> dict[str, int]:
    """What a run holds of weights, and of what belongs to them.

    Args:
        model: With its adapters; on PyTorch's meta device it may be, too.
        objective: What the recipe built; further models are found in it.
        settings: With a precision of `samestep.train.precision.choose_precision`.

    Returns:
        Bytes by what they are for: those of `bytes_per_weight`, weights that do not train, and
        other models by the name that the objective has for them (reference, teacher).
    """
    own = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    trained = sum(tensor.numel() for tensor in own.values() if tensor.requires_grad)
    parts = {
        _NAMES[name]: size * trained for name, size in bytes_per_weight(model, settings).items()
    }
    parts["weights that do not train"] = _bytes(
        [tensor for tensor in own.values() if not tensor.requires_grad]
    )
    for name, other in _other_models(objective):
        tensors = {id(tensor): tensor for tensor in [*other.parameters(), *other.buffers()]}
        beside = _bytes([tensor for key, tensor in tensors.items() if key not in own])
        parts[name] = parts.get(name, 0) + beside
        own |= tensors
    return {name: size for name, size in parts.items() if size}


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _other_models(objective: Any) -> list[tuple[str, nn.Module]]:
    """The models that an objective holds, with the name of the field that does.

    They lie in its losses, in what those consist of, and in functions made of them.
    """
    found = []
    seen: set[int] = set()
    left = [("", objective)]
    while left:
        name, value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            found.append((name or "another model", value))
        else:
            inside = [
                (name if inner in ("", "model") else inner, part) for inner, part in _inside(value)
            ]
            left += reversed(inside)  # what is named first, the loss, is looked into first
    return found


def _inside(value: Any) -> Iterator[tuple[str, Any]]:
    """The parts of an object that may hold models, by name."""
    if isinstance(value, MethodType):
        yield "", value.__self__
    elif isinstance(value, FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            with suppress(ValueError):  # not filled yet
                yield name, cell.cell_contents
    elif isinstance(value, partial):
        yield from (("", part) for part in (value.func, *value.args))
        yield from value.keywords.items()
    elif isinstance(value, Mapping):
        yield from ((str(name), part) for name, part in value.items())
    elif isinstance(value, list | tuple):
        yield from (("", part) for part in value)
    elif is_dataclass(value):
        names = [field.name for field in fields(value)]
        yield from ((name.lstrip("_"), getattr(value, name, None)) for name in names)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from ((name.lstrip("_"), part) for name, part in vars(value).items())
