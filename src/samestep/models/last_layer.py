"""A decoder's last layer at the positions that are looked at afterwards, and no others.

What follows attention works on each position by itself, and of the last layer's positions a loss
reads the targets alone. So its queries, its output projection and its MLP are computed for them;
the other positions hold zeros there, which nobody reads. Keys and values are needed of all.

The model's own code stays as it is: hooks select the rows of an input and spread those of an
output. The positions come as an argument of the model, ``target_positions``, which transformers
hands down to its attention. That comes first in a layer, also where gradient checkpointing runs
the layer anew, so every run of the layer is told anew.
"""

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

ARGUMENT = "target_positions"

ATTENTION = "self_attn"
"""What comes first in a layer, after a norm."""

ROW_BY_ROW = ("self_attn.q_proj", "self_attn.o_proj", "mlp")
"""Parts of a layer whose input is one tensor [rows, length, width], each position by itself."""

_hooked_heads: WeakSet[nn.Module] = WeakSet()
"""The heads of the models whose last layer is cut."""

_wanted: WeakKeyDictionary[nn.Module, tuple[Tensor, torch.Size]] = WeakKeyDictionary()
"""For each part that is to run next: the positions, and the shape of all of them."""


def row_wise_modules(layer: nn.Module) -> list[nn.Module]:
    """The parts of a layer that can be computed for some positions only."""
    return [module for name, module in layer.named_modules() if name in ROW_BY_ROW]


def install_hooks(layer: nn.Module, head: nn.Module) -> Callable[[], None]:
    """Let a model's last layer heed ``target_positions``.

    Args:
        layer: The last layer; every call that has the argument is cut, others are as before.
        head: The model's output embedding, by which `position_kwargs` knows the model.

    Returns:
        Undoes it.
    """
    found = row_wise_modules(layer)

    def tell(_: nn.Module, arguments: Any, named: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        others = dict(named)
        positions = others.pop(ARGUMENT, None)
        for part in found:
            if positions is None:
                _wanted.pop(part, None)  # left by a run that failed
            else:
                _wanted[part] = positions, torch.Size()
        return arguments, others

    attention = layer.get_submodule(ATTENTION)
    hooks = [attention.register_forward_pre_hook(tell, with_kwargs=True)]
    for part in found:
        hooks += [part.register_forward_pre_hook(_select), part.register_forward_hook(_spread)]
    _hooked_heads.add(head)

    def undo() -> None:
        for hook in hooks:
            hook.remove()
        _hooked_heads.discard(head)

    return undo


def position_kwargs(head: nn.Module, positions: Tensor | None) -> dict[str, Tensor]:
    """The argument for a model with this head: nothing unless its last layer is cut."""
    return {} if positions is None or head not in _hooked_heads else {ARGUMENT: positions}


def _select(part: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor] | None:
    if part not in _wanted:
        return None
    (states,) = arguments
    positions, _ = _wanted[part]
    _wanted[part] = positions, states.shape[:-1]
    return (states.flatten(0, -2).index_select(0, positions)[None],)


def _spread(part: nn.Module, _: Any, found: Tensor) -> Tensor | None:
    if part not in _wanted:
        return None
    positions, shape = _wanted.pop(part)
    nothing = found.new_zeros(shape.numel(), found.shape[-1])
    return nothing.index_copy(0, positions, found[0]).view(*shape, -1)
