"""Decoder layers compiled by `torch.compile`: one set of graphs for all layers and all lengths.

Norms, rotations and activation functions between the products are then few kernels, not dozens. A
layer is compiled as a module of its own, with dynamic shapes: layers of one kind share their
graphs, and packs of other lengths need no new ones. A layer stays as it is where something looks
into it: hooks (as those of the last layer, cut to the targets), or routers, which are recorded.

A layer is compiled whole or not at all: where it falls into pieces, as at attention that goes
sequence by sequence, each piece and each helper around it would be compiled by itself, again and
again. Compilers have errors: what the compiled layers give is compared once with what they gave
before, values and gradients, and the bound is measured on the model itself. What is new to them
later, and cannot be compiled, runs uncompiled, and the log says so once.
"""

import logging
import warnings
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from samestep.models import lm_head
from samestep.models.outputs import without_cache
from samestep.models.routers import routers
from samestep.utils.agreement import FACTOR, relative_differences, rounding_noise

log = logging.getLogger("samestep")

Backend = str | Callable[..., Any]

BACKEND: Backend = "inductor"
"""What makes kernels of graphs; tests count graphs instead."""

MOST_GRAPHS = 16
"""Graphs of a run, at most. A few are needed: with gradients, without, and with adapters off; of a
first layer, whose input has no gradient under adapters; each for every kind of layer."""


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
            with without_cache(model):
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
    shared = _SharedGraphs()
    for layer in layers:
        layer._compiled_call_impl = shared.of(layer)
    try:
        difference = float(relative_differences(before, outputs()).max())
    except Exception as error:  # a compiler may fail in any way; so far nothing was trained with it
        run_eagerly(model)
        return f"compiling fails here: {_problem(error)}"
    if shared.said:
        run_eagerly(model)
        return "its forward gives the layers a cache of keys and values: pass use_cache=False"
    if not difference <= FACTOR * noise:
        run_eagerly(model)
        return (
            f"compiled layers give other outputs, by {difference:.1e}, where rounding makes "
            f"{noise:.1e}"
        )
    shared.may_fail = True  # what is new to it later must not end the run
    return ""


class _SharedGraphs:
    """The graphs that the layers of one model share, and what is said of calls without them.

    Attributes:
        may_fail: Whether a layer that cannot be compiled runs as it is; else that raises.
        said: The levels at which something was said of calls that ran uncompiled.
    """

    def __init__(self) -> None:
        self.may_fail = False
        self.said: set[int] = set()
        self._compiled = torch.compile(_entry(), fullgraph=True, dynamic=True, backend=BACKEND)
        self._limit = torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS)
        logging.getLogger(torch._dynamo.convert_frame.__name__).addFilter(_is_not_ours)

    def of(self, layer: nn.Module) -> Callable[..., Any]:
        """What a layer runs in the place of its own call."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if any(isinstance(value, Cache) for value in kwargs.values()):
                # Each layer looks at its own part of a cache, so each would need its own graphs.
                self._say_once(
                    logging.INFO,
                    "layers that are given a cache of keys and values run uncompiled, as in "
                    "generation; other forwards run compiled with use_cache=False",
                )
                return layer._call_impl(*args, **kwargs)
            kwargs.pop(lm_head.ARGUMENT, None)  # for the last layer; not every forward has it
            try:
                with self._limit:
                    return self._compiled(layer, *args, **kwargs)
            except (TorchDynamoException, FailOnRecompileLimitHit) as error:  # nothing has run yet
                if not self.may_fail:
                    raise
                layer._compiled_call_impl = None
                self._say_once(
                    logging.WARNING,
                    "from here on layers run uncompiled, which is slower, since a call of a new "
                    f"kind cannot be compiled ({_problem(error)})",
                )
            return layer._call_impl(*args, **kwargs)

        return call

    def _say_once(self, level: int, what: str) -> None:
        if level not in self.said:
            self.said.add(level)
            log.log(level, "compile: %s", what)


def _entry() -> Callable[..., Any]:
    """A function that runs a layer, whose code is its own: graphs are kept by code, not function.

    So a run has no graphs of another one in the same process, and gives its own free.
    """

    def samestep_layer(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return layer._call_impl(*args, **kwargs)

    return FunctionType(samestep_layer.__code__.replace(), globals(), samestep_layer.__name__)


def _is_not_ours(record: logging.LogRecord) -> bool:
    """Whether the compiler says something else than that our layers have reached their limit."""
    message = record.getMessage()
    return not ("recompile_limit" in message and "'samestep_layer'" in message)


def _problem(error: Exception) -> str:
    """What a compiler has to complain about, in a line."""
    if isinstance(error, FailOnRecompileLimitHit):
        return f"layers and calls differ so much that they need more than {MOST_GRAPHS} graphs"
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


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
