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

from samestep.kernels.gemm import matmul, uses_onednn

BLOCK_QUERIES = 192
"""Most queries of a head that are multiplied at once: their scores should stay in the cache."""

MIN_LENGTH = 256
"""Tokens from which a sequence gains."""


def is_faster(query: Tensor, value: Tensor) -> bool:
    """Whether `causal_attention` serves a sequence, and faster than PyTorch's kernel.

    Args:
        query: As for `causal_attention`.
        value: As for `causal_attention`.

    Returns:
        True for long float32 sequences on a CPU that gains from oneDNN.
    """
    length, width = query.shape[2:]
    return (
        length >= MIN_LENGTH
        and width == value.shape[3]
        and uses_onednn(query, value, multiplications=query.numel() * length)
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
    out = _empty_like_heads(query[0])
    values = value[0].contiguous()
    for block in _blocks(query[0], key[0], scale=scale):
        block.write(out, matmul(block.probs, values[block.key_head, : block.end]))
    return out[None]


@torch.library.custom_op("samestep::causal_attention_backward", mutates_args=())
def causal_attention_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value.

    Args:
        grad_out: The gradient of ``out``.
        query: As for `causal_attention`.
        key: As for `causal_attention`.
        value: As for `causal_attention`.
        out: Its result.
        scale: As for `causal_attention`.

    Returns:
        Each of the shape of what it is the gradient of.
    """
    key_heads, length, width = key.shape[1:]
    grad_query = _empty_like_heads(query[0])
    # Transposed, so that what is added up is small and its other factor is copied by oneDNN.
    grad_key, grad_value = (query.new_zeros(key_heads, width, length) for _ in range(2))
    keys = key[0].contiguous()
    # One more column, and the product with the values is the scores' gradient short of a factor.
    values = _append_column(value[0], 1.0)
    grad_outs = _append_column(grad_out[0], -(grad_out[0] * out[0]).sum(-1))
    for block in _blocks(query[0], keys, scale=scale):
        key_head, end = block.key_head, block.end
        grad_rows = block.read(grad_outs)
        grad_value[key_head, :, :end] += matmul(grad_rows[:, :width].t(), block.probs)
        grad_scores = matmul(grad_rows, values[key_head, :end].t()).mul_(block.probs)
        block.write(grad_query, matmul(grad_scores, keys[key_head, :end]))
        grad_key[key_head, :, :end] += matmul(block.queries.t(), grad_scores)
    return (
        grad_query.mul_(scale)[None],
        grad_key.transpose(1, 2)[None],
        grad_value.transpose(1, 2)[None],
    )


class _Block(NamedTuple):
    """Some queries of the heads that share a key head, and their attention to the keys so far.

    Attributes:
        key_head: The number of the key head.
        heads: The query heads that share it.
        rows: The positions of the queries.
        queries: The scaled queries [heads * rows, width].
        probs: The softmax of their scores [heads * rows, end].
    """

    key_head: int
    heads: slice
    rows: slice
    queries: Tensor
    probs: Tensor

    @property
    def end(self) -> int:
        """The position after the last key that the block attends to."""
        return self.probs.shape[1]

    def read(self, states: Tensor) -> Tensor:
        """This block's part of [heads, length, width], as rows [heads * rows, width]."""
        return states[self.heads, self.rows].flatten(0, 1)

    def write(self, states: Tensor, rows: Tensor) -> None:
        """Write rows [heads * rows, width] to this block's part of [heads, length, width]."""
        part = states[self.heads, self.rows]
        part.copy_(rows.view(part.shape))


def _blocks(query: Tensor, key: Tensor, *, scale: float) -> Iterator[_Block]:
    heads, length, _ = query.shape
    group_size = heads // len(key)
    keys = key.contiguous()
    num_blocks = -(-length // BLOCK_QUERIES)
    # All of nearly the same size, in whole vectors of the processor.
    size = -(-length // (16 * num_blocks)) * 16
    causal_mask = query.new_full((size, size), -torch.inf).triu(1)
    for start in range(0, length, size):
        rows = slice(start, min(start + size, length))
        count = rows.stop - start
        for key_head in range(len(key)):
            group = slice(key_head * group_size, (key_head + 1) * group_size)
            queries = (query[group, rows] * scale).flatten(0, 1)
            scores = matmul(queries, keys[key_head, : rows.stop].t())
            scores.view(group_size, count, -1)[:, :, start:] += causal_mask[:count, :count]
            yield _Block(key_head, group, rows, queries, scores.softmax(1))


def _empty_like_heads(states: Tensor) -> Tensor:
    """Uninitialised, of the shape [heads, length, width]; in memory [length, heads, width]."""
    heads, length, width = states.shape
    return states.new_empty(length, heads, width).transpose(0, 1)


def _append_column(states: Tensor, column: Tensor | float) -> Tensor:
    """[heads, length, width + 1]."""
    extended = states.new_empty(*states.shape[:-1], states.shape[-1] + 1)
    extended[..., :-1] = states
    extended[..., -1] = column
    return extended


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, output)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    return (*causal_attention_backward(grad_out, *ctx.saved_tensors, ctx.scale), None)


causal_attention.register_autograd(_backward, setup_context=_setup_context)
