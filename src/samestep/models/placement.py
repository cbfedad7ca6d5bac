"""Where models are made: on the CPU, straight on an accelerator, or on the meta device."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from samestep.models.weightless import is_weightless, with_weights

DRAWN = "has_drawn_weights"
"""Attribute of models of which some weights come from a generator: other devices draw others."""

_CPU = torch.device("cpu")
_place: ContextVar[torch.device] = ContextVar("place", default=_CPU)


@contextmanager
def made_on(device: torch.device) -> Iterator[None]:
    """A block in which models are loaded straight to a device, or their weights drawn there.

    Args:
        device: Without an index the current one of its kind.
    """
    index = torch.empty(0, device=device).device
    token = _place.set(index)
    try:
        yield
    finally:
        _place.reset(token)


@contextmanager
def made_for_files() -> Iterator[None]:
    """A block in which models are made whole on the CPU, wherever it stands.

    What is written must not depend on which device of which run writes it first.
    """
    with made_on(_CPU), with_weights():
        yield


def has_drawn_weights(model: nn.Module) -> bool:
    """Whether some weights of a model, with adapters or not, were drawn where it was made."""
    return any(getattr(module, DRAWN, False) for module in model.modules())


def place_of_models() -> torch.device:
    """The device on which a model is made here; inside `without_weights` always meta."""
    return torch.device("meta") if is_weightless() else _place.get()


def building() -> Any:
    """A context in which modules are built there; on the CPU it does nothing."""
    place = place_of_models()
    return nullcontext() if place == _CPU else place


def reading() -> dict[str, Any]:
    """Options of ``from_pretrained`` that read weights straight to there; none on the CPU."""
    place = place_of_models()
    return {} if place == _CPU else {"device_map": {"": place}}
