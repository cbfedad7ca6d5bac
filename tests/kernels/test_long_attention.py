"""Attention by products against its definition, and when it is taken."""

import pytest
import torch
from cases import build, cut, gradients, plain_objective, ragged, worst
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

import samestep
from samestep.kernels import gemm, long_attention, packed_attention
from samestep.kernels.long_attention import causal_attention
from samestep.models.activations import checkpoint_activations


def states(heads: int, length: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """[1, heads, length, 8], in memory as models make them."""
    made = torch.randn(1, length, heads, 8, dtype=dtype).transpose(1, 2)
    return made.requires_grad_()


def by_definition(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    later = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).triu(1)
    return (query @ key.transpose(2, 3) * scale).masked_fill(later, -torch.inf).softmax(3) @ value


@pytest.mark.parametrize("heads", [(6, 6), (6, 2), (3, 1)])
@pytest.mark.parametrize("length", [1, 16, 33, 50])
def test_values_and_gradients(
    heads: tuple[int, int], length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_attention, "BLOCK_QUERIES", 16)
    inputs = (states(heads[0], length), states(heads[1], length), states(heads[1], length))
    actual, expected = causal_attention(*inputs, 0.4), by_definition(*inputs, 0.4)
    torch.testing.assert_close(actual, expected)
    incoming = torch.randn_like(actual)
    for one, other in zip(
        torch.autograd.grad(actual, inputs, incoming),
        torch.autograd.grad(expected, inputs, incoming),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("onednn")
def test_float32_is_as_near_to_float64_as_pytorchs_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gemm, "MIN_MULTIPLICATIONS", 1)
    inputs = [states(heads, 300, torch.float32) for heads in (6, 2, 2)]
    exact = [one.detach().double().requires_grad_() for one in inputs]
    incoming = torch.randn(1, 6, 300, 8)

    def results(run: Tensor, of: list[Tensor]) -> list[Tensor]:
        return [run.detach(), *torch.autograd.grad(run, of, incoming.to(run.dtype))]

    truth = results(by_definition(*exact, 0.4), exact)
    kernel = scaled_dot_product_attention(*inputs, is_causal=True, scale=0.4, enable_gqa=True)
    for one, other, true in zip(
        results(causal_attention(*inputs, 0.4), inputs), results(kernel, inputs), truth, strict=True
    ):
        assert (one - true).norm() < 3 * (other - true).norm()


class Count(TorchDispatchMode):
    """Counts the calls of the operation."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.calls += func is torch.ops.samestep.causal_attention.default
        return func(*args, **(kwargs or {}))


@pytest.fixture
def taken_from_five_tokens_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_attention, "is_faster", lambda query, _: query.shape[2] >= 5)


@pytest.mark.usefixtures("taken_from_five_tokens_on")
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_model_trains_by_it_and_selective_checkpointing_keeps_its_result(name: str) -> None:
    model, examples = build(name), ragged(12)
    plain_objective(model, examples).backward()
    expected = gradients(model)
    calls = {}
    for mode in ("none", "selective", "full"):
        checkpoint_activations(model, mode)  # type: ignore[arg-type]
        with Count() as count:
            samestep.backward(
                model,
                cut(model, examples, [5], "none"),
                samestep.CausalLMLoss(),
                check_sums=False,
            )
        assert worst(gradients(model), expected) < 1e-12
        calls[mode] = count.calls
    long = sum(len(example.input_ids) >= 5 for example in examples)
    assert calls["none"] == calls["selective"] == long * model.config.num_hidden_layers > 0
    assert calls["full"] == 2 * calls["none"]


def test_it_is_taken_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", True)
    long = torch.zeros(1, 1, long_attention.MIN_LENGTH, 64)
    assert long_attention.is_faster(long, long)
    assert not long_attention.is_faster(long[:, :, 1:], long[:, :, 1:])
    assert not long_attention.is_faster(long, long[..., :1])
    assert not long_attention.is_faster(long.double(), long.double())
    monkeypatch.setattr(gemm, "onednn_is_faster", lambda: False)
    assert not long_attention.is_faster(long, long)
