"""Attention that stays inside each sequence of a pack, on CPU and GPU.

A pack is one row in which sequences stand one after another. On CPU, transformers' own attention
keeps them apart by an L x L mask over the whole pack; here every sequence attends to itself alone,
so memory and time grow with the squares of the sequences' lengths, not with that of the pack's.
"""

import logging
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from samestep.errors import ConfigError
from samestep.kernels.long_attention import causal_attention, is_faster
from samestep.kernels.varlen import Pack, attend, has_kernels, why_none
from samestep.utils.agreement import LOW_PRECISION, computes_in_float32
from samestep.utils.autocast import in_own_types, product_dtype

log = logging.getLogger("samestep")

_told: set[str] = set()
"""Reasons that the log has already."""

NAME = "samestep"
"""The ``attn_implementation`` under which `register` makes it known to transformers."""

MIN_LOW_PRECISION_LENGTH = 256
"""Tokens of a sequence below which a CPU attends faster in float32 than in a lower precision.

PyTorch's kernel takes up to three times as long in bfloat16, most of it in the backward, and for
wide heads it breaks even from about 200 tokens on; queries and keys come in float32 anyway, by
their rotation.
"""

_UNSUPPORTED = ("softcap", "s_aux", "position_bias")
"""Arguments of transformers' attention interface that change the result and are refused."""

_QueryKeyValue: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""Query [1, heads, length, width], key and value [1, key heads, length, width]."""


def register() -> None:
    """Make "samestep" an attention implementation of transformers.

    Micro-batches for it come from `samestep.data.collate` without padding: they carry
    ``cu_seq_lens_q`` [sequences + 1], the sequences' borders. Registering twice is harmless.
    """
    from transformers import AttentionInterface

    # No mask function is registered: transformers then makes no mask, without looking for packs
    # in position_ids, which would wait for a GPU. cu_seq_lens_q is all that is needed.
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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention within each sequence of one pack, by transformers' attention interface.

    Args:
        module: The attention layer; its ``is_causal`` holds unless passed here.
        query: [1, heads, length, width].
        key: [1, key heads, length, width]; the heads are a multiple of the key heads.
        value: Like ``key``.
        attention_mask: Must be None.
        scaling: Factor of query times key; None: 1 / sqrt(width).
        dropout: Must be 0: its random numbers would depend on the pack.
        is_causal: Whether a position sees only itself and those before it.
        sliding_window: How many positions back it sees, itself included, and without causality as
            many ahead; None: all.
        cu_seq_lens_q: The sequences' borders [sequences + 1], int32, from 0 to length.
        max_length_q: The length of the longest sequence.
        **kwargs: Ignored, unless they change the attention.

    Returns:
        [1, length, heads, width], and None for the attention weights.

    Raises:
        ConfigError: There are no borders, or the model asks for something that this attention
            does not do.
    """
    unsupported = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if unsupported or dropout or attention_mask is not None or query.shape[0] != 1:
        raise ConfigError(
            f"attention over packs does not serve {type(module).__name__} "
            f"({', '.join(unsupported) or 'dropout, a mask, or several rows'}): "
            "use padding 'right' or 'left'"
        )
    if cu_seq_lens_q is None or max_length_q is None:
        raise ConfigError(
            "attention over packs needs the borders cu_seq_lens_q and max_length_q: collate "
            "without padding, or set another attn_implementation on the model"
        )
    causal = bool(module.is_causal) if is_causal is None else is_causal
    # Autocast knows PyTorch's own attention only; rotations leave queries and keys in float32.
    # On a CPU each sequence has a type of its own (`_attend_in`).
    if on_accelerator(query):
        query, key, value = (states.to(product_dtype(states)) for states in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = None if sliding_window is None or sliding_window >= max_length_q else sliding_window
    pack = Pack(query, key, value, cu_seq_lens_q, max_length_q, scale, causal, window)
    # FlashAttention knows no float32, in which a low precision may be checked.
    if computes_in_float32():
        return _by_sequence(pack), None
    out = attend(pack) if has_kernels(query) else None
    if out is None and on_accelerator(query) and not torch.compiler.is_compiling():
        _tell(why_none(pack))
    return _by_sequence(pack) if out is None else out, None


def on_accelerator(states: Tensor) -> bool:
    """Whether states are where a loop over sequences is slow: not on a CPU."""
    return states.device.type != "cpu"


def _tell(reason: str) -> None:
    """Say once in a process what makes attention slow."""
    if reason not in _told:
        _told.add(reason)
        log.warning("attention over packs runs sequence by sequence, which is slow: %s", reason)


def _by_sequence(pack: Pack) -> Tensor:
    """Attention of each sequence by itself, on any device and in any type."""
    lengths = pack.borders.diff().tolist()
    # split, not slices: the backward of a slice fills a tensor of the whole pack for each sequence.
    parts = (states.split(lengths, dim=2) for states in (pack.query, pack.key, pack.value))
    dtype = product_dtype(pack.query)
    outputs = [_attend_in(dtype, sequence, pack) for sequence in zip(*parts, strict=True)]
    # Positions first: so they lie in memory, and the model wants them.
    return torch.cat([out.transpose(1, 2) for out in outputs], dim=1)


def _attend_in(dtype: torch.dtype, qkv: _QueryKeyValue, pack: Pack) -> Tensor:
    """Attention of one sequence [1, heads, length, width]; the result has the type."""
    query = qkv[0]
    low_on_cpu = dtype in LOW_PRECISION and not on_accelerator(query)
    short = low_on_cpu and query.shape[2] < MIN_LOW_PRECISION_LENGTH
    inner = torch.float32 if short else dtype
    query, key, value = (states.to(inner) for states in qkv)
    return _attend_sequence(query, key, value, pack).to(dtype)


@in_own_types
def _attend_sequence(query: Tensor, key: Tensor, value: Tensor, pack: Pack) -> Tensor:
    """Attention of one sequence [1, heads, length, width] in its own type."""
    length, mask = query.shape[2], None
    if pack.window is not None and length > pack.window:
        mask = _window_mask(length, pack.window, causal=pack.causal, device=query.device)
    if pack.causal and mask is None and is_faster(query, value):
        return cast(Tensor, causal_attention(query, key, value, pack.scale))
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=pack.causal and mask is None,
        scale=pack.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _window_mask(length: int, window: int, *, causal: bool, device: torch.device) -> Tensor:
    """The band [length, length] of a sliding window: True where a key is seen."""
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return ones.tril(0 if causal else window - 1) & ones.triu(1 - window)
