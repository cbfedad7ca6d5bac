"""Causal attention of one long sequence by matrix products, a block of queries at a time.

PyTorch's kernel for CPUs multiplies by MKL. Where oneDNN is twice as fast
(`samestep.kernels.gemm`), long sequences gain from its products: only the scores of one block are
held, and they are computed again in the backward (as FlashAttention does, arXiv:2205.14135). The
heads that share a key head are one product.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from samestep.kernels.gemm import by_onednn, product

BLOCK = 192
"""Most queries of a head that are multiplied at once: their scores should stay in the cache."""

LONG = 256
"""Tokens from which a sequence gains."""


def gains(query: Tensor, value: Tensor) -> bool:
    """Whether `causal_attention` serves a sequence, and faster than PyTorch's kernel."""
    length, width = query.shape[2:]
    return (
        length >= LONG
        and width == value.shape[3]
        and by_onednn(query, value, multiplications=query.numel() * length)
    )


# One operation, so that selective checkpointing can keep its result.
@torch.library.custom_op("samestep::causal_attention", mutates_args=())
def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The values, averaged by the softmax of scaled products with the keys up to the query's own.

    Args:
        query: [1, heads, length, width].
        key: [1, key heads, length, width]; the heads are a multiple of the key heads.
        value: Like ``key``.
        scale: Factor of query times key.

    Returns:
        [1, heads, length, width]; in memory a position's heads lie together.
    """
    out = _like_positions(query[0])
    values = value[0].contiguous()
    for block in _blocks(query[0], key[0], scale):
        block.put(out, product(block.shares, values[block.group, : block.end]))
    return out[None]


@torch.library.custom_op("samestep::causal_attention_backward", mutates_args=())
def causal_attention_backward(
    incoming: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value.

    Args:
        incoming: The gradient of ``out``.
        query: As for `causal_attention`.
        key: As for `causal_attention`.
        value: As for `causal_attention`.
        out: Its result.
        scale: As for `causal_attention`.
    """
    key_heads, length, width = key.shape[1:]
    to_query = _like_positions(query[0])
    # Transposed, so that what is added up is small and its other factor is copied by oneDNN.
    to_key, to_value = (query.new_zeros(key_heads, width, length) for _ in range(2))
    keys = key[0].contiguous()
    # One more column, and the product with the values is the scores' gradient short of a factor.
    values = _with_column(value[0], 1.0)
    slopes = _with_column(incoming[0], -(incoming[0] * out[0]).sum(-1))
    for block in _blocks(query[0], keys, scale):
        group, end = block.group, block.end
        slope = block.take(slopes)
        to_value[group, :, :end] += product(slope[:, :width].t(), block.shares)
        to_scores = product(slope, values[group, :end].t()).mul_(block.shares)
        block.put(to_query, product(to_scores, keys[group, :end]))
        to_key[group, :, :end] += product(block.queries.t(), to_scores)
    return (
        to_query.mul_(scale)[None],
        to_key.transpose(1, 2)[None],
        to_value.transpose(1, 2)[None],
    )


class _Block(NamedTuple):
    """Some queries of the heads that share a key head, and what they attend to.

    Attributes:
        group: The key head.
        heads: Its heads.
        rows: The positions of the queries.
        queries: The scaled queries [heads * rows, width].
        shares: Their softmax [heads * rows, end].
    """

    group: int
    heads: slice
    rows: slice
    queries: Tensor
    shares: Tensor

    @property
    def end(self) -> int:
        return self.shares.shape[1]

    def take(self, states: Tensor) -> Tensor:
        """This block's part of [heads, length, width], as rows."""
        return states[self.heads, self.rows].flatten(0, 1)

    def put(self, states: Tensor, rows: Tensor) -> None:
        """The reverse."""
        part = states[self.heads, self.rows]
        part.copy_(rows.view(part.shape))


def _blocks(query: Tensor, key: Tensor, scale: float) -> Iterator[_Block]:
    heads, length, _ = query.shape
    together = heads // len(key)
    keys = key.contiguous()
    pieces = -(-length // BLOCK)
    size = -(-length // (16 * pieces)) * 16  # all much the same, whole vectors of the processor
    later = query.new_full((size, size), -torch.inf).triu(1)
    for start in range(0, length, size):
        rows = slice(start, min(start + size, length))
        count = rows.stop - start
        for group in range(len(key)):
            of_group = slice(group * together, (group + 1) * together)
            queries = (query[of_group, rows] * scale).flatten(0, 1)
            scores = product(queries, keys[group, : rows.stop].t())
            scores.view(together, count, -1)[:, :, start:] += later[:count, :count]
            yield _Block(group, of_group, rows, queries, scores.softmax(1))


def _like_positions(states: Tensor) -> Tensor:
    """Room for [heads, length, width], in memory [length, heads, width]."""
    heads, length, width = states.shape
    return states.new_empty(length, heads, width).transpose(0, 1)


def _with_column(states: Tensor, column: Tensor | float) -> Tensor:
    """[heads, length, width + 1]."""
    wider = states.new_empty(*states.shape[:-1], states.shape[-1] + 1)
    wider[..., :-1] = states
    wider[..., -1] = column
    return wider


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, output)


def _gradients(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
    return (*causal_attention_backward(incoming, *ctx.saved_tensors, ctx.scale), None)


causal_attention.register_autograd(_gradients, setup_context=_keep)
