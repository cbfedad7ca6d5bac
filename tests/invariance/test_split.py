"""The central proof: no split changes the gradient, the weights or the loss."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import build, cut, gradients, plain_objective, ragged, worst
from torch import nn

import samestep
from samestep.engine.counts import count_units
from samestep.engine.terms import Term

MODELS = ["llama", "llama-tied", "qwen2", "gpt2"]
SPLITS = [
    pytest.param([size], padding, id=f"{size}-{padding}")
    for size in (1, 2, 4, 8, 32)
    for padding in ("none", "right", "left")
] + [pytest.param([3, 1, 7, 2], "none", id="ragged"), pytest.param([5, 11], "left", id="ragged-l")]


def reference(model: Any, examples: list[Any], **options: Any) -> tuple[float, dict[str, Any]]:
    model.zero_grad()
    objective = plain_objective(model, examples, **options)
    objective.backward()
    return float(objective.detach()), gradients(model)


@pytest.fixture(scope="module")
def truths() -> dict[str, Any]:
    return {name: reference(build(name), ragged(32)) for name in MODELS}


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("sizes", "padding"), SPLITS)
@pytest.mark.parametrize("name", MODELS)
def test_float64(truths: dict[str, Any], name: str, sizes: list[int], padding: Any) -> None:
    model = build(name)
    loss, _ = samestep.backward(
        model, cut(model, ragged(32), sizes, padding), samestep.CausalLMLoss()
    )
    assert loss == pytest.approx(truths[name][0], rel=1e-12)
    assert worst(gradients(model), truths[name][1]) < 1e-12


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("sizes", "padding"), SPLITS)
@pytest.mark.parametrize("name", MODELS)
def test_float32(truths: dict[str, Any], name: str, sizes: list[int], padding: Any) -> None:
    model = build(name, torch.float32)
    samestep.backward(model, cut(model, ragged(32), sizes, padding), samestep.CausalLMLoss())
    assert worst(gradients(model), truths[name][1]) < 2e-6


@pytest.mark.sampled(4)
@pytest.mark.parametrize("normalize", ["token", "sequence", 50.0])
@pytest.mark.parametrize("terms", [{}, {"smoothing": 0.1}, {"z_loss": 0.01}], ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("name", MODELS)
def test_normalisations_and_terms(
    name: str, normalize: Any, terms: dict[str, float], weighted: bool
) -> None:
    model, examples = build(name), ragged(12, weighted=weighted)
    loss, expected = reference(model, examples, normalize=normalize, **terms)
    unit = samestep.constant(normalize) if isinstance(normalize, float) else normalize
    loss_fn = samestep.CausalLMLoss(
        normalize=unit,
        label_smoothing=terms.get("smoothing", 0.0),
        z_loss=terms.get("z_loss", 0.0),
    )
    for sizes, padding in (([12], "none"), ([1], "right"), ([5, 2], "left")):
        actual, _ = samestep.backward(model, cut(model, examples, sizes, padding), loss_fn)
        assert actual == pytest.approx(loss, rel=1e-12)
        assert worst(gradients(model), expected) < 1e-12


@pytest.mark.parametrize("normalize", ["token", "sequence", 50.0])
def test_weights_of_tokens(normalize: Any) -> None:
    model, examples = build("llama"), ragged(12, weighted=True, by_token=True)
    loss, expected = reference(model, examples, normalize=normalize)
    unit = samestep.constant(normalize) if isinstance(normalize, float) else normalize
    loss_fn = samestep.CausalLMLoss(normalize=unit)
    for sizes, padding in (([12], "none"), ([1], "right"), ([5, 2], "left")):
        actual, _ = samestep.backward(model, cut(model, examples, sizes, padding), loss_fn)
        assert actual == pytest.approx(loss, rel=1e-12)
        assert worst(gradients(model), expected) < 1e-12
    plain = [replace(one, token_weights=None) for one in examples]
    samestep.backward(model, cut(model, plain, [12], "none"), loss_fn)
    assert worst(gradients(model), expected) > 1e-2


@pytest.mark.parametrize("name", MODELS)
def test_any_order_of_examples(name: str) -> None:
    model, examples = build(name), ragged(12)
    _, expected = reference(model, examples)
    turned = [examples[at] for at in torch.randperm(12).tolist()]
    samestep.backward(model, cut(model, turned, [3, 4], "none"), samestep.CausalLMLoss())
    assert worst(gradients(model), expected) < 1e-12


@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing(name: str) -> None:
    model, examples = build(name), ragged(12)
    _, expected = reference(model, examples)
    model.activation_checkpointing_enable({"use_reentrant": False})
    for sizes, padding in (([5], "none"), ([1], "right")):
        samestep.backward(model, cut(model, examples, sizes, padding), samestep.CausalLMLoss())
        assert worst(gradients(model), expected) < 1e-12


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", "all-linear"),
        ("llama", ["q_proj", "lm_head"]),
        ("qwen2", ["q_proj", "v_proj"]),
        ("gpt2", ["c_attn"]),
    ],
    ids=str,
)
def test_lora(name: str, targets: Any) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4, target_modules=targets, init_lora_weights=False, fan_in_fan_out=name == "gpt2"
    )
    model = get_peft_model(build(name), config).double()
    examples = ragged(12)
    _, expected = reference(model, examples)
    for sizes, padding in (([12], "none"), ([1], "right"), ([5, 2], "left")):
        samestep.backward(model, cut(model, examples, sizes, padding), samestep.CausalLMLoss())
        assert worst(gradients(model), expected) < 1e-12


def three_steps(name: str, sizes: list[int], padding: Any, *, dtype: torch.dtype) -> dict[str, Any]:
    model = build(name, dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for start, end in ((0, 32), (32, 64), (64, 69)):  # the last window is short
        micro_batches = cut(model, ragged(69)[start:end], sizes, padding)
        samestep.step(model, optimizer, micro_batches, samestep.CausalLMLoss(), max_grad_norm=0.5)
    return {key: weight.detach().clone() for key, weight in model.named_parameters()}


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("name", MODELS)
def test_weights_after_three_steps(name: str, dtype: torch.dtype, bound: float) -> None:
    expected = three_steps(name, [32], "right", dtype=dtype)
    for sizes, padding in (
        ([1], "none"), ([2], "right"), ([4], "left"), ([8], "none"), ([3, 1, 7], "left"),
    ):  # fmt: skip
        assert worst(three_steps(name, sizes, padding, dtype=dtype), expected) < bound


def test_the_weights_test_catches_mean_of_means() -> None:
    """Through the same three steps; a wrong division must show in the weights."""
    model = build("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for start, end in ((0, 32), (32, 64), (64, 69)):
        samestep.step(
            model,
            optimizer,
            cut(model, ragged(69)[start:end], [4], "right"),
            wrong_loss("mean-of-means"),
            counters={"micro-batch": lambda _: 1},
            max_grad_norm=0.5,
        )
    actual = {key: weight.detach() for key, weight in model.named_parameters()}
    assert worst(actual, three_steps("llama", [32], "right", dtype=torch.float64)) > 1e-4


def wrong_loss(kind: str) -> Any:
    loss = samestep.CausalLMLoss()

    def mean_of_means(model: nn.Module, micro_batch: Any) -> Term:
        own = max(count_units([micro_batch])["token"], 1)
        return Term(loss(model, micro_batch)["nll"].total / own, "micro-batch")

    def unscaled(model: nn.Module, micro_batch: Any) -> Term:
        own = max(count_units([micro_batch])["token"], 1)
        return Term(loss(model, micro_batch)["nll"].total / own, samestep.constant(1))

    def unshifted(model: nn.Module, micro_batch: Any) -> Term:
        return Term(loss(model, micro_batch)["nll"].total, "label")

    return {"mean-of-means": mean_of_means, "unscaled": unscaled, "unshifted": unshifted}[kind]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["mean-of-means", "unscaled", "unshifted"])
def test_the_test_catches_wrong_steps(name: str, kind: str) -> None:
    model, examples = build(name), ragged(12)
    _, expected = reference(model, examples)
    micro_batches = cut(model, examples, [3], "right")
    counters = {
        "micro-batch": lambda _: 1,
        "label": lambda micro_batch: float((micro_batch["labels"] != -100).sum()),
    }
    samestep.backward(model, micro_batches, wrong_loss(kind), counters=counters)
    with pytest.raises(AssertionError):
        assert worst(gradients(model), expected) < 1e-2


def test_the_evaluation_batch_size_changes_nothing() -> None:
    model, examples = build("qwen2").float(), ragged(70)
    loss = samestep.CausalLMLoss()
    actual = [
        samestep.evaluate(model, cut(model, examples, sizes, padding), loss)
        for sizes, padding in (([1], "right"), ([7], "right"), ([64], "left"), ([70], "none"))
    ]
    for report in actual[1:]:
        assert report.loss == pytest.approx(actual[0].loss, rel=1e-6)
        assert report.terms["accuracy"] == pytest.approx(actual[0].terms["accuracy"], rel=1e-6)
        assert report.counts == actual[0].counts
    assert model.training


def test_low_precision_weights_add_up_in_float32() -> None:
    """The error against float64 must not grow with accumulation; a plain bfloat16 sum's does."""
    examples = ragged(32)
    truth = build("llama").bfloat16().double()
    low = copy.deepcopy(truth).bfloat16()
    _, expected = reference(truth, examples)

    def error(sizes: list[int]) -> float:
        samestep.backward(low, cut(low, examples, sizes, "right"), samestep.CausalLMLoss())
        return worst(gradients(low), expected)

    def naive_error() -> float:
        low.zero_grad()
        loss, micro_batches = samestep.CausalLMLoss(), cut(low, examples, [1], "right")
        for micro_batch in micro_batches:
            (loss(low, micro_batch)["nll"].total / count_units(micro_batches)["token"]).backward()
        return worst(gradients(low), expected)

    whole, split, naive = error([32]), error([1]), naive_error()
    assert split < 1.5 * whole
    assert naive > split
