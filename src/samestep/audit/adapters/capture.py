"""What a loop does to a model: the gradients that its optimizer saw, or how far weights moved."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from samestep.audit.sketch import fold_of, sketched, spread
from samestep.audit.subject import Gradient, Observation
from samestep.audit.vectors import combine, norm


def copied(tensors: Mapping[str, Tensor], fold: int) -> Gradient:
    """What is kept of each; sharded tensors are gathered, sparse ones filled."""
    return {name: sketched(_whole(tensor.detach()), fold) for name, tensor in tensors.items()}


def _whole(tensor: Tensor) -> Tensor:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.to_dense() if whole.is_sparse else whole


def gradients(model: nn.Module) -> Gradient:
    """What is in ``.grad``, by the name of the weight."""
    found = {name: w.grad for name, w in model.named_parameters() if w.grad is not None}
    return copied(found, fold_of(model))


def weights(model: nn.Module) -> Gradient:
    """The trainable weights by name."""
    found = {name: w for name, w in model.named_parameters() if w.requires_grad}
    return copied(found, fold_of(model))


@contextmanager
def optimizer_steps(model: nn.Module) -> Iterator[list[Gradient]]:
    """Collect the gradient that every step of any optimizer sees of this model's weights."""
    names = {id(weight): name for name, weight in model.named_parameters()}
    fold = fold_of(model)
    seen: list[Gradient] = []

    def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        own = [weight for group in optimizer.param_groups for weight in group["params"]]
        found = {names[id(w)]: w.grad for w in own if id(w) in names and w.grad is not None}
        if found:
            seen.append(copied(found, fold))

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


def shift_weights(model: nn.Module, by: Gradient) -> None:
    """Add to the weights what is kept of a direction."""
    fold = fold_of(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in by:
                weight.add_(spread(by[name], weight, fold).to(weight.device, weight.dtype))


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


def numbers(reported: Any) -> dict[str, float]:
    """What a loop returned, as numbers by name; what is not a number is left out."""
    if reported is None:
        return {}
    values = reported if isinstance(reported, Mapping) else {"loss": reported}
    return {
        str(name): float(value.detach() if isinstance(value, Tensor) else value)
        for name, value in values.items()
        if isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)
    }
