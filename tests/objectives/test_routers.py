"""Mixtures of experts: the papers' and transformers' values, the same under every split."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cases import gradients, worst
from experts import FAMILIES, build_experts
from torch import Tensor, nn

import samestep
from objectives import check_all_splits, cut, ragged_records
from samestep.data.collate import collate_examples
from samestep.data.examples import Example
from samestep.engine.terms import Objective, Term
from samestep.engine.two_pass import TwoPass
from samestep.errors import ConfigError
from samestep.models.routers import router_biases, routers
from samestep.objectives.language import CausalLMLoss
from samestep.objectives.routers import ROUTER_COUNTERS, RouterBias, RouterLosses

K = 2
BOUND = {"deepseek_v3": 1e-6, "minimax_m2": 1e-7}
"""Parts of these routers are in float32 whatever the weights are: DeepSeek-V3's logits, and the
sigmoids of MiniMax-M2, whose last digit in PyTorch depends on the position in the tensor."""


def objective(kind: str, loss: Any = None, **options: Any) -> Objective:
    losses = RouterLosses(
        loss or CausalLMLoss(),
        balance=None if kind == "z" else kind,  # type: ignore[arg-type]
        balance_weight=0.7,
        z_weight=0.3 if kind == "z" else 0.0,
        **options,
    )
    return Objective(TwoPass(losses) if kind == "window" else losses, ROUTER_COUNTERS)


def router_logits(model: Any, examples: Sequence[Example]) -> tuple[Tensor, list[list[Tensor]]]:
    """The nll of the batch, and the logits of each router on each example by itself."""
    model.set_attn_implementation("sdpa")
    by_router: list[list[Tensor]] = [[] for _ in routers(model)]
    nll, targets, total = torch.zeros(()).double(), 0.0, []
    for example in examples:
        out = model.model(input_ids=example.input_ids[None], output_router_logits=True)
        logits = model.lm_head(out.last_hidden_state)[0, :-1]
        chosen = example.labels[1:] != -100
        total.append(
            example.weight
            * nn.functional.cross_entropy(
                logits[chosen], example.labels[1:][chosen], reduction="sum"
            )
        )
        targets += example.weight * int(chosen.sum())
        for kept, found in zip(by_router, out.router_logits, strict=True):
            kept.append(found)
    nll = torch.stack(total).sum() / targets
    return nll, by_router


def chosen_of(model: Any, at: int, logits: Tensor) -> Tensor:
    """One-hot choices [tokens, experts] of a router, its rule written out for these models."""
    scores = scores_of(model, logits)
    if model.config.model_type == "deepseek_v3":
        scores = scores + list(router_biases(model).values())[at]
        groups = scores.view(len(scores), 2, 4)
        best = groups.topk(2, dim=-1).values.sum(-1).argmax(-1)
        keep = torch.zeros_like(groups).scatter(1, best[:, None, None].expand(-1, 1, 4), 1.0)
        scores = scores.masked_fill(keep.flatten(1) == 0, -torch.inf)
    elif model.config.model_type == "minimax_m2":
        scores = scores + list(router_biases(model).values())[at]
    hot = torch.zeros_like(logits)
    return hot.scatter(1, scores.topk(K, dim=-1).indices, 1.0)


def scores_of(model: Any, logits: Tensor) -> Tensor:
    """What a router compares."""
    sigmoid = model.config.model_type in ("deepseek_v3", "minimax_m2")
    return logits.sigmoid() if sigmoid else logits.softmax(-1)


def plain_truth(examples: Sequence[Example], kind: str) -> Callable[[Any], Tensor]:
    """The formulas of the papers, on examples by themselves, put together by their weights."""

    def truth(model: Any) -> Tensor:
        nll, by_router = router_logits(model, examples)
        weights = torch.tensor([example.weight for example in examples], dtype=torch.float64)
        terms = []
        for at, logits in enumerate(by_router):
            shares = [scores_of(model, one) for one in logits]
            shares = [one / one.sum(-1, keepdim=True) for one in shares]
            hot = [chosen_of(model, at, one) for one in logits]
            tokens = sum(w * len(one) for w, one in zip(weights, logits, strict=True))
            experts = logits[0].shape[1]
            if kind == "window":
                f = sum(w * one.sum(0) for w, one in zip(weights, hot, strict=True)) / tokens
                p = sum(w * one.sum(0) for w, one in zip(weights, shares, strict=True)) / tokens
                terms.append(experts * (f * p).sum())
            elif kind == "sequence":
                each = torch.stack(
                    [
                        experts / K * (h.mean(0) * s.mean(0)).sum()
                        for h, s in zip(hot, shares, strict=True)
                    ]
                )
                terms.append((weights * each).sum() / weights.sum())
            else:
                squares = [one.logsumexp(-1).square().sum() for one in logits]
                terms.append((weights * torch.stack(squares)).sum() / tokens)
        return nll + (0.3 if kind == "z" else 0.7) * torch.stack(terms).mean()

    return truth


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", ["window", "sequence", "z"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_papers_formula_under_every_split(family: str, kind: str) -> None:
    model, records = build_experts(family), ragged_records(7, weighted=True)
    with torch.no_grad():  # biases that choose other experts than the scores alone would
        for bias in router_biases(model).values():
            bias.copy_(0.2 * torch.randn(bias.shape))
    truth = plain_truth(list(records.sequences), kind)
    check_all_splits(model, records, objective(kind), truth, bound=BOUND.get(family, 1e-12))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", ["window", "sequence", "z"])
@pytest.mark.parametrize("family", FAMILIES)
def test_float32(family: str, kind: str) -> None:
    model, records = build_experts(family, torch.float32), ragged_records(7)
    found = []
    for sizes, padding in (([7], "right"), ([1], "none"), ([3, 2], "left")):
        samestep.backward(
            model,
            cut(model, records, sizes, padding),
            objective(kind).loss_fn,
            counters=ROUTER_COUNTERS,
        )
        found.append(gradients(model))
    assert max(worst(one, found[0]) for one in found[1:]) < 2e-6


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_window_is_transformers_loss_of_each_layer(family: str) -> None:
    """transformers pools the layers; of one layer its function is the same number and gradient."""
    model, records = build_experts(family), ragged_records(7)
    module = importlib.import_module(type(model).__module__)
    micro = collate_examples(list(records.sequences), padding="right")
    model.set_attn_implementation("sdpa")
    out = model.model(**samestep.model_inputs(micro), output_router_logits=True, use_cache=False)
    theirs = torch.stack(
        [
            module.load_balancing_loss_func((one.float(),), 6, K, micro["attention_mask"])
            for one in out.router_logits
        ]
    ).mean()
    theirs.backward()
    wanted = gradients(model)
    alone = RouterLosses(no_loss, balance="window", balance_weight=1.0)
    for sizes, padding in (([7], "right"), ([1], "none"), ([2, 3], "left")):
        found, _ = samestep.backward(model, cut(model, records, sizes, padding), TwoPass(alone))
        assert found == pytest.approx(theirs.item(), rel=1e-6)
        assert worst(gradients(model), wanted) < 1e-6


def no_loss(model: Any, micro: Any) -> Term:
    """Runs the model, and learns nothing of its logits."""
    return Term(0 * model(**samestep.model_inputs(micro)).logits.sum(), "token")


def test_wrong_ways_are_caught() -> None:
    """Balance of each micro-batch by itself, and balance that counts padding."""
    model, records = build_experts("mixtral"), ragged_records(7)
    truth = plain_truth(list(records.sequences), "window")
    model.zero_grad()
    truth(model).backward()
    wanted = gradients(model)
    right = objective("window").loss_fn

    def per_micro_batch(model: nn.Module, micro: Any) -> Any:
        terms = dict(right(model, micro))
        balance = terms["router_balance"]
        share = len(micro["example_ids"]) / len(records)
        terms["router_balance"] = Term(
            share * balance.value(balance.part), samestep.constant(1), balance.weight
        )
        return terms

    def with_padding(model: nn.Module, micro: Any) -> Any:
        full = {**micro, "attention_mask": torch.ones_like(micro["attention_mask"])}
        del full["spans"], full["target_positions"]
        losses = objective("window", lambda m, _: CausalLMLoss()(m, micro)).loss_fn
        return losses(model, full)

    for wrong in (per_micro_batch, TwoPass(with_padding)):
        samestep.backward(model, cut(model, records, [3, 1], "right"), wrong, check_sums=False)
        assert worst(gradients(model), wanted) > 1e-3


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_gradient_checkpointing(family: str) -> None:
    model, records = build_experts(family), ragged_records(7)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        loss = objective("window").loss_fn
        samestep.backward(model, cut(model, records, [2], "none"), loss, counters=ROUTER_COUNTERS)
        found.append(gradients(model))
    assert worst(found[1], found[0]) < BOUND.get(family, 1e-12)


@pytest.mark.parametrize("family", ["deepseek_v3", "minimax_m2"])
def test_biases_move_against_the_load_of_the_whole_batch(family: str) -> None:
    records = ragged_records(9)
    wanted = None
    for sizes, padding in (([9], "right"), ([1], "none"), ([4, 2], "left")):
        model = build_experts(family)
        bias = RouterBias(0.1)
        loss = objective("sequence", bias=bias)
        micros = cut(model, records, sizes, padding)
        for _ in range(2):  # as if every micro-batch ran twice: it counts once
            samestep.backward(model, micros, loss.loss_fn, counters=ROUTER_COUNTERS)
        bias.after_step(model, True)
        found = list(router_biases(model).values())
        if wanted is None:
            _, by_router = router_logits(build_experts(family), list(records.sequences))
            wanted = []
            for at, logits in enumerate(by_router):
                load = chosen_of(build_experts(family), at, torch.cat(logits)).sum(0)
                wanted.append(0.1 * (load.mean() - load).sign())
        for one, right in zip(found, wanted, strict=True):
            torch.testing.assert_close(one.double(), right.double())
            assert one.abs().max() > 0
        bias.after_step(model, True)  # nothing is left of the step before
        assert torch.equal(found[0], next(iter(router_biases(model).values())))


def test_biases_balance_the_load() -> None:
    model, records = build_experts("deepseek_v3", skew=2.0), ragged_records(9)
    bias, spread = RouterBias(0.02), []
    loss = objective("sequence", bias=bias).loss_fn
    for _ in range(15):
        samestep.backward(model, cut(model, records, [3], "none"), loss, counters=ROUTER_COUNTERS)
        load = sum(bias._loads.values())
        spread.append(float((load.max(1).values / load.mean(1)).mean()))
        bias.after_step(model, True)
    assert spread[-1] < 0.8 * spread[0], spread


def test_a_step_that_was_not_taken_moves_no_bias() -> None:
    model, records, bias = build_experts("deepseek_v3"), ragged_records(4), RouterBias(0.1)
    loss = objective("sequence", bias=bias).loss_fn
    samestep.backward(model, cut(model, records, [4], "none"), loss, counters=ROUTER_COUNTERS)
    bias.after_step(model, False)
    assert not any(one.any() for one in router_biases(model).values())


def test_sequences_without_targets_do_not_count() -> None:
    """They are not in the counts, so they may not be in the sums."""
    model, examples = build_experts("mixtral"), list(ragged_records(5).sequences)
    ids = torch.arange(2, 30)
    bare = [*examples, Example(ids, torch.full_like(ids, -100), row=99)]
    for kind in ("window", "sequence", "z"):
        found = []
        for batch in (examples, bare):
            model.set_attn_implementation("sdpa")
            micros = [
                collate_examples(batch[:3], padding="right"),
                collate_examples(batch[3:], padding="right"),
            ]
            loss, _ = samestep.backward(
                model, micros, objective(kind).loss_fn, counters=ROUTER_COUNTERS
            )
            found.append(loss)
        assert found[0] == pytest.approx(found[1], rel=1e-12)


def test_routers_that_see_only_some_tokens_are_refused() -> None:
    model, records = build_experts("mixtral"), ragged_records(2)
    micro = cut(model, records, [2], "right")[0]
    losses = RouterLosses(lambda m, b: CausalLMLoss()(m, b), balance="sequence")
    longer = {**micro, "input_ids": torch.zeros(2, 99).long()}
    with pytest.raises(ConfigError, match=r"saw \d+ tokens of a micro-batch of 198"):
        RouterLosses(lambda m, _: losses.loss_fn(m, micro), balance="sequence")(model, longer)
