"""Linear layers through oneDNN against plain ones, weight by weight, judged by float64."""

import copy
from typing import Any

import pytest
import torch
from cases import build, cut, gradients, plain_objective, ragged, worst
from torch import Tensor, nn

import samestep
from samestep.kernels import gemm
from samestep.kernels.gemm import speed_up_linear


@pytest.fixture(autouse=True)
def onednn_for_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch was built without oneDNN")
    monkeypatch.setattr(gemm, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(gemm, "MIN_MULTIPLICATIONS", 1)


def truth(name: str) -> dict[str, Tensor]:
    model = build(name)
    plain_objective(model, ragged(16)).backward()
    return gradients(model)


def step_gradients(model: Any) -> dict[str, Tensor]:
    samestep.backward(model, cut(model, ragged(16), [3, 5], "none"), samestep.CausalLMLoss())
    return gradients(model)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2"])
def test_gradients_are_as_close_to_float64_as_plain_ones(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name, torch.float32)
    speed_up_linear(model)
    actual = worst(step_gradients(model), truth(name))
    monkeypatch.setattr(gemm, "onednn_is_faster", lambda: False)
    plain = worst(step_gradients(model), truth(name))
    assert actual <= max(2 * plain, 2e-6)


def test_a_wrong_product_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gemm.matmul

    def wrong(a: Tensor, b: Tensor, **options: Any) -> Tensor:
        return right(a.bfloat16().float(), b, **options)

    monkeypatch.setattr(gemm, "matmul", wrong)
    model = build("llama", torch.float32)
    speed_up_linear(model)
    assert worst(step_gradients(model), truth("llama")) > 1e-4


def test_frozen_weights_keep_no_states_and_get_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    right = gemm.matmul

    def counted(a: Tensor, b: Tensor, **options: Any) -> Tensor:
        calls.append((*a.shape, b.shape[1]))
        return right(a, b, **options)

    monkeypatch.setattr(gemm, "matmul", counted)
    layer = nn.Linear(5, 7).requires_grad_(False)
    speed_up_linear(layer)
    states = torch.randn(2, 3, 5, requires_grad=True)
    out = layer(states)
    kept = [saved for saved in out.grad_fn.next_functions[0][0].saved_tensors if saved is not None]
    assert [tuple(saved.shape) for saved in kept] == [(7, 5)]
    out.sum().backward()
    assert calls == [(6, 5, 7), (6, 7, 5)]


def test_the_module_stays_a_linear_layer_that_can_be_copied() -> None:
    layer = nn.Linear(5, 7)
    speed_up_linear(layer)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight.zero_()
    states = torch.randn(2, 5)
    assert type(twin) is nn.Linear
    assert twin.state_dict().keys() == {"weight", "bias"}
    torch.testing.assert_close(twin(states), twin.bias.expand(2, 7))
    assert not torch.equal(layer(states), twin(states))


def test_autocast_and_float64_compute_as_before() -> None:
    layer, states = nn.Linear(5, 7), torch.randn(2, 5)
    plain = copy.deepcopy(layer)
    speed_up_linear(layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(states), plain(states))
    assert torch.equal(layer.double()(states.double()), plain.double()(states.double()))
