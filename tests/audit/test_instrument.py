"""What is captured of a step: gradients, updates, moved weights."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from samestep.audit.adapters.instrument import WithoutDropout, read_gradients, scale_gradients
from samestep.audit.adapters.watch import StepWatch
from samestep.audit.subject import Observation

X = torch.arange(6.0).view(2, 3)


def observed(train: Any, model: nn.Module | None = None, scale: float = 1.0) -> Observation:
    torch.manual_seed(0)
    model = model or nn.Linear(3, 2)
    watch = StepWatch(model)
    with scale_gradients(model, scale), watch.on():
        train(model)
    return watch.observation({})


def backward(model: nn.Module) -> None:
    model(X).square().sum().backward()


def adam(model: nn.Module, times: int = 1) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.5)
    for _ in range(times):
        backward(model)
        optimizer.step()


def by_hand(model: nn.Module) -> None:
    backward(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight -= 0.5 * weight.grad


def test_the_gradient_is_the_one_that_the_optimizer_saw() -> None:
    left, seen = observed(backward), observed(adam)
    assert (left.updates, seen.updates) == (0, 1)
    for name, gradient in left.gradient.items():
        assert torch.equal(gradient, seen.gradient[name])
    assert observed(lambda model: adam(model, 3)).updates == 3


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.LBFGS])
def test_a_closure_runs_before_its_gradient_is_read(kind: Any) -> None:
    def train(model: nn.Module) -> None:
        optimizer = kind(model.parameters(), lr=0.1)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = model(X).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)

    expected, seen = observed(backward), observed(train)
    assert seen.updates == 1
    for name, gradient in expected.gradient.items():
        assert torch.equal(gradient, seen.gradient[name])


def test_the_rates_of_updates_are_kept() -> None:
    left = observed(lambda model: adam(model, 2)).left
    assert left is not None
    assert left.rates == ((0.001,), (0.001,))
    assert left.rates_after == ((0.001,),)


def test_without_an_optimizer_it_is_how_far_weights_moved() -> None:
    left, moved = observed(backward), observed(by_hand)
    for name, gradient in left.gradient.items():
        assert torch.allclose(moved.gradient[name], 0.5 * gradient, atol=1e-6)
    assert moved.rounding >= left.rounding


def test_weights_that_came_back_have_not_moved() -> None:
    def there_and_back(model: nn.Module) -> None:
        backward(model)
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.1
                weight -= 0.1

    assert observed(there_and_back).gradient.keys() == {"weight", "bias"}
    assert torch.equal(
        observed(there_and_back).gradient["bias"], observed(backward).gradient["bias"]
    )


def test_two_optimizers_of_different_weights_are_one_update() -> None:
    def train(model: Any) -> None:
        backward(model)
        torch.optim.SGD([model.weight], lr=0.1).step()
        torch.optim.SGD([model.bias], lr=0.1).step()

    seen = observed(train)
    assert seen.updates == 1
    assert seen.gradient.keys() == {"weight", "bias"}


def test_a_scale_reaches_the_gradient_before_anything_else() -> None:
    def clipped(model: nn.Module) -> None:
        backward(model)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    whole, small = observed(backward), observed(clipped, scale=2.0**-14)
    for name, gradient in whole.gradient.items():
        assert torch.allclose(small.gradient[name] * 2.0**14, gradient)


def test_sparse_gradients_are_filled() -> None:
    model = nn.Embedding(5, 2, sparse=True)
    model(torch.tensor([1, 3])).sum().backward()
    assert read_gradients(model)["weight"].sum(1).tolist() == [0, 2, 0, 2, 0]


@pytest.mark.parametrize(
    "drop",
    [
        lambda x: functional.dropout(x, 0.5),
        lambda x: functional.dropout(input=x, p=0.5, training=True),
        lambda x: torch.dropout(x, 0.5, True),
        lambda x: functional.scaled_dot_product_attention(x, x, x, None, 0.5),
        lambda x: functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
    ],
)
def test_no_function_drops(drop: Any) -> None:
    x = torch.randn(1, 1, 50, 4)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return drop(x)

    assert not torch.equal(run(0), run(1))
    with WithoutDropout():
        assert torch.equal(run(0), run(1))


class AgainByHand(torch.autograd.Function):
    """Runs a layer again in the backward, and hands its gradients on."""

    @staticmethod
    def forward(ctx: Any, layer: nn.Module, given: Tensor, *weights: Tensor) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(given, *weights)
        with torch.no_grad():
            return layer(given)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        given, *weights = ctx.saved_tensors
        with torch.enable_grad():
            made = ctx.layer(given)
        return None, None, *torch.autograd.grad(made, weights, upstream)


def test_a_gradient_that_a_backward_hands_on_is_scaled_once() -> None:
    def again(model: nn.Module) -> None:
        AgainByHand.apply(model, X, *model.parameters()).square().sum().backward()

    def checkpointed(model: nn.Module) -> None:
        given = X.clone().requires_grad_()
        checkpoint(model, given, use_reentrant=True).square().sum().backward()

    wanted = observed(backward).gradient
    for train in (backward, again, checkpointed):
        scaled = observed(train, scale=0.25).gradient
        assert all(torch.equal(scaled[name], 0.25 * wanted[name]) for name in wanted)
