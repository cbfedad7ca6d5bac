"""Products through oneDNN against float64, and when it is not taken."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from samestep.kernels import gemm
from samestep.kernels.gemm import WideProduct, add_matmul_, matmul, uses_onednn


def matrices(transposed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = torch.randn(131, 257), torch.randn(257, 67)
    return (a.t().contiguous().t(), b.t().contiguous().t()) if transposed else (a, b)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_is_as_close_to_float64_as_pytorchs(onednn: bool, transposed: bool) -> None:
    a, b = matrices(transposed)
    assert uses_onednn(a, b, multiplications=2**21) == onednn
    bias = torch.randn(67)
    truth = torch.addmm(bias.double(), a.double(), b.double())
    plain = (torch.addmm(bias, a, b) - truth).norm()
    assert (matmul(a, b, bias=bias) - truth).norm() <= 2 * plain
    assert (matmul(a, b) - (truth - bias)).norm() <= 2 * plain


@pytest.mark.usefixtures("onednn")
def test_a_product_is_added_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "BLOCK_ELEMENTS", 67 * 50)
    monkeypatch.setattr(gemm, "MIN_MULTIPLICATIONS", 2**10)
    a, b = matrices(False)
    total = torch.ones(131, 67)
    add_matmul_(total, a, b)
    torch.testing.assert_close(total, 1 + a @ b, atol=1e-4, rtol=1e-5)


def test_onednn_serves_float32_on_the_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "onednn_is_faster", lambda: True)
    a, b = matrices(False)
    assert not uses_onednn(a.double(), b.double(), multiplications=2**21)
    assert not uses_onednn(a.bfloat16(), b.bfloat16(), multiplications=2**21)
    assert not uses_onednn(a, b, multiplications=2**19)  # its fixed cost would not pay
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not uses_onednn(a, b, multiplications=2**21)


MANY_SHAPES = """
import torch
from samestep.kernels import gemm
gemm.onednn_is_faster = lambda: True
torch.set_num_threads(1)
weight = torch.randn(768, 512)
def some(first):
    for rows in range(first, first + 60):
        states, slope = torch.randn(rows, 512), torch.randn(rows, 768)
        gemm.matmul(states, weight.t())
        gemm.matmul(slope, weight)
        gemm.matmul(slope.t(), states)
def resident_pages():
    return int(open("/proc/self/statm").read().split()[1])
some(200)
before = resident_pages()
some(300)
print(resident_pages() - before)
"""


@pytest.mark.thorough
@pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and Path("/proc/self/statm").exists()),
    reason="no oneDNN, or a system that does not say what a process takes",
)
def test_products_of_ever_new_shapes_do_not_pile_up() -> None:
    """Each shape's code is half a megabyte: without bounds they grow the process for long."""

    def pages_more(**environment: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", MANY_SHAPES],
            check=True,
            capture_output=True,
            text=True,
            env=os.environ | environment,
        )
        return int(done.stdout)

    unbounded = pages_more(**dict.fromkeys(gemm.CACHE_CAPACITIES, "1024"))
    assert 3 * pages_more() < unbounded > 20_000


def test_a_sum_of_products_needs_no_zeros_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = matrices(False)
    monkeypatch.setattr(torch, "zeros_like", None)
    wide = WideProduct(torch.empty(131, 67), dtype=torch.float64)
    wide.add(a, b)
    wide.add(-2 * a, b)
    torch.testing.assert_close(wide.total(), -(a.double() @ b.double()))
    monkeypatch.undo()
    assert torch.equal(
        WideProduct(torch.empty(3, 2), dtype=torch.float64).total(), torch.zeros(3, 2).double()
    )
