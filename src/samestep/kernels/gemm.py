"""Matrix products, and linear layers, by the fastest library that PyTorch ships for a processor.

PyTorch multiplies float32 matrices on x86 with MKL, which gives AMD processors its AVX2 code even
where they have AVX-512. oneDNN, in the same build of PyTorch, uses what is there: about twice as
fast. Both round in float32; the sums run in another order. Setting
``torch.backends.mkldnn.enabled`` to False turns oneDNN off, here as elsewhere.
"""

import os
import platform
from functools import cache
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MIN_MULTIPLICATIONS = 2**20
"""Multiplications below which a product is not worth oneDNN's fixed cost of some 10 us."""

BLOCK_ELEMENTS = 2**21
"""Elements of a product that are held at once where it is added to something: 8 MB."""

CACHE_CAPACITIES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "16"}
"""How many shapes of products oneDNN, and PyTorch's layer over it, may remember code for.

Their default is 1,024 each, of half a megabyte and more. Micro-batches without padding hardly ever
have the same number of tokens, so nearly all of that is never used again; and it lies scattered
between the tensors, which then leave holes of the wrong size. Few are enough for the shapes that
the layers of one micro-batch share. Low precision goes through oneDNN on every processor, float32
where that is faster.
"""


@cache
def onednn_is_faster() -> bool:
    """Whether this processor gains from oneDNN: an AMD one with AVX-512, and PyTorch with MKL."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.mkl.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and "AuthenticAMD" in processor_name()
    )


def processor_name() -> str:
    """The vendor and the model of this machine's CPU; empty if the system does not tell."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return platform.processor()
    first_core = cpuinfo.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    lines = [
        line for line in first_core.splitlines() if line.startswith(("vendor_id", "model name"))
    ]
    return "; ".join(line.partition(":")[2].strip() for line in lines)


def uses_onednn(a: Tensor, b: Tensor, *, multiplications: int) -> bool:
    """Whether a product of two matrices goes through oneDNN.

    Args:
        a: One factor, of any shape.
        b: The other.
        multiplications: How many multiplications the product takes.

    Returns:
        True for float32 on a CPU that gains from oneDNN, where the product is large enough.
    """
    return (
        multiplications >= MIN_MULTIPLICATIONS
        and a.dtype == b.dtype == torch.float32
        and a.device.type == b.device.type == "cpu"
        and bool(torch.backends.mkldnn.enabled)
        and onednn_is_faster()
    )


def matmul(a: Tensor, b: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """``a @ b + bias``, without a graph.

    Args:
        a: [rows, inner]; any strides.
        b: [inner, columns]; any strides.
        bias: [columns], or None.

    Returns:
        [rows, columns].
    """
    if uses_onednn(a, b, multiplications=a.numel() * b.shape[1]):
        limit_caches()
        result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
        return result
    return a @ b if bias is None else torch.addmm(bias, a, b)


class WideProduct:
    """A sum of products, in a type that may be wider than theirs.

    On a CPU the first product takes the place of zeros, which would be another pass over all.

    Args:
        like: A tensor of the sum's shape [rows, columns], on its device.
        dtype: The type of the sum.
    """

    def __init__(self, like: Tensor, *, dtype: torch.dtype) -> None:
        self._like, self._dtype = like, dtype
        on_cpu = like.device.type == "cpu"
        self._total = None if on_cpu else torch.zeros_like(like, dtype=dtype)

    def add(self, a: Tensor, b: Tensor) -> None:
        """Add ``a @ b``; both as for `add_matmul_`."""
        if self._total is None:
            self._total = matmul(a.to(self._dtype), b.to(self._dtype))
        else:
            add_matmul_(self._total, a, b)

    def total(self) -> Tensor:
        """The sum [rows, columns]; zeros if nothing was added."""
        if self._total is None:
            self._total = torch.zeros_like(self._like, dtype=self._dtype)
        return self._total


def add_matmul_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``, holding only blocks of the product.

    Low precision is added up in the total's type, as inside one product: rounded before it is added
    each product would lose its last bits.

    Args:
        total: [rows, columns], contiguous; changed in place.
        a: [rows, inner]; any strides.
        b: [inner, columns]; any strides.
    """
    if total.dtype != a.dtype:
        _add_wide_matmul_(total, a, b)
        return
    if not uses_onednn(a, b, multiplications=a.numel() * b.shape[1]):
        total.addmm_(a, b)
        return
    # oneDNN's product cannot be added in place: its blocks stay in the processor's cache.
    rows = max(1, BLOCK_ELEMENTS // total.shape[1])
    for start in range(0, len(total), rows):
        block = slice(start, start + rows)
        total[block] += matmul(a[block], b)


def _add_wide_matmul_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b`` of matrices of a lower precision than the total."""
    if a.device.type == "cpu":
        add_matmul_(total, a.to(total.dtype), b.to(total.dtype))
    elif adds_in_place(a.device, a.dtype, total.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


@cache
def adds_in_place(device: torch.device, dtype: torch.dtype, wide: torch.dtype) -> bool:
    """Whether a device adds a product of low precision to a wider total, in place and right.

    Args:
        device: The device.
        dtype: The type of the factors.
        wide: The type of the total.

    Returns:
        Whether it does: tried once, since not every version of PyTorch can on every device.
    """
    ones = torch.ones(16, 16, dtype=dtype, device=device)
    total = torch.full((16, 16), 2.0**-10, dtype=wide, device=device)
    try:
        torch.addmm(total, ones, ones, out_dtype=wide, out=total)
        return bool((total == 16 + 2.0**-10).all())
    except (RuntimeError, TypeError):
        return False


@cache
def limit_caches() -> None:
    """Set oneDNN's limits, which it reads once at its first product; what the user set stays.

    `matmul` does so by itself; products of low precision PyTorch sends to oneDNN without it.
    """
    for name, capacity in CACHE_CAPACITIES.items():
        os.environ.setdefault(name, capacity)


def speed_up_linear(model: nn.Module) -> int:
    """Send the products of every plain ``nn.Linear`` through `samestep.kernels.gemm.matmul`.

    The modules stay what they are: only their ``forward`` changes, and only what it calls. Where
    the product would not be faster (another processor, device or type, autocast) they compute as
    before.

    Args:
        model: Changed in place.

    Returns:
        How many layers were changed.
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    for layer in layers:
        layer.forward = MethodType(_forward, layer)  # type: ignore[method-assign]
    return len(layers)


def _forward(layer: nn.Linear, states: Tensor) -> Tensor:
    multiplications = states.numel() * layer.out_features
    onednn = uses_onednn(states, layer.weight, multiplications=multiplications)
    if not onednn or torch.is_autocast_enabled(states.device.type):
        return nn.functional.linear(states, layer.weight, layer.bias)
    rows = states.flatten(0, -2)
    out: Tensor = _Linear.apply(rows, layer.weight, layer.bias)  # type: ignore[no-untyped-call]
    return out.view(*states.shape[:-1], layer.out_features)


class _Linear(torch.autograd.Function):
    """``states @ weight.T + bias`` with its three products."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Keeps the states only if the weight trains, the weight only if they need a gradient."""
        ctx.save_for_backward(
            states if ctx.needs_input_grad[1] else None,
            weight if ctx.needs_input_grad[0] else None,
        )
        return matmul(states, weight.t(), bias=bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of states, weight and bias; None where not needed."""
        states, weight = ctx.saved_tensors
        return (
            None if weight is None else matmul(grad_output, weight),
            None if states is None else matmul(grad_output.t(), states),
            grad_output.sum(0) if ctx.needs_input_grad[2] else None,
        )
