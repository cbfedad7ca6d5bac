"""What the auditor keeps of a large model's gradient: random sums of its elements.

A sum with random signs is linear, so a gradient that is a combination of others has the same
combination of their sums, and a difference anywhere shows. Lengths and angles are kept to about
one over the square root of the number of sums (Achlioptas, Database-friendly random projections,
2003). A gradient of up to `KEPT` elements is kept as it is.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

KEPT = 2**19
"""Elements of a model's gradient that are kept, 4 MB in float64: dozens fit beside any model."""


def fold_of(model: nn.Module) -> int:
    """How many elements make one sum, so that a gradient of the trainable weights fits."""
    elements = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    return max(1, -(-elements // KEPT))


def sketched(tensor: Tensor, fold: int) -> Tensor:
    """Sums of elements with random signs.

    Args:
        tensor: Of any shape; dense.
        fold: Elements of a sum, from `fold_of`.

    Returns:
        Float64 on the CPU, a copy: ``[ceil(elements / fold)]``; with a fold of 1 the tensor itself.
    """
    if fold == 1:
        return tensor.detach().to("cpu", torch.float64, copy=True)
    flat = tensor.detach().flatten()
    sums = torch.zeros(-(-len(flat) // fold), dtype=torch.float64)
    for start, signs in _rows(len(flat), len(sums)):
        row = flat[start : start + len(signs)].to("cpu", torch.float64)
        sums[: len(row)] += row * signs
    return sums


def spread(sums: Tensor, like: Tensor, fold: int) -> Tensor:
    """The direction whose product with any gradient is that of the sums with the gradient's.

    Args:
        sums: As `sketched` returns them.
        like: The weight: its shape.
        fold: Elements of a sum.

    Returns:
        Float64 on the CPU, of the shape of the weight.
    """
    if fold == 1:
        return sums
    flat = torch.empty(like.numel(), dtype=torch.float64)
    for start, signs in _rows(len(flat), len(sums)):
        flat[start : start + len(signs)] = sums[: len(signs)] * signs
    return flat.view(like.shape)


def _rows(elements: int, sums: int) -> Iterator[tuple[int, Tensor]]:
    """The start of each row of as many elements as there are sums, and its signs."""
    draw = torch.Generator().manual_seed(elements)
    for start in range(0, elements, sums):
        length = min(sums, elements - start)
        yield start, torch.randint(0, 2, (length,), generator=draw, dtype=torch.float64) * 2 - 1
