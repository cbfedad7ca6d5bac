"""What a loop does to a model: the gradients that its optimizer saw, or how far weights moved."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode

from samestep.audit.subject import Gradient, Observation
from samestep.audit.vectors import combine, norm

DROPOUTS = (
    functional.dropout,
    functional.dropout1d,
    functional.dropout2d,
    functional.dropout3d,
    functional.alpha_dropout,
    functional.feature_alpha_dropout,
    torch.dropout,
)


def copied(tensors: Mapping[str, Tensor]) -> Gradient:
    """Float64 copies on the CPU; sharded tensors are gathered, sparse ones filled."""
    return {
        name: _whole(tensor).detach().to("cpu", torch.float64, copy=True)
        for name, tensor in tensors.items()
    }


def _whole(tensor: Tensor) -> Tensor:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.to_dense() if whole.is_sparse else whole


def gradients(model: nn.Module) -> Gradient:
    """What is in ``.grad``, by the name of the weight."""
    return copied({n: w.grad for n, w in model.named_parameters() if w.grad is not None})


def weights(model: nn.Module) -> Gradient:
    """The weights by name."""
    return copied(dict(model.named_parameters()))


@contextmanager
def optimizer_steps(model: nn.Module) -> Iterator[list[Gradient]]:
    """Collect the gradient that every step of any optimizer sees of this model's weights."""
    names = {id(weight): name for name, weight in model.named_parameters()}
    seen: list[Gradient] = []

    def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        own = [weight for group in optimizer.param_groups for weight in group["params"]]
        found = {names[id(w)]: w.grad for w in own if id(w) in names and w.grad is not None}
        if found:
            seen.append(copied(found))

    handle = register_optimizer_step_pre_hook(before)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def scaled_gradients(model: nn.Module, scale: float) -> Iterator[None]:
    """Multiply the gradient that each backward delivers to each weight."""
    handles = [
        weight.register_hook(lambda gradient: gradient * scale)
        for weight in model.parameters()
        if weight.requires_grad and scale != 1.0
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class WithoutDropout(TorchFunctionMode):
    """While it is on, no call of a dropout function drops anything."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = dict(kwargs or {})
        if function in DROPOUTS:
            return args[0] if args else given["input"]
        if function is functional.scaled_dot_product_attention:
            # Its fifth argument, by position or by name.
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            given |= {} if len(args) > 4 else {"dropout_p": 0.0}
        return function(*args, **given)


def shift_weights(model: nn.Module, by: Gradient) -> None:
    """Add to the weights."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in by:
                weight.add_(by[name].to(weight.device, weight.dtype))


def observe(
    model: nn.Module,
    before: Gradient,
    steps: Sequence[Gradient],
    reported: dict[str, float],
) -> Observation:
    """What a step did.

    Args:
        model: After it.
        before: The weights before it.
        steps: What `optimizer_steps` collected.
        reported: What the loop said.

    Returns:
        The gradient that the optimizer saw, added up over its steps; without an optimizer, the
        difference of the weights; if they did not move, what is left in ``.grad``.
    """
    precision = torch.finfo(next(model.parameters()).dtype).eps
    if steps:
        updates = max(Counter(name for step in steps for name in step).values())
        total = combine(steps, [1.0] * len(steps))
        return Observation(total, reported=reported, rounding=precision, updates=updates)
    moved = combine([before, weights(model)], [1.0, -1.0])
    if norm(moved) <= 8 * precision * norm(before):  # at most there and back again
        return Observation(gradients(model), reported=reported, rounding=precision)
    rounding = precision * max(1.0, norm(before) / norm(moved))
    return Observation(moved, reported=reported, rounding=rounding)
