"""What is done to a model for a run, and read from it: no noise, float64; its gradients."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, autograd, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from samestep.audit.gradients import sketch, sketch_fold, unsketch
from samestep.audit.subject import Gradient

_DROPOUTS = {
    functional.dropout,
    functional.dropout1d,
    functional.dropout2d,
    functional.dropout3d,
    functional.alpha_dropout,
    functional.feature_alpha_dropout,
    torch.dropout,
}

_NOISE = ("drop", "jitter", "mask_time_prob", "mask_feature_prob")
"""Parts of the names of numbers on modules and configs that make a forward random."""

_SINGLE = {torch.float32: Tensor.float}
_NARROW = {**_SINGLE, torch.float16: Tensor.half, torch.bfloat16: Tensor.bfloat16}


MOVEMENT = 0.01
"""How far the audit's own update moves the weights, of their size."""


@contextlib.contextmanager
def without_dropout() -> Iterator[None]:
    """Within the block no call of a dropout function drops anything."""
    with in_backward_too(WithoutDropout), WithoutDropout():
        yield


@contextlib.contextmanager
def in_backward_too(mode: Callable[[], TorchFunctionMode]) -> Iterator[None]:
    """Within the block every backward runs under a mode.

    A mode is off inside the calls that it handles, and so inside ``backward()``, where checkpointed
    layers run their forward again.
    """
    engine = vars(autograd)
    run_backward = engine["_engine_run_backward"]

    def under_the_mode(*args: Any, **kwargs: Any) -> Any:
        with mode():
            return run_backward(*args, **kwargs)

    engine["_engine_run_backward"] = under_the_mode
    try:
        yield
    finally:
        engine["_engine_run_backward"] = run_backward


class WithoutDropout(TorchFunctionMode):
    """While it is on, no call of a dropout function drops anything."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if function is functional.scaled_dot_product_attention:
            # Its fifth argument, by position or by name.
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            kwargs = kwargs if len(args) > 4 else {**kwargs, "dropout_p": 0.0}
        return function(*args, **kwargs)


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

    Args:
        narrow: The types that are replaced, by the method that casts to each.
    """

    def __init__(self, narrow: Mapping[torch.dtype, Any]) -> None:
        super().__init__()
        self.narrow = narrow
        self.casts = frozenset(narrow.values())

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in self.casts:
            return Tensor.double(*args)
        # Every attribute of a tensor comes here too, a thousand times a step: most have no type.
        for value in args:
            if type(value) is torch.dtype:
                args = tuple(map(self._widen, args))
                break
        if not kwargs:
            return func(*args)
        return func(*args, **{key: self._widen(value) for key, value in kwargs.items()})

    def _widen(self, value: Any) -> Any:
        replaced = type(value) is torch.dtype and value in self.narrow
        return torch.float64 if replaced else value


@contextlib.contextmanager
def force_float64(*, halves: bool = True) -> Iterator[None]:
    """Within the block float64 is the default type, and no PyTorch call narrows to another.

    Args:
        halves: Replace the types of 16 bits too.
    """
    narrow = _NARROW if halves else _SINGLE
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with in_backward_too(lambda: _Float64Mode(narrow)), _Float64Mode(narrow):
            yield
    finally:
        torch.set_default_dtype(before)


def kept(tensors: Mapping[str, Tensor], fold: int) -> Gradient:
    """What is kept of each; sharded tensors are gathered, sparse ones filled."""
    return {name: sketch(_gathered(tensor.detach()), fold) for name, tensor in tensors.items()}


def _gathered(tensor: Tensor) -> Tensor:
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.to_dense() if full.is_sparse else full


def read_gradients(model: nn.Module) -> Gradient:
    """What is in ``.grad``, by the name of the weight."""
    held = {name: w.grad for name, w in model.named_parameters() if w.grad is not None}
    return kept(held, sketch_fold(model))


def read_weights(model: nn.Module) -> Gradient:
    """The trainable weights by name."""
    held = {name: w for name, w in model.named_parameters() if w.requires_grad}
    return kept(held, sketch_fold(model))


def has_gradients(model: nn.Module) -> bool:
    """Whether anything but zeros is in ``.grad``."""
    held = (weight.grad for weight in model.parameters() if weight.grad is not None)
    return any(bool(_gathered(gradient).any()) for gradient in held)


def perturb_weights(model: nn.Module, displacement: Gradient) -> None:
    """Add to the weights what is kept of a direction."""
    fold = sketch_fold(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in displacement:
                direction = unsketch(displacement[name], weight, fold=fold)
                weight.add_(direction.to(weight.device, weight.dtype))


def end_step(model: nn.Module, *, updates: bool, clears: bool) -> None:
    """What comes between one step and the next.

    Args:
        model: The user's own.
        updates: Move the weights along what is in ``.grad``, by a hundredth of their size, and
            empty it: the part of the loop that follows a ``step`` which leaves gradients.
        clears: Empty ``.grad``.
    """
    held = [weight for weight in model.parameters() if weight.grad is not None]
    if updates and held:
        gradients = [weight.grad for weight in held if weight.grad is not None]
        along = float(nn.utils.get_total_norm(gradients))
        rate = MOVEMENT * float(nn.utils.get_total_norm(held)) / along if along else 0.0
        with torch.no_grad():
            for weight, gradient in zip(held, gradients, strict=True):
                weight.sub_(gradient, alpha=rate)
    if updates or clears:
        model.zero_grad(set_to_none=True)


@contextlib.contextmanager
def scale_gradients(model: nn.Module, factor: float) -> Iterator[None]:
    """Multiply the gradient that each backward delivers to each weight.

    Not what ``autograd.grad`` gives inside of a backward, as in a checkpoint by hand: that is
    handed on, and delivered to the weight once more.
    """
    if factor == 1.0:
        yield
        return
    engine = vars(autograd)
    run_backward = engine["_engine_run_backward"]
    delivers: list[bool] = []

    def nested(*args: Any, **kwargs: Any) -> Any:
        delivers.append(kwargs.get("accumulate_grad", True))
        try:
            return run_backward(*args, **kwargs)
        finally:
            delivers.pop()

    def scaled(gradient: Tensor) -> Tensor:
        return gradient if len(delivers) > 1 and not delivers[-1] else gradient * factor

    weights = [weight for weight in model.parameters() if weight.requires_grad]
    handles = [weight.register_hook(scaled) for weight in weights]
    engine["_engine_run_backward"] = nested
    try:
        yield
    finally:
        engine["_engine_run_backward"] = run_backward
        for handle in handles:
            handle.remove()


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
