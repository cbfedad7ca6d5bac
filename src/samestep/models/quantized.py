"""Base weights of 4 or 8 bits, by bitsandbytes: stored so, multiplied as what they stand for."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from samestep.kernels.gemm import matmul

Quantization = Literal["4bit", "8bit"]


@contextmanager
def quiet_bitsandbytes() -> Iterator[None]:
    """Imports of bitsandbytes, by PEFT too wherever it is installed, as they should be.

    It would fetch a kernel of its own from the Hub, which no product here uses, and log that it
    could not.
    """
    hidden = "bitsandbytes" not in sys.modules and "kernels" not in sys.modules
    quiet = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    if hidden:
        sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        quiet.setLevel(level)
        if hidden:
            del sys.modules["kernels"]


class QuantizedLinear(nn.Linear):
    """A linear layer whose weight is stored in 4 or 8 bits, and does not train.

    It multiplies by the weight that is stored, dequantised, in the type of its states, every row by
    itself. bitsandbytes' own product of 8 bits (arXiv:2208.07339) rounds the states as well, and
    chooses columns for 16 bits by looking at all rows of a micro-batch: a row would depend on its
    neighbours.

    Args:
        quantized: ``bitsandbytes.nn.Linear4bit`` or ``Linear8bitLt`` with quantised weights.
        dtype: The type in which `weight` is given.
        transposed: Whether the model's own code has it the other way round, as GPT-2 does.
    """

    def __init__(
        self, quantized: nn.Linear, dtype: torch.dtype, *, transposed: bool = False
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = quantized.in_features, quantized.out_features
        self.dtype = dtype
        self.transposed = transposed
        bias = quantized.bias
        self.bias = None if bias is None else nn.Parameter(bias.data, requires_grad=False)
        stored: Any = quantized.weight
        self.blocks = _blocks_of(stored)
        tensors = {"packed": stored.data} | (
            {"scales": stored.SCB} if self.blocks is None else _tensors_of(stored.quant_state)
        )
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.detach(), persistent=False)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight, dequantised: a new tensor each time."""
        return self.dense(self.dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight, dequantised.

        Args:
            dtype: Its type.

        Returns:
            [out_features, in_features].
        """
        from bitsandbytes.functional import QuantState, dequantize_4bit, int8_vectorwise_dequant

        packed = self.get_buffer("packed")
        if self.blocks is None:
            dense: Tensor = int8_vectorwise_dequant(packed, self.get_buffer("scales"))
            return dense.to(dtype)

        of_scales = None
        if "scale_codes" in self._buffers:
            of_scales = QuantState(
                self.get_buffer("scales_of_scales"),
                code=self.get_buffer("scale_codes"),
                **self.blocks["scales"],
            )
        state = QuantState(
            self.get_buffer("scales"),
            code=self.get_buffer("codes"),
            offset=self._buffers.get("offset"),
            state2=of_scales,
            **self.blocks["weight"],
        )
        dense = dequantize_4bit(packed, quant_state=state)
        return dense.to(dtype)

    def forward(self, states: Tensor) -> Tensor:
        """The product with the dequantised weight.

        Args:
            states: [..., in_features].

        Returns:
            [..., out_features]; under autocast in its type.
        """
        kind = states.device.type
        if torch.is_autocast_enabled(kind):
            states = states.to(torch.get_autocast_dtype(kind))
        with torch.autocast(kind, enabled=False):
            rows = states.flatten(0, -2)
            out: Tensor = _Product.apply(rows, self)  # type: ignore[no-untyped-call]
        return out.view(*states.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """As of a linear layer, with the bits of its weight."""
        bits = 8 if self.blocks is None else 4
        return f"{self.in_features}, {self.out_features}, bits={bits}"


class _Product(torch.autograd.Function):
    """``states @ weight.T + bias``; the weight is dequantised anew in each direction."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, layer: QuantizedLinear) -> Tensor:
        """Keeps the layer alone."""
        ctx.layer, ctx.dtype = layer, states.dtype
        bias = None if layer.bias is None else layer.bias.to(states.dtype)
        return matmul(states, layer.dense(states.dtype).t(), bias=bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        """The gradient of the states; the weight has none."""
        return matmul(grad_output, ctx.layer.dense(ctx.dtype)), None


def _blocks_of(stored: Any) -> dict[str, dict[str, Any]] | None:
    """How a weight of 4 bits is cut into blocks with scales; None for one of 8 bits."""
    state = getattr(stored, "quant_state", None)
    if state is None:
        return None
    blocks = {
        "weight": {
            "shape": state.shape,
            "blocksize": state.blocksize,
            "quant_type": state.quant_type,
            "dtype": state.dtype,
        }
    }
    if state.nested:
        blocks["scales"] = {"blocksize": state.state2.blocksize, "dtype": state.state2.dtype}
    return blocks


def _tensors_of(state: Any) -> dict[str, Tensor]:
    """What a weight of 4 bits is stored with."""
    tensors = {"scales": state.absmax, "codes": state.code}
    if state.nested:
        tensors |= {
            "offset": torch.as_tensor(state.offset),
            "scales_of_scales": state.state2.absmax,
            "scale_codes": state.state2.code,
        }
    return tensors


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantised layers of a model, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}


WAS_TRANSPOSED = "was_transposed"
"""Marks what `dequantize` makes of a layer that is transposed in the model's own code."""


@torch.no_grad()
def dequantize(model: Any) -> torch.dtype | None:
    """Give quantised layers whole weights: those that they stand for, in float32 at least.

    Args:
        model: Changed in place; plain, or with adapters around its layers.

    Returns:
        The type that they were given in before; None if there are none.
    """
    layers = quantized_layers(model)
    for name, layer in layers.items():
        whole = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        wide = torch.promote_types(layer.dtype, torch.float32)
        whole.weight = nn.Parameter(layer.dense(wide), requires_grad=False)
        whole.bias = layer.bias
        vars(whole)[WAS_TRANSPOSED] = layer.transposed
        model.set_submodule(name, whole)
    return next((layer.dtype for layer in layers.values()), None)
