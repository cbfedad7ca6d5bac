"""What is done to a model for a run, and read from it: seeds, no noise, float64; its gradients."""

import contextlib
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, autograd, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.nn.modules.dropout import _DropoutNd
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode

from samestep.audit.gradients import (
    global_norm,
    linear_combination,
    sketch,
    sketch_fold,
    subtract,
    unsketch,
)
from samestep.audit.subject import Gradient, Observation

_DROPOUTS = (
    functional.dropout,
    functional.dropout1d,
    functional.dropout2d,
    functional.dropout3d,
    functional.alpha_dropout,
    functional.feature_alpha_dropout,
    torch.dropout,
)

_NOISE = ("drop", "jitter", "mask_time_prob", "mask_feature_prob")
"""Parts of the names of numbers on modules and configs that make a forward random."""

_NARROW = (torch.float32, torch.float16, torch.bfloat16)
_CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)


def seed_all(seed: int) -> None:
    """Seed every random number generator that a loop may draw from."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


class WithoutDropout(TorchFunctionMode):
    """While it is on, no call of a dropout function drops anything."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        options = dict(kwargs or {})
        if function in _DROPOUTS:
            return args[0] if args else options["input"]
        if function is functional.scaled_dot_product_attention:
            # Its fifth argument, by position or by name.
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            options |= {} if len(args) > 4 else {"dropout_p": 0.0}
        return function(*args, **options)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability of a model to 0, as modules and as numbers on modules."""
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


@contextlib.contextmanager
def without_noise(networks: Sequence[nn.Module]) -> Iterator[None]:
    """Within the block every noise of a forward is off, in modules and in configs."""
    modules = [module for network in networks for module in network.modules()]
    holders = [vars(module) for module in modules]
    holders += [vars(held["config"]) for held in holders if _has_fields(held.get("config"))]
    noisy = [
        (holder, name, value)
        for holder in holders
        for name, value in holder.items()
        if isinstance(value, float) and any(part in name for part in _NOISE)
    ]
    noisy += [(vars(module), "p", module.p) for module in modules if isinstance(module, _DropoutNd)]
    for holder, name, _ in noisy:
        holder[name] = 0.0
    try:
        yield
    finally:
        for holder, name, value in noisy:
            holder[name] = value


def _has_fields(config: Any) -> bool:
    return config is not None and not isinstance(config, dict | str | int)


class _Float64Mode(TorchFunctionMode):
    """Replaces narrower floating types in the arguments of every PyTorch function.

    Norms, rotary positions, routers and losses of published models cast to float32 inside. Left
    alone, that rounding would hide differences below 1e-7 in a run that is meant to be float64.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _CASTS:
            return Tensor.double(*args)
        wide = {key: _widen(value) for key, value in (kwargs or {}).items()}
        return func(*map(_widen, args), **wide)


def _widen(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _NARROW else value


@contextlib.contextmanager
def force_float64() -> Iterator[None]:
    """Within the block float64 is the default type, and no PyTorch call narrows to another."""
    before, engine = torch.get_default_dtype(), vars(autograd)
    run_backward = engine["_engine_run_backward"]

    def run_backward_in_float64(*args: Any, **kwargs: Any) -> Any:
        # A mode is off inside the calls that it handles, and so inside backward(), where
        # checkpointed layers run their forward again.
        with _Float64Mode():
            return run_backward(*args, **kwargs)

    torch.set_default_dtype(torch.float64)
    engine["_engine_run_backward"] = run_backward_in_float64
    try:
        with _Float64Mode():
            yield
    finally:
        engine["_engine_run_backward"] = run_backward
        torch.set_default_dtype(before)


def _kept(tensors: Mapping[str, Tensor], fold: int) -> Gradient:
    """What is kept of each; sharded tensors are gathered, sparse ones filled."""
    return {name: sketch(_gathered(tensor.detach()), fold) for name, tensor in tensors.items()}


def _gathered(tensor: Tensor) -> Tensor:
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.to_dense() if full.is_sparse else full


def read_gradients(model: nn.Module) -> Gradient:
    """What is in ``.grad``, by the name of the weight."""
    held = {name: w.grad for name, w in model.named_parameters() if w.grad is not None}
    return _kept(held, sketch_fold(model))


def read_weights(model: nn.Module) -> Gradient:
    """The trainable weights by name."""
    held = {name: w for name, w in model.named_parameters() if w.requires_grad}
    return _kept(held, sketch_fold(model))


def perturb_weights(model: nn.Module, displacement: Gradient) -> None:
    """Add to the weights what is kept of a direction."""
    fold = sketch_fold(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in displacement:
                direction = unsketch(displacement[name], weight, fold=fold)
                weight.add_(direction.to(weight.device, weight.dtype))


@contextlib.contextmanager
def record_optimizer_steps(model: nn.Module) -> Iterator[list[Gradient]]:
    """Collect the gradient that every step of any optimizer sees of this model's weights."""
    names = {id(weight): name for name, weight in model.named_parameters()}
    fold = sketch_fold(model)
    steps: list[Gradient] = []

    def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        own = [weight for group in optimizer.param_groups for weight in group["params"]]
        held = {names[id(w)]: w.grad for w in own if id(w) in names and w.grad is not None}
        if held:
            steps.append(_kept(held, fold))

    handle = register_optimizer_step_pre_hook(before)
    try:
        yield steps
    finally:
        handle.remove()


@contextlib.contextmanager
def scale_gradients(model: nn.Module, factor: float) -> Iterator[None]:
    """Multiply the gradient that each backward delivers to each weight."""
    handles = [
        weight.register_hook(lambda gradient: gradient * factor)
        for weight in model.parameters()
        if weight.requires_grad and factor != 1.0
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def observe(
    model: nn.Module,
    before: Gradient,
    *,
    steps: Sequence[Gradient],
    reported: dict[str, float],
) -> Observation:
    """What a step did.

    Args:
        model: After it.
        before: The weights before it.
        steps: What `record_optimizer_steps` collected.
        reported: What the loop said.

    Returns:
        The gradient that the optimizer saw, added up over its steps; without an optimizer, the
        difference of the weights; if they did not move, what is left in ``.grad``.
    """
    rounding = torch.finfo(next(model.parameters()).dtype).eps
    if steps:
        updates = max(Counter(name for step in steps for name in step).values())
        total = linear_combination(steps, [1.0] * len(steps))
        return Observation(total, reported=reported, rounding=rounding, updates=updates)
    moved = subtract(before, read_weights(model))
    if global_norm(moved) <= 8 * rounding * global_norm(before):  # at most there and back again
        return Observation(read_gradients(model), reported=reported, rounding=rounding)
    rounding *= max(1.0, global_norm(before) / global_norm(moved))
    return Observation(moved, reported=reported, rounding=rounding)


def scalars_of(reported: Any) -> dict[str, float]:
    """What a loop returned, as numbers by name; what is not a number is left out."""
    if reported is None:
        return {}
    values = reported if isinstance(reported, Mapping) else {"loss": reported}
    return {
        str(name): float(value.detach() if isinstance(value, Tensor) else value)
        for name, value in values.items()
        if isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)
    }
