"""Noise is measured at its size: sound models pass in every type, small leaks do not."""

from typing import Any

import pytest
import torch
from cases import V, build, cut, ragged
from experts import FAMILIES, build_experts
from torch import Tensor, nn
from transformers import AttentionInterface

import samestep
from samestep import Coupled, StepError, TwoPass
from samestep.errors import ConfigError
from samestep.kernels import packed_attention
from samestep.losses.router import routing_probabilities
from samestep.models import lm_head
from samestep.models.lm_head import UpToHead
from samestep.models.probes import choose_padding, cut_last_layer
from samestep.utils import agreement
from samestep.utils.agreement import (
    compare_in_one_precision,
    compare_outputs,
    compare_ways,
    perturb,
    rounding_noise,
)

TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LEAK = 1e-5


def made(name: str, dtype: torch.dtype) -> Any:
    """A tiny model, whose attention counts for as much as what it is added to."""
    if name in FAMILIES:
        return build_experts(name, dtype)
    model = build(name, dtype)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith(("v_proj.weight", "o_proj.weight")):
                weight *= 12
    return model


def leaking(share: float) -> Any:
    """Attention over packs in which each sequence gets a share of the one before it."""

    def attend(module: nn.Module, *states: Tensor, **options: Any) -> tuple[Tensor, None]:
        out, _ = packed_attention.packed_attention(module, *states, **options)  # type: ignore[arg-type]
        start = int(options["cu_seq_lens_q"][1])
        mixed = out.clone()
        mixed[:, start:] += share * out[:, :1]
        return mixed, None

    return attend


@pytest.fixture
def leak(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Registers a leaking attention until the test ends."""

    def register(share: float) -> None:
        AttentionInterface.register(packed_attention.NAME, leaking(share))
        monkeypatch.setattr(packed_attention, "register", lambda: None)

    yield register
    monkeypatch.undo()
    packed_attention.register()


@pytest.mark.sampled(4)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", *FAMILIES])
def test_sound_models_pass_in_every_type(name: str, dtype: torch.dtype) -> None:
    for padding in ("none", "right", "left"):
        assert choose_padding(made(name, dtype), padding) == padding


@pytest.mark.sampled(4)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("share", [LEAK, -1e-2])
def test_a_small_leak_is_refused_in_every_type(dtype: torch.dtype, share: float, leak: Any) -> None:
    model = made("llama", dtype)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    leak(0.0)
    assert choose_padding(model, "auto") == "none"
    leak(share)
    with pytest.raises(ConfigError, match="beside a neighbour"):
        choose_padding(model, "none")
    assert choose_padding(model, "auto") == "right"
    after = model.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert all(after[name].dtype == weight.dtype for name, weight in before.items())


def test_a_low_precision_alone_would_not_show_it(leak: Any) -> None:
    """What asking in float32 is for."""
    model, packs = made("llama", torch.bfloat16), cut(build("llama"), ragged(2), [2], "none")
    inputs = samestep.model_inputs(packs[0])

    def logits(share: float) -> list[Tensor]:
        leak(share)
        model.set_attn_implementation(packed_attention.NAME)
        return [model(**inputs).logits]

    assert compare_in_one_precision(lambda: logits(0.0), lambda: logits(LEAK)).holds
    assert not compare_in_one_precision(lambda: logits(0.0), lambda: logits(LEAK), wide=True).holds
    assert not compare_ways(lambda: logits(0.0), lambda: logits(LEAK)).holds


class Slightly(nn.Module):
    """An MLP that looks at the neighbours a little."""

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, states: Tensor) -> Tensor:
        out: Tensor = self.plain(states) + 1e-4 * states.cumsum(dim=-2)
        return out


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_cut_last_layer(dtype: torch.dtype) -> None:
    assert cut_last_layer(made("llama", dtype), "right")
    model = made("llama", dtype)
    model.model.layers[-1].mlp = Slightly(model.model.layers[-1].mlp)
    assert not cut_last_layer(model, "right")
    assert not lm_head.position_kwargs(model.get_output_embeddings(), torch.tensor([0]))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("change", ["nothing", "scale", "a little more"])
def test_the_logits_rule(dtype: torch.dtype, change: str) -> None:
    class Changed(type(build("llama"))):  # type: ignore[misc]
        def forward(self, **inputs: Any) -> Any:
            out = super().forward(**inputs)
            if change == "scale":
                out.logits = out.logits / 3
            elif change == "a little more":
                out.logits = out.logits + 1e-4 * out.logits.abs()
            return out

    model = build("llama", dtype)
    model.__class__ = Changed
    states = UpToHead()(model, cut(build("llama"), ragged(3), [3], "right")[0])
    if change == "a little more":
        assert states.rule is None
    else:
        assert states.rule is not None
        assert states.rule.scale == pytest.approx(1 / 3 if change == "scale" else 1, rel=1e-6)
    assert states.states.dtype == dtype


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_routers_rule(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 8, generator=draw, dtype=torch.float64).to(dtype)
    choices = logits.topk(2).indices
    for taken in (perturb(logits, draw), logits.float()):  # rounded on the way, or not in its type
        scores = taken.softmax(-1).gather(1, choices).to(dtype)
        found = routing_probabilities(logits, scores, choices)
        assert found is not None
        torch.testing.assert_close(found, logits.to(found.dtype).softmax(-1))
        assert routing_probabilities(logits, scores.square(), choices) is None


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_movement_is_one_rounding_at_most(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(1000, generator=draw, dtype=torch.float64).to(dtype)
    other, eps = perturb(values, draw), torch.finfo(dtype).eps
    assert other.dtype == dtype
    assert 0 < float(((other - values).double() / values.double()).abs().max()) <= 1.5 * eps
    limits = torch.tensor([torch.finfo(dtype).max, -torch.inf, 0.3], dtype=dtype)
    assert torch.equal(perturb(limits, draw)[:2], limits[:2])
    counts = torch.tensor([0, 1, 3], dtype=dtype)
    assert torch.equal(perturb(counts, draw), counts)


def test_noise_is_that_of_the_lowest_type_that_takes_part() -> None:
    values = torch.randn(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (pure,) = rounding_noise(lambda: [values.cos()])
    (mixed,) = rounding_noise(lambda: [values * values.float().cos()])
    assert 1e-17 < pure < 1e-15
    assert 1e-8 < mixed < 1e-6


def passes_differ_by(size: float, dtype: torch.dtype, draws: bool = False) -> None:
    """A step whose second pass gives a part off by a relative size."""
    torch.manual_seed(0)
    net, calls = nn.Linear(5, 4).to(dtype), []

    def loss(net: nn.Module, micro: dict[str, Tensor]) -> Coupled:
        calls.append(len(micro["x"]))
        second = len(calls) > 2
        change = torch.randn(4).to(dtype) if draws else torch.ones(4, dtype=dtype)
        return Coupled(net(micro["x"]) * (1 + size * second * change), torch.std, gather="rows")

    x = torch.randn(12, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    samestep.backward(net, [{"x": x[:7]}, {"x": x[7:]}], TwoPass(loss))


@pytest.mark.parametrize("dtype", TYPES[:3], ids=str)
def test_two_passes_may_round_differently_and_no_more(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    passes_differ_by(eps, dtype)
    for draws in (False, True):
        with pytest.raises(StepError, match="the second pass gave another statistic"):
            passes_differ_by(300 * eps if dtype != torch.bfloat16 else 1.0, dtype, draws)


def test_measuring_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    model = made("llama", torch.bfloat16)
    torch.manual_seed(5)
    assert choose_padding(model, "auto") == "none"
    assert cut_last_layer(model, "none")
    compare_ways(lambda: [torch.ones(V).cos()], lambda: [torch.ones(V).cos()])
    assert torch.equal(torch.rand(3), wanted)


def test_casts_of_weights_are_not_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way rounds them alike; autocast makes one of each weight in each run."""
    layer, states = nn.Linear(6, 5), torch.randn(3, 6)
    shapes = []

    def noted(tensor: Tensor, *more: Any) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return perturb(tensor, *more)

    def outputs() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return [layer(states)]

    monkeypatch.setattr(agreement, "perturb", noted)
    (noise,) = rounding_noise(outputs)
    assert noise > 2**-9
    assert set(shapes) == {(3, 6), (3, 5)}


def test_outputs_are_compared_one_by_one_in_as_many_runs() -> None:
    runs = []

    def ways(leak: float) -> list[Tensor]:
        runs.append(leak)
        values = torch.arange(1, 9).to(torch.bfloat16).cos()
        return [values, values + leak]

    alike, leaking = compare_outputs(lambda: ways(0.0), lambda: ways(1.0))
    assert alike.holds
    assert not leaking.holds
    assert len(runs) == 8, "a base, two draws, and the other way; and the same in float32"
