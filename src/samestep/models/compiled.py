"""Decoder layers compiled by `torch.compile`: one set of graphs for all layers and all lengths.

Norms, rotations and activation functions between the products are then few kernels, not dozens. A
layer is compiled as a module of its own, with dynamic shapes: layers of one kind share their
graphs, and packs of other lengths need no new ones. A layer stays as it is where something looks
into it: hooks (as those of the last layer, cut to the targets), or routers, which are recorded.

A layer is compiled whole or not at all: where it falls into pieces, as at attention that goes
sequence by sequence, each piece and each helper around it would be compiled by itself, again and
again. Compilers have errors: what the compiled layers give is compared once with what they gave
before, values and gradients, and the bound is measured on the model itself.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from samestep.models.routers import routers
from samestep.utils.agreement import FACTOR, relative_differences, rounding_noise

Backend = str | Callable[..., Any]

BACKEND: Backend = "inductor"
"""What makes kernels of graphs; tests count graphs instead."""


def compiled_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a model that are compiled at the moment."""
    return [one for one in _layers(model) if one._compiled_call_impl is not None]


def compilable_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a model that can be compiled without changing what looks into them.

    Args:
        model: A model of transformers, plain or wrapped by PEFT.

    Returns:
        Empty if there is none.
    """
    return [layer for layer in _layers(model) if not _is_watched(layer)]


def compile_layers(model: nn.Module, run: Callable[[], Tensor]) -> str:
    """Compile the layers that can be, and see that they compute what they did.

    Args:
        model: On its device, as it trains; changed in place.
        run: The model's output for a micro-batch, with a graph if gradients are enabled.

    Returns:
        Why nothing is compiled; empty if the layers are.
    """
    layers = compilable_layers(model)
    if not layers:
        return f"{type(model).__name__} has no layer that nothing else looks into"
    weights = [weight for weight in layers[0].parameters() if weight.requires_grad]

    def outputs() -> list[Tensor]:
        with torch.enable_grad():
            out = run()
            # A fixed mixture of all outputs, so that every one of them counts in the gradient.
            mixture = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)
            objective = (out.double() * mixture).sum()
            grads = torch.autograd.grad(objective, weights, allow_unused=True) if weights else ()
        return [out.detach(), *(grad for grad in grads if grad is not None)]

    # The compiler looks at every input that way; later graphs do so too.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    noise = max(rounding_noise(outputs))
    before = outputs()
    try:
        _compile(layers, whole=True)
        difference = float(relative_differences(before, outputs()).max())
    except Exception as error:  # a compiler may fail in any way; so far nothing was trained with it
        run_eagerly(model)
        first = (str(error).strip().splitlines() or [""])[0]
        return f"compiling fails here: {type(error).__name__}: {first}"
    if not difference <= FACTOR * noise:
        run_eagerly(model)
        return (
            f"compiled layers give other outputs, by {difference:.1e}, where rounding makes "
            f"{noise:.1e}"
        )
    _compile(layers, whole=False)  # what is new to it later must not end the run
    return ""


def _compile(layers: Sequence[nn.Module], *, whole: bool) -> None:
    for layer in layers:
        layer.compile(dynamic=True, fullgraph=whole, backend=BACKEND)


def run_eagerly(model: nn.Module) -> bool:
    """Run the layers of a model uncompiled from here on.

    Args:
        model: Changed in place.

    Returns:
        Whether one was compiled.
    """
    layers = compiled_layers(model)
    for layer in layers:
        layer._compiled_call_impl = None
    return bool(layers)


def _layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _is_watched(layer: nn.Module) -> bool:
    hooked = any(
        module._forward_pre_hooks or module._forward_hooks or module._backward_hooks
        for module in layer.modules()
    )
    return hooked or bool(routers(layer))
