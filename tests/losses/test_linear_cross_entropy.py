import pytest
import torch
from largest import Largest
from torch import Tensor, nn
from torch.nn import functional

from samestep.losses.cross_entropy import logits_cross_entropy, module_cross_entropy
from samestep.losses.linear_cross_entropy import linear_cross_entropy

N, H, V = 9, 5, 11


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(N, H, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, H, dtype=dtype, requires_grad=True)
    bias = torch.randn(V, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, V, (N,))
    targets[[2, 5]] = -100
    return hidden, weight, bias, targets, torch.rand(N, dtype=torch.float64) + 0.5


@pytest.mark.sampled(5)
@pytest.mark.parametrize("chunk", [1, 3, None])
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1}, {"z_loss": 0.1}, {"softcap": 2.0}], ids=str
)
@pytest.mark.parametrize("weighted", [False, True])
def test_gradcheck(options: dict[str, float], chunk: int | None, weighted: bool) -> None:
    hidden, weight, bias, targets, factors = inputs()

    def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        scale = factors if weighted else None
        sums = linear_cross_entropy(
            h, w, targets, bias=b, target_weights=scale, chunk=chunk, **options
        )
        return sums.loss

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


def test_values_are_pytorchs() -> None:
    hidden, weight, bias, targets, _ = inputs()
    sums = linear_cross_entropy(hidden, weight, targets, bias=bias, entropy=True)
    logits = hidden @ weight.t() + bias
    chosen = targets != -100
    expected = functional.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(sums.loss, expected)
    torch.testing.assert_close(sums.nll, expected)
    right = (logits.argmax(-1) == targets)[chosen].sum()
    assert float(sums.correct) == float(right)
    entropy = torch.distributions.Categorical(logits=logits[chosen]).entropy().sum()
    torch.testing.assert_close(sums.entropy, entropy)


def test_the_other_forms_agree() -> None:
    hidden, weight, bias, targets, factors = inputs()
    head = nn.Linear(H, V).double()
    head.load_state_dict({"weight": weight.detach(), "bias": bias.detach()})
    options = {"target_weights": factors, "label_smoothing": 0.1, "z_loss": 0.01}
    expected = linear_cross_entropy(hidden, head.weight, targets, bias=head.bias, **options)
    for actual in (
        logits_cross_entropy(head(hidden), targets, **options),
        module_cross_entropy(head, hidden, targets, chunk=2, **options),
    ):
        for name in ("loss", "nll", "correct"):
            torch.testing.assert_close(getattr(actual, name), getattr(expected, name))
        one = torch.autograd.grad(actual.loss, head.weight)[0]
        torch.testing.assert_close(
            one, torch.autograd.grad(expected.loss, head.weight, retain_graph=True)[0]
        )


def test_without_targets_the_loss_is_a_zero_with_a_graph() -> None:
    hidden, weight, *_ = inputs()
    loss = linear_cross_entropy(hidden, weight, torch.full((N,), -100)).loss
    loss.backward()
    assert float(loss.detach()) == 0
    assert hidden.grad is not None
    assert float(weight.grad.abs().sum()) == 0


def test_the_incoming_gradient_is_honoured_each_time() -> None:
    hidden, weight, _, targets, _ = inputs()
    loss = linear_cross_entropy(hidden, weight, targets).loss
    once = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    thrice = torch.autograd.grad(3 * loss, weight, retain_graph=True)[0]
    torch.testing.assert_close(thrice, 3 * once)


def test_masked_rows_are_never_multiplied() -> None:
    hidden, weight, _, targets, _ = inputs()
    poisoned = hidden.detach().clone()
    poisoned[targets == -100] = torch.nan
    poisoned.requires_grad_()
    loss = linear_cross_entropy(poisoned, weight, targets).loss
    loss.backward()
    assert bool(loss.isfinite())
    assert bool(weight.grad.isfinite().all())
    assert float(poisoned.grad[targets == -100].abs().sum()) == 0


def test_the_logits_are_never_whole() -> None:
    hidden = torch.randn(200, 8, requires_grad=True)
    weight = torch.randn(500, 8, requires_grad=True)
    with Largest() as seen:
        linear_cross_entropy(hidden, weight, torch.arange(200), chunk=10).loss.backward()
    assert seen.elements <= 10 * 500
    with Largest() as seen:
        functional.cross_entropy(hidden @ weight.t(), torch.arange(200))
    assert seen.elements == 200 * 500


def test_bfloat16_is_as_close_to_the_truth_as_pytorchs() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 16).bfloat16(), torch.randn(50, 16).bfloat16()
    targets = torch.randint(0, 50, (64,))

    def gradient(h: Tensor, w: Tensor, fused: bool) -> Tensor:
        w = w.clone().requires_grad_()
        if fused:
            linear_cross_entropy(h, w, targets, chunk=8).loss.backward()
        else:
            functional.cross_entropy(h @ w.t(), targets, reduction="sum").backward()
        return w.grad.double()

    truth = gradient(hidden.double(), weight.double(), False)
    own = (gradient(hidden, weight, True) - truth).norm()
    plain = (gradient(hidden, weight, False) - truth).norm()
    assert own <= 1.1 * plain
