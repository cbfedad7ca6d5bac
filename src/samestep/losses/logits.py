"""What the losses over logits share: precision, soft cap, chunks of rows, a linear head's backward.

Whole logits [targets, vocabulary] would be the largest tensor of a training step. So they are made
a chunk of rows at a time: by `map_chunks`, which recomputes them in the backward, or with
`linear_logits` and `HeadGradients` inside an autograd function.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from samestep.kernels.gemm import WideProduct, matmul

CHUNK_ELEMENTS = 2**23
"""Logits held at once on a CPU by default: 32 MB in float32, which its cache nearly holds."""

CHUNK_ROWS = 4096
"""Rows of logits held at once on an accelerator: more would not make its products faster."""

CHUNK_BYTES = 2**30
"""What logits and what is made of them may take on an accelerator."""

TYPICAL_VOCABULARY = 2**16
"""The vocabulary that is assumed of a head that is not one weight matrix."""

T = TypeVar("T")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of softmax and sums for inputs of a type: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor, raised to float32 if its type is of lower precision."""
    return tensor.to(accumulation_dtype(tensor.dtype))


def soft_cap(logits: Tensor, cap: float | None, *, inplace: bool = False) -> Tensor:
    """The soft cap of Gemma 2 (arXiv:2408.00118): cap * tanh(logits / cap).

    Args:
        logits: Any shape.
        cap: The bound that no logit's absolute value exceeds; None: the logits as they are.
        inplace: Overwrite the logits.

    Returns:
        The capped logits, of the same shape.
    """
    if cap is None:
        return logits
    if inplace:
        return logits.div_(cap).tanh_().mul_(cap)
    return cap * torch.tanh(logits / cap)


def soft_cap_derivative(capped: Tensor, cap: float) -> Tensor:
    """The derivative of `soft_cap` at each logit, from the capped ones: 1 - (capped / cap)²."""
    return (capped / cap).square_().neg_().add_(1)


def chunk_rows(
    chunk: int | None,
    states: Tensor,
    *,
    vocabulary: int = TYPICAL_VOCABULARY,
    copies: int = 2,
) -> int:
    """Rows of logits to hold at once: what suits the device.

    A CPU is fastest where the logits stay in its cache. An accelerator reads the whole embedding,
    and adds to a float32 gradient as large, once a chunk: its chunks are as large as memory allows.

    Args:
        chunk: The rows that the caller wants; None: as many as suit the device.
        states: Hidden states, by whose type and device it is decided.
        vocabulary: Columns of the logits.
        copies: Tensors as large as the logits that are held at once, in `accumulation_dtype`.

    Returns:
        At least 1.
    """
    if chunk is not None:
        return chunk
    if states.device.type == "cpu":
        return max(1, CHUNK_ELEMENTS // vocabulary)
    bytes_a_row = vocabulary * copies * accumulation_dtype(states.dtype).itemsize
    return max(1, min(CHUNK_ROWS, CHUNK_BYTES // bytes_a_row))


def columns_of(head: object) -> int:
    """The vocabulary of a head, where it tells.

    Args:
        head: A module such as ``nn.Linear``, plain or with adapters.

    Returns:
        Its output features, or `TYPICAL_VOCABULARY`.
    """
    found = getattr(head, "out_features", None)
    return found if isinstance(found, int) else TYPICAL_VOCABULARY


def map_chunks(
    function: Callable[..., T],
    *tensors: Tensor,
    chunk: int | None,
    vocabulary: int = TYPICAL_VOCABULARY,
    copies: int = 6,
) -> list[T]:
    """Apply a function to chunks of rows; what it computed is recomputed in the backward.

    Args:
        function: Of as many tensors as are given, each [chunk, ...].
        *tensors: Each [rows, ...], with the same number of rows.
        chunk: As for `chunk_rows`.
        vocabulary: As for `chunk_rows`.
        copies: As for `chunk_rows`; autograd holds more than the functions here.

    Returns:
        The result for each chunk; with no rows, that for one empty chunk.
    """
    size = chunk_rows(chunk, tensors[0], vocabulary=vocabulary, copies=copies)
    chunks = zip(*(tensor.split(size) for tensor in tensors), strict=True)
    return [checkpoint(function, *rows, use_reentrant=False) for rows in chunks]


def linear_logits(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None,
    softcap: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """The logits of a linear head, without a graph.

    Args:
        hidden: Hidden states [rows, width].
        weight: [vocabulary, width].
        bias: [vocabulary], or None.
        softcap: As for `soft_cap`.
        dtype: The type of the result: the product is made in the inputs' type, all else in this.

    Returns:
        [rows, vocabulary], owned by the caller.
    """
    logits = matmul(hidden, weight.t()).to(dtype)
    if bias is not None:
        logits += bias
    return soft_cap(logits, softcap, inplace=True)


class HeadGradients:
    """Gradients of hidden states, weight and bias of a linear head, added up over chunks of rows.

    Args:
        hidden: Hidden states [rows, width].
        weight: [vocabulary, width]; multiplied in the type of ``hidden``.
        bias: [vocabulary], or None.
        needs_grad: Which of the three need a gradient.
        dtype: The type to add up in, of `accumulation_dtype`.

    Attributes:
        weight: [vocabulary, width], in the type of ``hidden``.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        *,
        bias: Tensor | None,
        needs_grad: Sequence[bool],
        dtype: torch.dtype,
    ) -> None:
        self._hidden, self.weight = hidden, weight.to(hidden.dtype)
        self._dtypes = weight.dtype, None if bias is None else bias.dtype
        self._grad_hidden = torch.zeros_like(hidden) if needs_grad[0] else None
        # Low-precision products add up in float32 over the chunks, as inside one product.
        self._grad_weight = WideProduct(weight, dtype=dtype) if needs_grad[1] else None
        self._grad_bias = (
            torch.zeros_like(bias, dtype=dtype) if bias is not None and needs_grad[2] else None
        )

    def add(self, rows: slice, grad_logits: Tensor, *, row_weights: Tensor | None = None) -> None:
        """Add one chunk.

        Args:
            rows: The chunk's rows of ``hidden``.
            grad_logits: d loss / d logits [chunk, vocabulary], before ``row_weights``.
            row_weights: A factor for each row [chunk], or None for 1.
        """
        # A row's factor is cheaper on its hidden state than on its logits.
        # There it multiplies in float32: in low precision the factor would be rounded too.
        factors = None if row_weights is None else row_weights[:, None]
        if self._grad_hidden is not None:
            states = matmul(grad_logits, self.weight)
            self._grad_hidden[rows] = states if factors is None else states * factors
        if self._grad_weight is not None:
            states = self._hidden[rows]
            if factors is not None:
                states = (states * factors).to(states.dtype)
            self._grad_weight.add(grad_logits.t(), states)
        if self._grad_bias is not None:
            self._grad_bias += (grad_logits if factors is None else grad_logits * factors).sum(0)

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Those of hidden states, weight and bias in the inputs' types; None where not needed."""
        weight_dtype, bias_dtype = self._dtypes
        return (
            self._grad_hidden,
            None if self._grad_weight is None else self._grad_weight.total().to(weight_dtype),
            None if self._grad_bias is None else self._grad_bias.to(bias_dtype),
        )
