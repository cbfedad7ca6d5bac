"""What is kept, recomputed or offloaded for the backward changes memory, never a gradient."""

from typing import Any

import pytest
import torch
from alive import Made
from cases import build, cut, gradients, plain_objective, ragged, worst
from torch import Tensor, nn
from transformers import PreTrainedModel

import samestep
from samestep.errors import ConfigError
from samestep.kernels import gemm
from samestep.kernels.gemm import speed_up_linear
from samestep.models import activations
from samestep.models.activations import ActivationOffload, checkpoint_activations
from samestep.models.lora import add_lora

MODES: Any = ["none", "selective", "full"]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "gpt2"])
def test_gradients_in_float64(name: str, mode: Any) -> None:
    model, examples = build(name), ragged(12)
    plain_objective(model, examples).backward()
    wanted = gradients(model)
    checkpoint_activations(model, mode)
    for sizes, padding in (([5], "none"), ([1], "right")):
        samestep.backward(model, cut(model, examples, sizes, padding), samestep.CausalLMLoss())
        assert worst(gradients(model), wanted) < 1e-12


def held(mode: Any) -> tuple[int, dict[str, Tensor]]:
    """Bytes that a forward leaves for its backward, and the gradients."""
    model = build("llama", torch.float32)
    speed_up_linear(model)
    checkpoint_activations(model, mode)
    (micro,) = cut(model, ragged(32), [32], "none")
    with Made() as made:
        loss = samestep.CausalLMLoss()(model, micro)["nll"].total
    found = made.held()
    loss.backward()
    return found, gradients(model)


@pytest.mark.usefixtures("onednn")
def test_each_mode_keeps_less_than_the_one_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gemm, "MIN_MULTIPLICATIONS", 1)
    monkeypatch.setattr(activations, "_MIN_SAVED_INNER_SIZE", 16)  # the model is that small
    (everything, wanted), (selective, one), (full, other) = (held(mode) for mode in MODES)
    assert full < 0.6 * selective < 0.6 * 0.7 * everything
    assert worst(one, wanted) < 1e-6
    assert worst(other, wanted) < 1e-6


def test_an_adapters_results_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def held_with_adapters(narrow: int) -> int:
        monkeypatch.setattr(activations, "_MIN_SAVED_INNER_SIZE", narrow)
        model = add_lora(
            build("llama", torch.float32),
            4,
            alpha=8,
            dropout=0.0,
            targets=["all-linear"],
            seed=0,
        )
        checkpoint_activations(model, "selective")
        (micro,) = cut(model, ragged(32), [32], "none")
        with Made() as made:
            loss = samestep.CausalLMLoss()(model, micro)["nll"].total
        found = made.held()
        loss.backward()
        return found

    assert held_with_adapters(16) < 0.75 * held_with_adapters(1)


def test_what_differs_the_second_time_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were results kept that the backward cannot use, gradients would show it."""
    monkeypatch.setattr(activations, "_ATTENTION_KERNELS", frozenset({torch.ops.aten.mul.Tensor}))
    monkeypatch.setattr(
        torch.utils.checkpoint, "_detach_helper", lambda kept: kept.detach() * 1.001
    )
    model, examples = build("llama"), ragged(12)
    plain_objective(model, examples).backward()
    wanted = gradients(model)
    checkpoint_activations(model, "selective")
    samestep.backward(model, cut(model, examples, [5], "none"), samestep.CausalLMLoss())
    assert worst(gradients(model), wanted) > 1e-4


def test_a_model_that_cannot_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreTrainedModel, "supports_gradient_checkpointing", False)
    monkeypatch.setattr(type(build("llama")), "supports_gradient_checkpointing", False)
    checkpoint_activations(build("llama"), "none")
    with pytest.raises(ConfigError, match="does not support it: use none"):
        checkpoint_activations(build("llama"), "full")


def test_offloading_keeps_the_gradient(monkeypatch: Any) -> None:
    monkeypatch.setattr(activations, "_MIN_OFFLOAD_BYTES", 0)
    model, loss = build("llama"), samestep.CausalLMLoss()
    micros = cut(model, ragged(12), [5], "none")
    samestep.backward(model, micros, loss)
    wanted = gradients(model)

    def offloaded(model: Any, micro: Any) -> Any:
        with ActivationOffload(model):
            return loss(model, micro)

    samestep.backward(model, micros, offloaded)
    assert all(torch.equal(found, wanted[name]) for name, found in gradients(model).items())


def test_large_activations_move_and_weights_do_not() -> None:
    model = nn.Linear(300, 300)
    offload = ActivationOffload(model)
    pack, unpack = offload.pack_hook, offload.unpack_hook
    states, few = torch.ones(300, 300), torch.ones(3)
    for kept in (model.weight, model.weight.t(), few):
        assert unpack(pack(kept)).data_ptr() == kept.data_ptr()
    moved = unpack(pack(states))
    assert moved.data_ptr() != states.data_ptr()
    assert torch.equal(moved, states)
