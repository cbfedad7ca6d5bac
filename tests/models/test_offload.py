"""Activations in the CPU's memory: the same step, and weights stay where they are."""

from typing import Any

import torch
from cases import build, cut, gradients, ragged
from torch import nn

import samestep
from samestep.models import offload
from samestep.models.offload import Offload


def test_the_gradient_is_the_same(monkeypatch: Any) -> None:
    monkeypatch.setattr(offload, "LEAST", 0)
    model, loss = build("llama"), samestep.CausalLMLoss()
    micros = cut(model, ragged(12), [5], "none")
    samestep.backward(model, micros, loss)
    wanted = gradients(model)

    def offloaded(model: Any, micro: Any) -> Any:
        with Offload(model):
            return loss(model, micro)

    samestep.backward(model, micros, offloaded)
    assert all(torch.equal(found, wanted[name]) for name, found in gradients(model).items())


def test_large_activations_move_and_weights_do_not() -> None:
    model = nn.Linear(300, 300)
    pack, unpack = Offload(model).pack_hook, Offload(model).unpack_hook
    states, few = torch.ones(300, 300), torch.ones(3)
    for kept in (model.weight, model.weight.t(), few):
        assert pack(kept)[0] is kept
    copy, moved = pack(states)
    assert moved
    assert copy.data_ptr() != states.data_ptr()
    assert torch.equal(unpack((copy, moved)), states)
