"""Matrix products by the fastest library that PyTorch ships for this processor.

PyTorch multiplies float32 matrices on x86 with MKL, which gives AMD processors its AVX2 code even
where they have AVX-512. oneDNN, in the same build of PyTorch, uses what is there: about twice as
fast. Both round in float32; the sums run in another order. Setting
``torch.backends.mkldnn.enabled`` to False turns oneDNN off, here as elsewhere.
"""

import os
import platform
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SMALLEST = 2**20
"""Multiplications below which a product is not worth oneDNN's fixed cost of some 10 us."""

BLOCK_ELEMENTS = 2**21
"""Elements of a product that are held at once where it is added to something: 8 MB."""

CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "16"}
"""How many shapes of products oneDNN, and PyTorch's layer over it, may remember code for.

Their default is 1,024 each, of half a megabyte and more. Micro-batches without padding hardly ever
have the same number of tokens, so nearly all of that is never used again; and it lies scattered
between the tensors, which then leave holes of the wrong size. Few are enough for the shapes that
the layers of one micro-batch share.
"""


@cache
def onednn_is_faster() -> bool:
    """Whether this processor gains from oneDNN: an AMD one with AVX-512, and PyTorch with MKL."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.mkl.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and "AuthenticAMD" in processor()
    )


def processor() -> str:
    """The maker and the name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return platform.processor()
    first = cpuinfo.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    named = [line for line in first.splitlines() if line.startswith(("vendor_id", "model name"))]
    return "; ".join(line.partition(":")[2].strip() for line in named)


def by_onednn(one: Tensor, other: Tensor, *, multiplications: int) -> bool:
    """Whether a product of these two goes through oneDNN."""
    return (
        multiplications >= SMALLEST
        and one.dtype == other.dtype == torch.float32
        and one.device.type == other.device.type == "cpu"
        and bool(torch.backends.mkldnn.enabled)
        and onednn_is_faster()
    )


def product(one: Tensor, other: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """``one @ other + bias``, without a graph.

    Args:
        one: [rows, inner]; any strides.
        other: [inner, columns]; any strides.
        bias: [columns], or None.

    Returns:
        [rows, columns].
    """
    if by_onednn(one, other, multiplications=one.numel() * other.shape[1]):
        _bound_caches()
        found: Tensor = torch.ops.mkldnn._linear_pointwise(one, other.t(), bias, "none", [], "")
        return found
    return one @ other if bias is None else torch.addmm(bias, one, other)


@cache
def _bound_caches() -> None:
    """Read once, at oneDNN's first product in the process; what the user has set stays."""
    for name, capacity in CACHES.items():
        os.environ.setdefault(name, capacity)


def add_product_(total: Tensor, one: Tensor, other: Tensor) -> None:
    """``total += one @ other``, holding only blocks of the product.

    Args:
        total: [rows, columns], contiguous.
        one: [rows, inner]; any strides.
        other: [inner, columns]; any strides.
    """
    if not by_onednn(one, other, multiplications=one.numel() * other.shape[1]):
        total.addmm_(one, other)
        return
    # oneDNN's product cannot be added in place: its blocks stay in the processor's cache.
    rows = max(1, BLOCK_ELEMENTS // total.shape[1])
    for start in range(0, len(total), rows):
        part = slice(start, start + rows)
        total[part] += product(one[part], other)
