"""What the losses over logits share, each against its definition."""

import pytest
import torch
from torch import Tensor

from samestep.losses.logits import (
    CHUNK_ELEMENTS,
    at_least_float32,
    chunk_rows,
    linear_logits,
    map_chunks,
    soft_cap,
    soft_cap_derivative,
)


def test_the_soft_cap_and_its_derivative() -> None:
    logits = torch.linspace(-9, 9, 31, dtype=torch.float64, requires_grad=True)
    capped = soft_cap(logits, 3.0)
    assert float(capped.detach().abs().max()) < 3
    (gradient,) = torch.autograd.grad(capped.sum(), logits)
    torch.testing.assert_close(soft_cap_derivative(capped.detach(), 3.0), gradient)
    assert torch.equal(soft_cap(logits.detach().clone(), 3.0, inplace=True), capped)
    assert soft_cap(logits, None) is logits


def test_linear_logits_are_computed_in_the_inputs_type_and_summed_in_another() -> None:
    hidden, weight, bias = torch.randn(5, 4), torch.randn(7, 4), torch.randn(7)
    plain = hidden @ weight.t() + bias
    options = {"softcap": 2.0, "dtype": torch.float32}
    logits = linear_logits(hidden, weight, bias=bias, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(logits, 2 * torch.tanh(plain / 2))
    low = linear_logits(hidden.bfloat16(), weight.bfloat16(), bias=None, **options)  # type: ignore[arg-type]
    assert low.dtype == torch.float32


@pytest.mark.parametrize(
    ("dtype", "raised"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_low_precision_is_raised_to_float32(dtype: torch.dtype, raised: torch.dtype) -> None:
    assert at_least_float32(torch.zeros(2, dtype=dtype)).dtype == raised


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_chunks_cover_all_rows_in_order(rows: int) -> None:
    x, y = torch.randn(rows, 3, requires_grad=True), torch.randn(rows, 3)
    sizes = []

    def product(a: Tensor, b: Tensor) -> Tensor:
        sizes.append(len(a))
        return a * b

    result = torch.cat(map_chunks(product, x, y, chunk=2))
    assert torch.equal(result, x * y)
    assert sizes == {0: [0], 1: [1], 5: [2, 2, 1]}[rows]


def test_a_chunk_fills_the_same_memory_for_every_vocabulary() -> None:
    states = torch.zeros(1, 4)
    assert chunk_rows(None, states, vocabulary=2**13) == CHUNK_ELEMENTS // 2**13
    assert chunk_rows(None, states, vocabulary=2 * CHUNK_ELEMENTS) == 1
    assert chunk_rows(7, states, vocabulary=2**13) == 7
