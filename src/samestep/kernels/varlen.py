"""Attention over the borders of a pack by a GPU's kernels: no padding, no mask, no loop.

Two of PyTorch's kernels take borders. FlashAttention, behind ``varlen_attn``, is the fastest; it
takes bfloat16 and float16, and widths up to 256 in multiples of 8. The memory-efficient one takes
float32 too, and any width. What neither takes (float64, some windows) is left to the caller.

``varlen_attn`` grows from version to version of PyTorch: 2.10 knows ``is_causal`` alone, 2.11 a
scale and a window, 2.12 groups heads. What it does not know is done here, with the same result.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

try:  # PyTorch has it for a shorter time than the rest of what samestep needs
    from torch.nn.attention.varlen import varlen_attn as _varlen_attn
except ImportError:
    _varlen_attn = None  # type: ignore[assignment]

Kernel = Callable[..., Any]

# What was asked once, in plain dictionaries: compiled layers read those, and nothing else of it.
_recent: dict[torch.device, bool] = {}
_parameters: dict[Kernel, frozenset[str]] = {}

_WIDEST, _MULTIPLE = 256, 8
"""Widths of heads that FlashAttention takes."""

_CAUSAL_FROM_TOP_LEFT = 1
"""``custom_mask_type`` of the memory-efficient kernel; 0 is no mask."""


@dataclass(frozen=True)
class Pack:
    """What attention over one pack is asked for.

    Attributes:
        query: [1, heads, length, width].
        key: [1, key heads, length, width]; the heads are a multiple of the key heads.
        value: [1, key heads, length, value width].
        borders: Of the sequences [sequences + 1], int32, from 0 to length.
        max_length: Of the longest sequence.
        scale: Factor of query times key.
        causal: Whether a position sees only itself and those before it.
        window: How far it sees, itself included; None: to the ends of its sequence.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    borders: Tensor
    max_length: int
    scale: float
    causal: bool
    window: int | None


def has_kernels(query: Tensor) -> bool:
    """Whether a tensor is where these kernels are: on a CUDA device."""
    return query.is_cuda


def attend(pack: Pack) -> Tensor | None:
    """Attention by the fastest kernel that takes the pack.

    Args:
        pack: On a CUDA device.

    Returns:
        [1, length, heads, value width]; None where no kernel takes it.
    """
    function = flash_function()
    if function is not None and _has_flash(pack.query.device) and takes(function, pack):
        return by_flash(function, pack)
    if pack.window is None and pack.query.dtype != torch.float64:
        return by_efficient(torch.ops.aten._efficient_attention_forward, pack)
    return None


def flash_function() -> Kernel | None:
    """PyTorch's ``varlen_attn``; None before 2.10."""
    return _varlen_attn


def _has_flash(device: torch.device) -> bool:
    """Whether a GPU is recent enough for FlashAttention."""
    if device not in _recent:
        _recent[device] = torch.cuda.get_device_capability(device) >= (8, 0)
    return _recent[device]


def takes(function: Kernel, pack: Pack) -> bool:
    """Whether FlashAttention takes a pack.

    Args:
        function: ``varlen_attn`` of any version.
        pack: The pack.

    Returns:
        By its type, width and window.
    """
    width = max(pack.query.shape[-1], pack.value.shape[-1])
    window = pack.window is None or "window_size" in _names(function)
    return pack.query.dtype in (torch.bfloat16, torch.float16) and width <= _WIDEST and window


def _names(function: Kernel) -> frozenset[str]:
    if function not in _parameters:
        _parameters[function] = frozenset(inspect.signature(function).parameters)
    return _parameters[function]


def by_flash(function: Kernel, pack: Pack) -> Tensor:
    """Attention by ``varlen_attn``, whatever its version takes.

    Args:
        function: ``varlen_attn``.
        pack: One that it `takes`.

    Returns:
        [1, length, heads, value width].
    """
    names, scale = _names(function), pack.scale
    value_width = pack.value.shape[-1]
    # All of one width, which it takes: zeros add nothing to a product, and their output is cut.
    width = max(pack.query.shape[-1], value_width)
    width = -(-width // _MULTIPLE) * _MULTIPLE
    parts = [pad(one, (0, width - one.shape[-1])) for one in (pack.query, pack.key, pack.value)]
    options: dict[str, Any] = {}
    if "scale" in names:
        options["scale"] = scale
    else:  # it takes 1 / sqrt(width)
        parts[0] = parts[0] * (scale * width**0.5)
    if "window_size" in names:
        left = -1 if pack.window is None else pack.window - 1
        options["window_size"] = (left, 0 if pack.causal else left)
    else:
        options["is_causal"] = pack.causal
    if pack.query.shape[1] != pack.key.shape[1]:
        if "enable_gqa" in names:
            options["enable_gqa"] = True
        else:
            parts[1:] = [_every_head(one, pack.query.shape[1]) for one in parts[1:]]
    query, key, value = (one[0].transpose(0, 1) for one in parts)
    borders, longest = pack.borders, pack.max_length
    out = function(query, key, value, borders, borders, longest, longest, **options)
    assert isinstance(out, Tensor)
    return out[None, ..., :value_width]


def by_efficient(function: Kernel, pack: Pack) -> Tensor:
    """Attention by the memory-efficient kernel.

    Args:
        function: ``torch.ops.aten._efficient_attention_forward``.
        pack: One without a window, of any type but float64.

    Returns:
        [1, length, heads, value width].
    """
    heads = pack.query.shape[1]
    query, key, value = (
        _every_head(one, heads).transpose(1, 2).contiguous()
        for one in (pack.query, pack.key, pack.value)
    )
    out: Tensor = function(
        query,
        key,
        value,
        None,  # bias
        pack.borders,
        pack.borders,
        pack.max_length,
        pack.max_length,
        0.0,  # dropout
        _CAUSAL_FROM_TOP_LEFT if pack.causal else 0,
        any(one.requires_grad for one in (query, key, value)),  # what the backward needs
        scale=pack.scale,
    )[0]
    return out


def _every_head(states: Tensor, heads: int) -> Tensor:
    """Key heads repeated, so that each head has its own: [1, heads, length, width]."""
    return states.repeat_interleave(heads // states.shape[1], dim=1)
