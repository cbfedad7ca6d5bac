import pytest
import torch
from largest import Largest
from torch import Tensor, nn
from torch.nn import functional

from samestep.losses.likelihood import (
    Extras,
    linear_likelihoods,
    logits_likelihoods,
    module_likelihoods,
)

N, H, V = 9, 5, 11


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(N, H, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, H, dtype=dtype, requires_grad=True)
    bias = torch.randn(V, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, V, (N,))
    targets[[2, 5]] = -100
    return hidden, weight, bias, targets, torch.randn(N - 2, dtype=dtype)


@pytest.mark.parametrize("chunk", [1, 3, None])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck_of_a_vector(chunk: int | None, softcap: float | None) -> None:
    hidden, weight, bias, targets, _ = inputs()

    def nll(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_likelihoods(h, w, targets, bias=b, softcap=softcap, chunk=chunk).nll

    assert torch.autograd.gradcheck(nll, (hidden, weight, bias))


@pytest.mark.parametrize("chunk", [2, None])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck_of_the_entropy(chunk: int | None, softcap: float | None) -> None:
    hidden, weight, bias, targets, incoming = inputs()

    def both(h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        found = linear_likelihoods(
            *(h, w, targets),
            bias=b,
            softcap=softcap,
            chunk=chunk,
            extras=Extras(entropy_graph=True),
        )
        return found.entropy, found.nll * incoming

    assert torch.autograd.gradcheck(both, (hidden, weight, bias))


def test_the_chance_of_a_collision() -> None:
    hidden, weight, bias, targets, _ = inputs()
    found = linear_likelihoods(
        *(hidden, weight, targets), bias=bias, chunk=4, extras=Extras(collision=True)
    )
    p = (hidden @ weight.t() + bias)[targets != -100].softmax(-1)
    torch.testing.assert_close(found.collision, p.square().sum(-1).log().detach())
    assert not found.collision.requires_grad


def test_values_are_pytorchs() -> None:
    hidden, weight, bias, targets, _ = inputs()
    actual = linear_likelihoods(hidden, weight, targets, bias=bias, chunk=4)
    chosen = targets != -100
    logits = (hidden @ weight.t() + bias)[chosen]
    expected = functional.cross_entropy(logits, targets[chosen], reduction="none")
    torch.testing.assert_close(actual.nll, expected)
    assert actual.correct.tolist() == (logits.argmax(-1) == targets[chosen]).tolist()
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(actual.entropy, entropy.detach())
    assert not actual.entropy.requires_grad
    assert actual.collision.tolist() == [0] * len(logits)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_other_forms_agree(softcap: float | None) -> None:
    hidden, weight, bias, targets, incoming = inputs()
    head = nn.Linear(H, V).double()
    head.load_state_dict({"weight": weight.detach(), "bias": bias.detach()})
    extras = Extras(entropy_graph=True, collision=True)
    expected = linear_likelihoods(
        *(hidden, head.weight, targets), bias=head.bias, softcap=softcap, extras=extras
    )
    logits = head(hidden)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    for actual in (
        logits_likelihoods(logits, targets, extras=extras),
        module_likelihoods(head, hidden, targets, softcap=softcap, chunk=2, extras=extras),
    ):
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other)
        slopes = [
            torch.autograd.grad(
                (one.nll + 2 * one.entropy) @ incoming, (head.weight, hidden), retain_graph=True
            )
            for one in (actual, expected)
        ]
        torch.testing.assert_close(*slopes)


def test_one_factor_for_all_rows_is_caught() -> None:
    """The gradient must honour each row's own factor."""
    hidden, weight, _, targets, incoming = inputs()
    nll = linear_likelihoods(hidden, weight, targets).nll
    right = torch.autograd.grad(nll @ incoming, weight, retain_graph=True)[0]
    wrong = torch.autograd.grad(nll.sum() * incoming.mean(), weight)[0]
    assert (right - wrong).norm() > 1e-2 * right.norm()


def test_without_targets_the_vector_is_empty_with_a_graph() -> None:
    hidden, weight, *_ = inputs()
    nll = linear_likelihoods(hidden, weight, torch.full((N,), -100)).nll
    assert nll.shape == (0,)
    nll.sum().backward()
    assert float(weight.grad.abs().sum()) == 0


def test_masked_rows_are_never_multiplied() -> None:
    hidden, weight, _, targets, _ = inputs()
    poisoned = hidden.detach().clone()
    poisoned[targets == -100] = torch.nan
    poisoned.requires_grad_()
    linear_likelihoods(poisoned, weight, targets).nll.sum().backward()
    assert bool(weight.grad.isfinite().all())


def test_the_logits_are_never_whole() -> None:
    hidden = torch.randn(200, 8, requires_grad=True)
    weight = torch.randn(500, 8, requires_grad=True)
    with Largest() as seen:
        actual = linear_likelihoods(hidden, weight, torch.arange(200), chunk=10)
        (actual.nll * torch.rand(200)).sum().backward()
    assert seen.elements <= 10 * 500
