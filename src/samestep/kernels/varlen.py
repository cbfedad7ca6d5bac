"""Attention over the borders of a pack by a GPU's kernels: no padding, no mask, no loop.

Two of PyTorch's kernels take borders. FlashAttention, behind ``varlen_attn``, is the fastest; it
takes bfloat16 and float16, and widths up to 256 in multiples of 8. The memory-efficient one takes
float32 too, and multiples of any width. Other widths are padded with zeros, which add nothing. What
neither takes (float64, some windows) is left to the caller, and `why_none` says why.

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

_WIDEST = 256
"""The widest heads that FlashAttention takes."""

_MULTIPLE = 8
"""Both kernels take widths in multiples of it; the memory-efficient one in float32 of 4 already."""

_OF_FLASH = (torch.bfloat16, torch.float16)
"""Types that FlashAttention takes."""

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


def why_none(pack: Pack) -> str:
    """Why no kernel takes a pack, and what would let one take it.

    Args:
        pack: One that `attend` gave None for, or one on a device without these kernels.

    Returns:
        Half a sentence.
    """
    if not has_kernels(pack.query):
        return "the kernels that take borders are those of CUDA devices"
    if pack.query.dtype == torch.float64:
        return "no kernel that takes borders takes float64; --precision mixed or float32 has one"
    function = flash_function()
    reason = "sliding windows are FlashAttention's alone"
    if pack.query.dtype not in _OF_FLASH:
        return f"{reason}, which takes no {_name(pack.query.dtype)}; --precision mixed has it"
    if _width(pack) > _WIDEST:
        return f"{reason}, which takes heads up to {_WIDEST} wide, not {_width(pack)}"
    if function is None or "window_size" not in _names(function):
        return f"{reason}, whose varlen_attn takes them from PyTorch 2.11 on"
    return f"{reason}, which needs a GPU of compute capability 8.0 or more"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
    window = pack.window is None or "window_size" in _names(function)
    return pack.query.dtype in _OF_FLASH and _width(pack) <= _WIDEST and window


def _width(pack: Pack) -> int:
    """Of the widest heads of a pack."""
    return max(pack.query.shape[-1], pack.value.shape[-1])


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
    width = _rounded_up(_width(pack))  # one for all
    parts = [_padded(one, width) for one in (pack.query, pack.key, pack.value)]
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
        _every_head(_padded(one, _rounded_up(one.shape[-1])), heads).transpose(1, 2).contiguous()
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
    return out[..., : pack.value.shape[-1]]


def _rounded_up(width: int) -> int:
    return -(-width // _MULTIPLE) * _MULTIPLE


def _padded(states: Tensor, width: int) -> Tensor:
    """States with zeros up to a width: they add nothing to a product, and their output is cut."""
    missing = width - states.shape[-1]
    return pad(states, (0, missing)) if missing else states  # nothing to pad would be a copy


def _every_head(states: Tensor, heads: int) -> Tensor:
    """Key heads repeated, so that each head has its own: [1, heads, length, width]."""
    return states.repeat_interleave(heads // states.shape[1], dim=1)
