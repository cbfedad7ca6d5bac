"""Attention that stays inside each sequence of a pack, on CPU and GPU.

A pack is one row in which sequences stand one after another. transformers' own attention sees
their borders only as an L x L mask over the whole pack on CPU; here every sequence is attended by
itself, so memory and time grow with the squares of the sequences, not with that of the pack.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from samestep.errors import ConfigError
from samestep.kernels.long_attention import causal_attention, gains
from samestep.utils.agreement import computes_in_float32

NAME = "samestep"
"""The ``attn_implementation`` under which `register` makes it known to transformers."""

UNSUPPORTED = ("softcap", "s_aux", "position_bias")


def register() -> None:
    """Make "samestep" an attention implementation of transformers.

    Micro-batches for it come from `samestep.data.collate` without padding: they carry
    ``cu_seq_lens_q`` [sequences + 1], the borders. Registering twice is harmless.
    """
    from transformers import AttentionInterface

    # No mask function is registered: transformers then makes no mask, without looking for packs
    # in position_ids, which would wait for a GPU. The borders say it all.
    AttentionInterface.register(NAME, packed_attention)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention within each sequence of one pack, to transformers' attention interface.

    Args:
        module: The attention layer; its ``is_causal`` holds unless given here.
        query: [1, heads, length, width].
        key: [1, key heads, length, width]; the heads are a multiple of the key heads.
        value: Like ``key``.
        attention_mask: Must be None.
        scaling: Factor of query times key; None: 1 / sqrt(width).
        dropout: Must be 0: its random numbers would depend on the pack.
        is_causal: Whether a position sees only itself and those before it.
        sliding_window: How many positions back it sees, itself included; None: all.
        cu_seq_lens_q: The borders [sequences + 1], int32, from 0 to length.
        max_length_q: The longest sequence.
        **others: Ignored, unless they change the attention.

    Returns:
        [1, length, heads, width], and None for the attention weights.

    Raises:
        ConfigError: There are no borders, or the model asks for something that this attention
            does not do.
    """
    refused = [name for name in UNSUPPORTED if others.get(name) is not None]
    if refused or dropout or attention_mask is not None or query.shape[0] != 1:
        raise ConfigError(
            f"attention over packs does not serve {type(module).__name__} "
            f"({', '.join(refused) or 'dropout, a mask, or several rows'}): "
            "use padding 'right' or 'left'"
        )
    if cu_seq_lens_q is None or max_length_q is None:
        raise ConfigError(
            "attention over packs needs the borders cu_seq_lens_q and max_length_q: collate "
            "without padding, or set another attn_implementation on the model"
        )
    causal = bool(module.is_causal) if is_causal is None else is_causal
    # FlashAttention knows no float32, in which a low precision may be checked.
    attend = _varlen if query.is_cuda and not computes_in_float32() else _by_sequence
    out = attend(query, key, value, cu_seq_lens_q, max_length_q, scaling, causal, sliding_window)
    return out, None


def _by_sequence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    borders: Tensor,
    longest: int,
    scaling: float | None,
    causal: bool,
    sliding_window: int | None,
) -> Tensor:
    """Attention of each sequence by itself, as any device can."""
    lengths = borders.diff().tolist()
    # split, not slices: the backward of a slice fills a tensor of the whole pack for each sequence.
    sequences = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    parts = [
        _one(*states, scaling=scaling, causal=causal, sliding_window=sliding_window)
        for states in sequences
    ]
    # Positions first: so they lie in memory, and the model wants them.
    return torch.cat([part.transpose(1, 2) for part in parts], dim=1)


def _one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float | None,
    causal: bool,
    sliding_window: int | None,
) -> Tensor:
    """Attention of one sequence [1, heads, length, width]."""
    length, width = query.shape[2:]
    mask = _window(length, sliding_window, causal, query.device)
    if causal and mask is None and gains(query, value):
        scale = width**-0.5 if scaling is None else scaling
        return cast(Tensor, causal_attention(query, key, value, scale))
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=causal and mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _window(
    length: int, sliding_window: int | None, causal: bool, device: torch.device
) -> Tensor | None:
    """The band [length, length] of a sliding window, where the sequence is longer than it."""
    if sliding_window is None or length <= sliding_window:
        return None
    if not causal:
        raise ConfigError("attention over packs serves sliding windows in causal models only")
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return ones.tril() & ones.triu(1 - sliding_window)


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    borders: Tensor,
    longest: int,
    scaling: float | None,
    causal: bool,
    sliding_window: int | None,
) -> Tensor:
    """FlashAttention over ragged sequences, as PyTorch ships it; no padding, no mask."""
    from torch.nn.attention.varlen import varlen_attn

    back = -1 if sliding_window is None else sliding_window - 1
    out = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        borders,
        borders,
        longest,
        longest,
        scale=scaling,
        window_size=(back, 0 if causal else -1),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor)
    return out[None]
