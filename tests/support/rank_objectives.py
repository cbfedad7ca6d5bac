"""What two ranks do in the tests of objectives: importable, so that another process finds it."""

import copy
from typing import Any

import torch
from cases import build, gradients
from experts import build_mixture
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

import samestep
from objectives import cut, ragged_records
from samestep import ranks
from samestep.data.records import Records
from samestep.objective import Objective
from samestep.objectives.classification import EXAMPLE_COUNTERS
from samestep.objectives.completions import Reference
from samestep.objectives.embedding import Embedding
from samestep.objectives.kto import KTO, KTO_COUNTERS
from samestep.objectives.preference import DPO, PAIR_COUNTERS
from samestep.objectives.routers import ROUTER_COUNTERS, BiasBalance, WithRouters, router_biases
from samestep.train.objectives.kto import KTOConfig
from samestep.two_pass import TwoPass

KINDS = ("dpo", "aot", "kto", "embedding", "window", "sequence")
N = 7


def _reference(model: Any) -> Reference:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.3)
    return Reference(other)


def _case(kind: str) -> tuple[Any, Records, Objective]:
    torch.manual_seed(0)
    if kind == "embedding":
        config = LlamaConfig(
            vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4,
        )  # fmt: skip
        model = LlamaModel(config).double().train()
        loss = TwoPass(Embedding(scale=10.0))
        return model, ragged_records(N, width=2, weighted=True), Objective(loss, EXAMPLE_COUNTERS)
    if kind in ("window", "sequence"):
        model = build_mixture("mixtral")
        terms = WithRouters(samestep.CausalLMLoss(), balance=kind, balance_weight=0.3)
        whole = TwoPass(terms) if kind == "window" else terms
        return model, ragged_records(N), Objective(whole, ROUTER_COUNTERS)
    model = build("llama")
    if kind == "kto":
        records = ragged_records(N, width=2, label=torch.arange(N) % 3 == 0)
        return model, records, Objective(TwoPass(KTO(_reference(model), beta=1.0)), KTO_COUNTERS)
    losses = {"aot": 1.0, "sft": 0.2} if kind == "aot" else {"sigmoid": 1.0}
    dpo = DPO(losses, _reference(model), beta=0.3)
    return (
        model,
        ragged_records(N, width=2),
        Objective(TwoPass(dpo) if dpo.coupled else dpo, PAIR_COUNTERS),
    )


def gradient_of(kind: str) -> tuple[float, dict[str, float], dict[str, Tensor]]:
    """Objective, terms and gradient: with two ranks, 2 of 7 records on the first, one at a time."""
    model, records, objective = _case(kind)
    own = list(range(N))
    if ranks.world() == 2:
        own = own[:2] if ranks.rank() == 0 else own[2:]
    if kind == "kto":
        config = KTOConfig(model="m", data="d", out="o")
        micros = [
            config.collate(records, [at], padding="right", pad_id=0, key=(0, 0)) for at in own
        ]
    else:
        micros = cut(model, [records[at] for at in own], [1], "right")
    loss, terms = samestep.backward(model, micros, objective.loss_fn, counters=objective.counters)
    return loss, terms, gradients(model)


def biases_after_a_step() -> list[Tensor]:
    """The routers' biases; with two ranks the second has no micro-batch at all."""
    model, records = build_mixture("minimax_m2"), ragged_records(N)
    own = list(records) if ranks.rank() == 0 else []
    bias = BiasBalance(0.01)
    loss = WithRouters(samestep.CausalLMLoss(), bias=bias)
    micros = cut(model, own, [2], "right")
    samestep.backward(model, micros, loss, counters=ROUTER_COUNTERS)
    bias.after_step(model)
    return [one.clone() for one in router_biases(model)]
