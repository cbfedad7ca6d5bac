"""A decoder's last layer at the positions that are used afterwards, and no others.

What follows attention works on each position by itself, and of the last layer's positions a loss
reads the targets alone. So its queries, its output projection and its MLP are computed for them;
the other positions hold zeros there, which nothing reads. Keys and values are computed for all.

The model's own code stays as it is: hooks select the rows of an input and scatter those of an
output. The positions come as an argument of the model, ``target_positions``, which transformers
hands down to its attention. That comes first in a layer, also where gradient checkpointing runs
the layer again, so every run of the layer receives them.
"""

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

ARGUMENT = "target_positions"
"""The model's argument that holds the positions [targets] in its flattened rows, int64."""

ATTENTION = "self_attn"
"""What comes first in a layer, after a norm."""

_ROW_WISE = ("self_attn.q_proj", "self_attn.o_proj", "mlp")
"""Parts of a layer whose input is one tensor [rows, length, width], each position by itself."""

_hooked_heads: WeakSet[nn.Module] = WeakSet()
"""The heads of the models whose last layer has the hooks."""

_pending: WeakKeyDictionary[nn.Module, tuple[Tensor, torch.Size]] = WeakKeyDictionary()
"""For each module that is to run next: the positions, and the shape of all of them."""


def row_wise_modules(layer: nn.Module) -> list[nn.Module]:
    """The modules of a layer that can be computed for some positions only.

    Args:
        layer: A decoder layer of transformers.

    Returns:
        Empty if it is built otherwise.
    """
    return [module for name, module in layer.named_modules() if name in _ROW_WISE]


def install_hooks(layer: nn.Module, head: nn.Module) -> Callable[[], None]:
    """Make a model's last layer compute only the positions of ``target_positions``.

    Args:
        layer: The last layer. A forward without the argument computes every position.
        head: The model's output embedding, by which `position_kwargs` recognises the model.

    Returns:
        A function that removes the hooks.
    """
    modules = row_wise_modules(layer)

    def take_positions(
        _: nn.Module, args: Any, kwargs: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        remaining = dict(kwargs)
        positions = remaining.pop(ARGUMENT, None)
        for module in modules:
            if positions is None:
                _pending.pop(module, None)  # left by a run that failed
            else:
                _pending[module] = positions, torch.Size()
        return args, remaining

    attention = layer.get_submodule(ATTENTION)
    hooks = [attention.register_forward_pre_hook(take_positions, with_kwargs=True)]
    for module in modules:
        hooks.append(module.register_forward_pre_hook(_select))
        hooks.append(module.register_forward_hook(_scatter))
    _hooked_heads.add(head)

    def remove() -> None:
        for hook in hooks:
            hook.remove()
        _hooked_heads.discard(head)

    return remove


def position_kwargs(head: nn.Module, positions: Tensor | None) -> dict[str, Tensor]:
    """The argument that tells a model which positions its last layer has to compute.

    Args:
        head: The model's output embedding.
        positions: [targets] in the flattened rows, int64; None: all of them.

    Returns:
        Further keyword arguments of the model; empty unless its last layer has the hooks.
    """
    return {} if positions is None or head not in _hooked_heads else {ARGUMENT: positions}


def _select(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor] | None:
    """Keep the rows of the positions: [rows, length, width] to [1, targets, width]."""
    if module not in _pending:
        return None
    (states,) = args
    positions, _ = _pending[module]
    _pending[module] = positions, states.shape[:-1]
    return (states.flatten(0, -2).index_select(0, positions)[None],)


def _scatter(module: nn.Module, _: Any, output: Tensor) -> Tensor | None:
    """Put the rows back in their places, with zeros elsewhere: [rows, length, width]."""
    if module not in _pending:
        return None
    positions, shape = _pending.pop(module)
    zeros = output.new_zeros(shape.numel(), output.shape[-1])
    return zeros.index_copy(0, positions, output[0]).view(*shape, -1)
