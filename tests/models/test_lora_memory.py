"""Frozen weights cost nothing: no gradient, no optimizer state, no product for their gradient."""

from typing import Any

import pytest
import torch
from alive import Made
from cases import build, cut, ragged

import samestep
from samestep.kernels.gemm import speed_up_linear
from samestep.models.activations import checkpoint_activations
from samestep.models.lora import add_lora
from samestep.train.optim import build_optimizer
from samestep.train.settings.language import CausalLMSettings

HEAD = (97, 32)


def made(model: Any) -> Made:
    """What one forward and backward of a LoRA model makes."""
    micros = cut(model, ragged(8), [8], "none")
    samestep.backward(model, micros, samestep.CausalLMLoss())  # finds the model's logit rule
    model.zero_grad()
    with Made() as seen:
        samestep.backward(model, micros, samestep.CausalLMLoss())
    return seen


@pytest.mark.parametrize("mode", ["none", "selective"])
def test_frozen_weights_get_no_gradient(mode: Any) -> None:
    model = build("llama-tied", torch.float32)
    model = add_lora(model, 2, alpha=4, dropout=0, targets=("all-linear",), seed=0)
    speed_up_linear(model)
    checkpoint_activations(model, mode)
    shapes = made(model).shapes
    frozen = {tuple(w.shape) for w in model.parameters() if not w.requires_grad and w.dim() == 2}
    assert HEAD in frozen
    assert not shapes & frozen
    assert all(w.grad is None for w in model.parameters() if not w.requires_grad)
    # The same look finds the product where the head trains.
    model.get_output_embeddings().weight.requires_grad_()
    assert HEAD in made(model).shapes


def test_the_optimizer_holds_the_adapters_alone() -> None:
    model = build("llama", torch.float32)
    model = add_lora(model, 2, alpha=4, dropout=0, targets=("all-linear",), seed=0)
    optimizer = build_optimizer(model, CausalLMSettings(model="m", data="d", out="o"))
    micros = cut(model, ragged(8), [8], "none")
    samestep.step(model, optimizer, micros, samestep.CausalLMLoss())
    state = sum(
        value.numel()
        for weight in optimizer.state.values()
        for value in weight.values()
        if value.dim()
    )
    trainable = sum(w.numel() for w in model.parameters() if w.requires_grad)
    assert state == 2 * trainable < 0.2 * sum(w.numel() for w in model.parameters())
