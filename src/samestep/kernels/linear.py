"""Linear layers through the fastest matrix product of the processor (`samestep.kernels.gemm`)."""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from samestep.kernels.gemm import matmul, uses_onednn


def speed_up_linear(model: nn.Module) -> int:
    """Send the products of every plain ``nn.Linear`` through `samestep.kernels.gemm.matmul`.

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
    onednn = uses_onednn(states, layer.weight, multiplications=multiplications)
    if not onednn or torch.is_autocast_enabled(states.device.type):
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
        return matmul(states, weight.t(), bias=bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of states, weight and bias; None where not needed."""
        states, weight = ctx.saved_tensors
        return (
            None if weight is None else matmul(grad_output, weight),
            None if states is None else matmul(grad_output.t(), states),
            grad_output.sum(0) if ctx.needs_input_grad[2] else None,
        )
