"""Router terms of mixtures of experts: the formulas over the whole batch, under every split."""

from typing import Any, Literal

import pytest
import torch
from cases import gradients, worst
from experts import MIXTURES, build_mixture
from torch import Tensor

import samestep
from objectives import check_all_splits, check_wrong_is_caught, cut, log_probs, ragged_records
from samestep.data.records import Records
from samestep.objective import Objective
from samestep.objectives.routers import (
    ROUTER_COUNTERS,
    BiasBalance,
    WithRouters,
    router_biases,
    routers_of,
    watched,
)
from samestep.two_pass import TwoPass

E, K, WEIGHT, Z = 4, 2, 0.3, 0.01
BOUND = 1e-6  # transformers' routers compute in float32, whatever the weights are


def objective(balance: Literal["window", "sequence"] | None, z: float = 0.0) -> Objective:
    loss = WithRouters(samestep.CausalLMLoss(), balance=balance, balance_weight=WEIGHT, z_weight=z)
    return Objective(TwoPass(loss) if balance == "window" else loss, ROUTER_COUNTERS)


def routed(model: Any, records: Records) -> list[list[Any]]:
    """What each router did with each sequence by itself: [sequences][layers]."""
    model.set_attn_implementation("sdpa")
    found = []
    for sequence in records.sequences:
        with watched(model) as seen:
            model(input_ids=sequence.input_ids[None])
        found.append(seen)
    return found


def scores(name: str, logits: Tensor) -> Tensor:
    if name in ("mixtral", "qwen3_moe"):
        return logits.softmax(-1)
    return logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)


def chosen_counts(chosen: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(chosen, E).sum(dim=(0, 1)).double()


def plain(name: str, records: Records, balance: str | None, z: float) -> Any:
    """The objective from its formulas, each sequence by itself."""

    def truth(model: Any) -> Tensor:
        nlls = torch.cat([-log_probs(model, one) for one in records.sequences])
        total, seen = nlls.mean(), routed(model, records)
        logits = [[layer.logits.double() for layer in one] for one in seen]
        if balance == "window":
            rows = torch.cat([scores(name, layer) for one in logits for layer in one])
            loads = sum(chosen_counts(layer.chosen) for one in seen for layer in one)
            total = total + WEIGHT * E * (loads / len(rows) * rows.mean(0)).sum()
        if balance == "sequence":
            losses = []
            for one, own in zip(seen, logits, strict=True):
                for layer, found in zip(one, own, strict=True):
                    shares = chosen_counts(layer.chosen) / len(found)
                    losses.append(E / K * (shares * scores(name, found).mean(0)).sum())
            total = total + WEIGHT * torch.stack(losses).mean()
        if z:
            total = (
                total
                + z
                * torch.cat(
                    [layer.logsumexp(-1).square() for one in logits for layer in one]
                ).mean()
            )
        return total

    return truth


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("balance", ["window", "sequence", None])
def test_every_split(name: str, balance: Any) -> None:
    model, records = build_mixture(name), ragged_records(8)
    z = Z if balance is None else 0.0
    truth, loss = plain(name, records, balance, z), objective(balance, z)
    terms = check_all_splits(model, records, loss, truth, bound=BOUND)
    assert len(terms) == 3
    check_wrong_is_caught(model, records, loss, truth)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_window_is_transformers_on_one_batch(name: str) -> None:
    model, records = build_mixture(name), ragged_records(8)
    micros = cut(model, records, [8], "right")
    _, terms = samestep.backward(
        model, micros, objective("window").loss_fn, counters=ROUTER_COUNTERS
    )
    inputs = samestep.model_inputs(micros[0])
    theirs = model(**inputs, output_router_logits=True).aux_loss
    assert terms["load_balance"] == pytest.approx(theirs.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "minimax_m2"])
def test_float32(name: str) -> None:
    model, records = build_mixture(name, torch.float32), ragged_records(8)
    found = []
    for sizes, padding in (([8], "right"), ([1], "none"), ([3, 2], "left")):
        micros = cut(model, records, sizes, padding)
        loss = objective("window", Z).loss_fn
        samestep.backward(model, micros, loss, counters=ROUTER_COUNTERS)
        found.append(gradients(model))
    assert max(worst(one, found[0]) for one in found[1:]) < 5e-6


@pytest.mark.parametrize("name", ["deepseek_v3", "minimax_m2"])
def test_biases_follow_the_loads_of_the_whole_batch(name: str) -> None:
    records, found = ragged_records(8), []
    for sizes, padding in (([8], "right"), ([1], "none"), ([3, 2], "left")):
        model = build_mixture(name)
        seen = routed(model, records)
        bias = BiasBalance(0.01)
        loss = WithRouters(samestep.CausalLMLoss(), bias=bias)
        micros = cut(model, records, sizes, padding)
        samestep.backward(model, micros[:1], loss, counters=ROUTER_COUNTERS)
        bias.forget()  # as the trainer does before each attempt: that one ran out of memory
        samestep.backward(model, micros, loss, counters=ROUTER_COUNTERS)
        samestep.evaluate(model, micros, loss, counters=ROUTER_COUNTERS)  # counts nothing
        bias.after_step(model)
        for layer, moved in enumerate(router_biases(model)):
            loads = sum(chosen_counts(one[layer].chosen) for one in seen)
            torch.testing.assert_close(moved.double(), 0.01 * (loads.mean() - loads).sign())
        found.append([one.clone() for one in router_biases(model)])
        assert not bias._loads
    assert all(torch.equal(a, b) for one in found[1:] for a, b in zip(one, found[0], strict=True))


def test_balance_is_lowest_where_it_is_even() -> None:
    model = build_mixture("mixtral")
    for router in routers_of(model):
        router.weight.data.zero_()
    micros = cut(model, ragged_records(4), [4], "none")
    _, terms = samestep.backward(
        model, micros, objective("window").loss_fn, counters=ROUTER_COUNTERS
    )
    assert terms["load_balance"] == pytest.approx(K)


def test_models_without_experts_are_refused() -> None:
    from cases import build

    model = build("llama")
    with pytest.raises(samestep.ConfigError, match="LlamaForCausalLM has no router"):
        routers_of(model)
    with pytest.raises(samestep.ConfigError, match="no bias to balance by"):
        router_biases(build_mixture("mixtral"))
