import pytest
import torch
from torch import nn

from samestep.engine.gradients import assign_gradients, clip_grad_norm_, float32_accumulation


def layer(dtype: torch.dtype) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(8, 4, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_small_gradients_survive_in_float32(dtype: torch.dtype) -> None:
    """1 + 255 x 1/512 in bfloat16 stays 1: each addition rounds away what it adds."""
    weight = nn.Parameter(torch.ones(1, dtype=dtype))
    small = 2.0**-9 if dtype == torch.bfloat16 else 2.0**-12
    with float32_accumulation([weight]) as gradients:
        for factor in [1.0] + [small] * 255:
            (weight * factor).sum().backward()
            assert weight.grad is None
    assert gradients[weight].dtype == torch.float32
    assert float(gradients[weight]) == 1 + 255 * small
    naive = torch.ones(1, dtype=dtype)
    for _ in range(255):
        naive += small
    assert float(naive) == 1


def test_wide_weights_accumulate_in_place() -> None:
    model = layer(torch.float32)
    with float32_accumulation(list(model.parameters())) as gradients:
        model(torch.ones(2, 8)).sum().backward()
        model(torch.ones(2, 8)).sum().backward()
    assert gradients[model.weight] is model.weight.grad
    assert float(gradients[model.bias][0]) == 4


def test_an_error_leaves_no_gradient_and_no_hook() -> None:
    model = layer(torch.bfloat16)

    def fail() -> None:
        with float32_accumulation(list(model.parameters())):
            model(torch.ones(2, 8, dtype=torch.bfloat16)).sum().backward()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert model.weight.grad is None
    model(torch.ones(2, 8, dtype=torch.bfloat16)).sum().backward()
    assert model.weight.grad is not None


def test_tied_weights_are_one_gradient() -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    with float32_accumulation([weight]) as gradients:
        ((weight * 2).sum() + (weight * 3).sum()).backward()
    assert gradients[weight].tolist() == [5, 5, 5]


def test_the_norm_is_that_before_clipping() -> None:
    gradients = [torch.tensor([3.0]), torch.tensor([[4.0]])]
    assert float(clip_grad_norm_(gradients, None)) == 5
    assert float(clip_grad_norm_(gradients, 10.0)) == 5
    assert [float(one) for one in gradients] == [3, 4]
    assert float(clip_grad_norm_(gradients, 1.0)) == 5
    assert float(gradients[0]) == pytest.approx(0.6, rel=1e-6)


def test_assign_rounds_once() -> None:
    model = layer(torch.bfloat16)
    gradients = {model.bias: torch.full((4,), 1 + 2.0**-9)}
    assign_gradients(gradients)
    assert gradients == {}  # float32 sums do not outlive it
    assert model.bias.grad.dtype == torch.bfloat16
    assert model.bias.grad.tolist() == [1, 1, 1, 1]
