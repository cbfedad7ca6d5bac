"""Linear layers through the fastest matrix product of the processor (`samestep.kernels.gemm`)."""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from samestep.kernels.gemm import by_onednn, product


def speed_up_linear(model: nn.Module) -> int:
    """Send the products of every plain ``nn.Linear`` through `samestep.kernels.gemm.product`.

    The modules stay what they are: only their ``forward`` changes, and only what it calls. Where
    the product would not be faster (another processor, device or type, autocast) they compute as
    before.

    Args:
        model: Changed in place.

    Returns:
        How many layers were changed.
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    for layer in layers:
        layer.forward = MethodType(_forward, layer)  # type: ignore[method-assign]
    return len(layers)


def _forward(layer: nn.Linear, states: Tensor) -> Tensor:
    multiplications = states.numel() * layer.out_features
    faster = by_onednn(states, layer.weight, multiplications=multiplications)
    if not faster or torch.is_autocast_enabled(states.device.type):
        return nn.functional.linear(states, layer.weight, layer.bias)
    rows = states.flatten(0, -2)
    out: Tensor = _Linear.apply(rows, layer.weight, layer.bias)  # type: ignore[no-untyped-call]
    return out.view(*states.shape[:-1], layer.out_features)


class _Linear(torch.autograd.Function):
    """``states @ weight.T + bias`` with its three products."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Keeps the states only if the weight trains, the weight only if they need a gradient."""
        ctx.save_for_backward(
            states if ctx.needs_input_grad[1] else None,
            weight if ctx.needs_input_grad[0] else None,
        )
        return product(states, weight.t(), bias=bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients that are needed."""
        states, weight = ctx.saved_tensors
        return (
            None if weight is None else product(incoming, weight),
            None if states is None else product(incoming.t(), states),
            incoming.sum(0) if ctx.needs_input_grad[2] else None,
        )
