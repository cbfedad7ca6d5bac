"""The backward of a linear head, a chunk of rows at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor

from samestep.kernels.gemm import add_product_, product


class HeadGradients:
    """Gradients of hidden states, weight and bias of a linear head, added up over chunks.

    Args:
        hidden: Hidden states [rows, width].
        weight: [vocabulary, width].
        bias: [vocabulary], or None.
        needed: Which of the three need a gradient.
        wide: The type to add up in: float32, or float64 for float64 inputs.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needed: Sequence[bool],
        wide: torch.dtype,
    ) -> None:
        self.inputs = (hidden, weight, bias)
        self.hidden = torch.zeros_like(hidden) if needed[0] else None
        # Low-precision products add up in float32 over the chunks, as inside one product.
        self.weight = torch.zeros_like(weight, dtype=wide) if needed[1] else None
        self.bias = torch.zeros_like(bias, dtype=wide) if bias is not None and needed[2] else None

    def add(self, rows: slice, slope: Tensor, scale: Tensor | None = None) -> None:
        """Add a chunk: d loss / d logits [chunk, vocabulary], with a factor for each row."""
        hidden, weight, _ = self.inputs
        # A row's factor is cheaper on its hidden state than on its logits.
        column = None if scale is None else scale[:, None].to(hidden.dtype)
        if self.hidden is not None:
            states = product(slope, weight)
            self.hidden[rows] = states if column is None else states * column
        if self.weight is not None:
            states = hidden[rows] if column is None else hidden[rows] * column
            if self.weight.dtype == states.dtype:
                add_product_(self.weight, slope.t(), states)
            else:
                self.weight += _wide_product(slope.t(), states, self.weight.dtype)
        if self.bias is not None:
            self.bias += (slope if column is None else slope * column).sum(0)

    def finished(self) -> tuple[Tensor | None, ...]:
        """The gradients in the types of the inputs; None where none is needed."""
        return (
            self.hidden,
            None if self.weight is None else self.weight.to(self.inputs[1].dtype),
            None if self.bias is None else self.bias.to(self.inputs[0].dtype),
        )


def _wide_product(one: Tensor, other: Tensor, wide: torch.dtype) -> Tensor:
    """A product of low-precision matrices that is not rounded back to low precision.

    Each chunk's share would else lose its last bits before it is added.
    """
    if one.is_cuda:
        return torch.mm(one, other, out_dtype=wide)
    return one.to(wide) @ other.to(wide)
