"""``precision``: the types of weights and products, and autocast around what an objective runs.

Under ``mixed`` matrix products are made in bfloat16; weights that are updated, the optimizer's
moments and the sums of gradients are float32, and so are softmax, norms and losses. Weights that do
not train (those under adapters) are bfloat16. On one device, and on replicas, that is autocast;
under FSDP2 it is its mixed-precision policy.

Autocast keeps its bfloat16 copies of weights until the outermost of its contexts ends: `one_step`
opens it around all micro-batches of a step, so that each weight is cast once a step.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from samestep.engine.parallel import is_sharded
from samestep.engine.terms import Objective
from samestep.errors import ConfigError
from samestep.train.forward import with_context
from samestep.train.optim import OPTIMIZERS, state_per_weight
from samestep.train.settings.base import TrainSettings
from samestep.utils.agreement import LOW_PRECISION

log = logging.getLogger("samestep")

MIXED = torch.bfloat16
"""The type of the products under ``mixed``."""

_PAYS = 1.5
"""How many times as fast products must be in bfloat16 for the log to offer ``mixed``: casts, norms
and the optimizer gain nothing from it."""

Chosen = TypeVar("Chosen", bound=TrainSettings)


def find_device(name: str) -> torch.device:
    """The device that a setting names.

    Args:
        name: ``device`` of the settings.

    Returns:
        The device; under "auto" an accelerator if there is one.

    Raises:
        ConfigError: It is not there.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        first = str(error).split("\n")[0]
        raise ConfigError(f"device: {name!r} is not there ({first}); use auto or cpu") from None


def choose_precision(settings: Chosen) -> Chosen:
    """The settings with a precision in the place of "auto", which depends on the device.

    Args:
        settings: Finalized settings.

    Returns:
        The settings: under auto "mixed" on an accelerator that has bfloat16, else "float32".

    Raises:
        ConfigError: The device is not there, or cannot do what was asked for.
    """
    device = find_device(settings.device)
    if settings.precision == "mixed" and not torch.amp.is_autocast_available(device.type):
        raise ConfigError(f"precision: mixed is not there for {device.type}; use float32")
    if settings.precision != "auto":
        return settings
    mixed = device.type != "cpu" and has_bfloat16(device)
    return settings.model_copy(update={"precision": "mixed" if mixed else "float32"})


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies in bfloat16 by itself; emulation does not count.

    Args:
        device: An accelerator.

    Returns:
        Whether it does.
    """
    if not torch.amp.is_autocast_available(device.type):
        return False
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    try:
        ones = torch.ones(8, 8, dtype=MIXED, device=device)
        return bool((ones @ ones == 8).all())
    except (RuntimeError, TypeError):
        return False


def weight_dtype(settings: TrainSettings, *, trains: bool = True) -> torch.dtype:
    """The type that weights are loaded in.

    Args:
        settings: With a precision of `choose_precision`.
        trains: Whether the weights themselves train, not adapters beside them.

    Returns:
        The type.
    """
    if settings.precision == "mixed":
        return torch.float32 if trains else MIXED
    found: torch.dtype = getattr(torch, settings.precision)
    return found


@torch.no_grad()
def raise_trained(model: nn.Module) -> None:
    """Under ``mixed``: what trains beside frozen weights of low precision becomes float32."""
    for weight in model.parameters():
        if weight.requires_grad and weight.dtype in LOW_PRECISION:
            weight.data = weight.data.float()


def uses_autocast(model: nn.Module, settings: TrainSettings) -> bool:
    """Whether the model's products need autocast; in shards FSDP2 casts its weights itself."""
    return settings.precision == "mixed" and not is_sharded(model)


@contextmanager
def products(model: Any, settings: TrainSettings, *, keep_copies: bool = True) -> Iterator[None]:
    """A context in which the model's products have the type of the settings.

    Args:
        model: On its device.
        settings: With a precision of `choose_precision`.
        keep_copies: Whether copies of weights are kept for the next time, inside `one_step`.
    """
    if not uses_autocast(model, settings):
        yield
        return
    # Older versions of PyTorch would keep a copy that was made without a graph.
    kept = keep_copies and _copies_keep_their_graph(model.device.type)
    with torch.autocast(model.device.type, dtype=MIXED, cache_enabled=kept):
        yield


def one_step(device: torch.device) -> Any:
    """A context around all micro-batches of a step: autocast's copies of weights live as long.

    Autocast itself is off in it: the optimizer and the sums are no products.

    Args:
        device: Of the model.

    Returns:
        The context.
    """
    kind = device.type if torch.amp.is_autocast_available(device.type) else "cpu"
    return torch.autocast(kind, dtype=MIXED, enabled=False)


@cache
def _copies_keep_their_graph(kind: str) -> bool:
    """Whether a weight that autocast cast under ``no_grad`` is cast anew for a gradient."""
    layer = nn.Linear(8, 8, device=kind)
    states = torch.ones(8, 8, device=kind)
    with torch.autocast(kind, dtype=MIXED):
        with torch.no_grad():
            layer(states)
        with torch.enable_grad():
            made: Tensor = layer(states)
    with torch.enable_grad():
        if made.requires_grad:
            made.float().sum().backward()
    return layer.weight.grad is not None


def with_products(objective: Objective, model: Any, settings: TrainSettings) -> Objective:
    """The objective, with all that it runs in the products of the settings.

    Args:
        objective: What is optimised.
        model: The model that trains.
        settings: With a precision of `choose_precision`.

    Returns:
        The same objective unless autocast is needed.
    """
    if not uses_autocast(model, settings):
        return objective
    annotate = objective.annotate

    def annotated(model: nn.Module, micro: Mapping[str, Any]) -> dict[str, Tensor]:
        assert annotate is not None
        with products(model, settings):
            return annotate(model, micro)

    return replace(
        objective,
        loss_fn=with_context(objective.loss_fn, lambda model, _: products(model, settings)),
        annotate=None if annotate is None else annotated,
    )


def bytes_per_weight(model: nn.Module, settings: TrainSettings) -> dict[str, int]:
    """Bytes that each trained weight takes during a step, by what they are for.

    Args:
        model: The model.
        settings: ``precision``, ``optimizer``.

    Returns:
        Bytes by purpose; of weights of several types the largest.
    """
    sizes = [weight.element_size() for weight in model.parameters() if weight.requires_grad]
    size = max(sizes, default=4)
    found = {"weight": size, "sum of gradients": max(size, 4)}
    if size < 4:
        found["gradient"] = size  # as the optimizer takes it
    if state_bytes(settings, size):
        found["optimizer"] = state_bytes(settings, size)
    if settings.ema is not None:
        found["average"] = max(size, 4)
    if uses_autocast(model, settings):
        found["copy in bfloat16"] = MIXED.itemsize
    return found


def state_bytes(settings: TrainSettings, itemsize: int) -> int:
    """Bytes of optimizer state for each element of a weight.

    Args:
        settings: ``optimizer``, ``momentum``.
        itemsize: Bytes of an element of the weight.

    Returns:
        Their number; what is the same for a whole block of weights is not counted.
    """
    row = OPTIMIZERS.get(settings.optimizer)
    size = itemsize if row is None or row.state_bytes is None else row.state_bytes
    return size * state_per_weight(settings)


def bytes_beside_weights(model: nn.Module, settings: TrainSettings) -> int:
    """Bytes of the optimizer's state and of the average of the weights that train.

    Args:
        model: The model.
        settings: ``optimizer``, ``ema``.

    Returns:
        Their number.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    sizes = [(weight.numel(), weight.element_size()) for weight in trained]
    averaged = int(settings.ema is not None)
    return sum(number * (state_bytes(settings, size) + averaged * size) for number, size in sizes)


def describe(model: nn.Module, settings: TrainSettings) -> None:
    """Say the precision, what it takes and what it loses, before the first step.

    Args:
        model: On its device.
        settings: With a precision of `choose_precision`.
    """
    parts = bytes_per_weight(model, settings)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    log.info(
        "precision: %s; %d bytes for each of %s trained weights (%s)",
        settings.precision,
        sum(parts.values()),
        f"{sum(weight.numel() for weight in trained):,}",
        ", ".join(f"{name} {size}" for name, size in parts.items()),
    )
    if any(weight.dtype in LOW_PRECISION for weight in trained):
        log.warning(
            "precision: bfloat16 keeps 8 bits of each weight: updates of less than 1/256 of a "
            "weight round away, whole or in part; precision mixed keeps them, for the same products"
        )
    if next(model.parameters()).device.type == "cpu" and settings.precision in ("mixed", "float32"):
        _compare_speeds(settings.precision)


def _compare_speeds(precision: str) -> None:
    """On a CPU: say if the other precision would be the faster one."""
    factor = bfloat16_speed()
    if precision == "float32" and factor >= _PAYS:
        log.info(
            "precision: this processor multiplies bfloat16 %.1f times as fast as float32: "
            "--precision mixed (float32 weights and sums) is worth a try",
            factor,
        )
    if precision == "mixed" and factor < 1:
        log.warning(
            "precision: this processor multiplies bfloat16 at %.2f of the speed of float32: "
            "--precision float32 would be faster",
            factor,
        )


@cache
def bfloat16_speed() -> float:
    """How many times as fast as float32 this processor multiplies bfloat16: one timed product."""
    a, b = torch.randn(256, 1024), torch.randn(1024, 1024)
    return _seconds(a, b) / _seconds(a.to(MIXED), b.to(MIXED))


def _seconds(a: Tensor, b: Tensor) -> float:
    """Of a product: the least of a few; the first one, which sets things up, does not count."""
    torch.mm(a, b)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - started)
    return min(times)
