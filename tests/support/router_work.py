"""What the ranks of the tests of routers do."""

from typing import Any

import torch
from cases import gradients
from experts import build_experts

import samestep
from objectives import cut, ragged_records
from samestep.engine import collectives
from samestep.engine.two_pass import TwoPass
from samestep.models.routers import router_biases
from samestep.objectives.language import CausalLMLoss
from samestep.objectives.routers import ROUTER_COUNTERS, RouterBias, RouterLosses


def router_step(family: str, sizes: list[int]) -> tuple[float, Any, Any]:
    """Objective, gradient and biases of a batch of 9; ``sizes`` is how many each rank takes."""
    model, records, bias = build_experts(family), list(ragged_records(9)), RouterBias(0.1)
    losses = RouterLosses(CausalLMLoss(), "window", balance_weight=0.5, z_weight=0.1, bias=bias)
    start = sum(sizes[: collectives.rank()])
    own = records[start : start + sizes[collectives.rank()]]
    micros = cut(model, own, [2], "none")
    loss, _ = samestep.backward(model, micros, TwoPass(losses), counters=ROUTER_COUNTERS)
    biases: dict[str, torch.Tensor] = router_biases(model)
    if biases:
        bias.after_step(model, True)
    return loss, gradients(model), biases
