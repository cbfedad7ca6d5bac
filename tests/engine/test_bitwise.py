"""The same bits: any ranks, dealing, order of packs and restarts; and mutants that must show."""

import functools
from collections.abc import Iterator
from typing import Any

import bit_runs
import pytest
import torch
from bit_mutants import MUTANTS, shows
from bit_runs import Draw, coupled, plain_loss, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import samestep
from samestep.engine import bitwise as bitwise_module
from samestep.errors import ConfigError, StepError

DRAWS = st.builds(
    Draw,
    ranks=st.tuples(*[st.sampled_from([1, 2, 4])] * bit_runs.STEPS),
    seed=st.integers(0, 10**6),
    restarts=st.frozensets(st.just(1)),
    lost=st.integers(0, 1),
)
SOME = [
    Draw((2, 2), seed=1),
    Draw((4, 1), seed=2, restarts=frozenset({1})),
    Draw((4, 4), seed=3),
]
"""Worlds that show every mutant."""


@functools.cache
def unbroken(loss_fn: Any, data: int = 0) -> Any:
    return run(Draw(), loss_fn=loss_fn, data=data)


@pytest.fixture(autouse=True)
def restore_determinism() -> Iterator[None]:
    """Threads switch PyTorch's flag on and off for each other."""
    yield
    torch.use_deterministic_algorithms(False)


@settings(max_examples=30)
@given(DRAWS, st.integers(0, 2))
def test_the_same_bits_whatever_the_ranks(draw: Draw, data: int) -> None:
    assert run(draw, data=data) == unbroken(plain_loss, data)


@settings(max_examples=25)
@given(DRAWS, st.integers(0, 2))
def test_the_same_bits_of_terms_that_couple_the_batch(draw: Draw, data: int) -> None:
    assert run(draw, loss_fn=coupled, data=data) == unbroken(coupled, data)


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS.keys())
def test_mutants_show(mutant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is caught by the comparison that the drawn worlds pass."""
    mutant(monkeypatch)
    alone = run(Draw())
    assert any(shows(draw, alone) for draw in SOME)


def step(loss_fn: Any, bitwise: samestep.Bitwise, model: nn.Module, **options: Any) -> Any:
    packs = bit_runs.packs(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return samestep.step(
        model, optimizer, packs, loss_fn, bitwise=bitwise, check_sums=False, **options
    )


def test_a_grid_that_does_not_fit_is_left_and_the_step_taken_again() -> None:
    """Too small, too large or none: the step is that of the grid which its own elements give."""
    found = []
    for shift in (None, 0, -15, +15):
        torch.manual_seed(0)
        model, bitwise = bit_runs.TwoLayers(), samestep.Bitwise()
        if shift is not None:
            state = {name: e + shift for name, e in found[0][2]["exponents"].items()}
            bitwise.load_state_dict({"exponents": state})
        report = step(plain_loss, bitwise, model)
        found.append((bitwise.digest, report.grad_norm, bitwise.state_dict(), bitwise.retaken))
    assert [retaken for *_, retaken in found] == [1, 0, 1, 1]
    assert len({(digest, norm) for digest, norm, *_ in found}) == 1


def test_the_sum_is_no_worse_than_that_of_floats() -> None:
    """Against float64 sums of the same micro-batches' gradients, weight by weight."""
    torch.manual_seed(0)
    model = bit_runs.TwoLayers().float()
    packs = [pack for number in range(12) for pack in bit_runs.packs(number)]
    tokens = [float(samestep.target_weights(pack, "token").sum()) for pack in packs]
    wanted = [torch.zeros_like(weight, dtype=torch.float64) for weight in model.parameters()]
    for pack, number in zip(packs, tokens, strict=True):
        samestep.backward(model, [pack], plain_loss, check_sums=False)
        for weight, exact in zip(model.parameters(), wanted, strict=True):
            if weight.grad is not None:
                exact += weight.grad.double() * number / sum(tokens)

    def errors(bitwise: samestep.Bitwise | None) -> list[float]:
        before = [weight.detach().clone() for weight in model.parameters()]
        seen: list[Tensor] = []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        optimizer.register_step_pre_hook(
            lambda *_: seen.extend(weight.grad.clone() for weight in model.parameters())
        )
        samestep.step(model, optimizer, packs, plain_loss, check_sums=False, bitwise=bitwise)
        assert all(map(torch.equal, before, model.parameters()))
        return [
            float((g.double() - w).norm() / w.norm()) for g, w in zip(seen, wanted, strict=True)
        ]

    on_grid, as_floats = errors(samestep.Bitwise()), errors(None)
    for grid, floats in zip(on_grid, as_floats, strict=True):
        assert grid <= 1.1 * floats


def test_what_is_drawn_anew_is_found_by_running_a_pack_twice() -> None:
    def noisy(model: nn.Module, pack: Any) -> samestep.Term:
        total = plain_loss(model, pack)["nll"].total.sum()
        return samestep.Term(total * (1 + 1e-3 * torch.rand(())), unit="sequence")

    with pytest.raises(StepError, match=r"another result the second time, for .*embed\.weight"):
        step(noisy, samestep.Bitwise(), bit_runs.TwoLayers())


def test_a_gradient_that_is_not_finite_is_named_and_leaves_the_grid() -> None:
    def broken(model: nn.Module, pack: Any) -> samestep.Term:
        total = plain_loss(model, pack)["nll"].total.sum()
        return samestep.Term(total + (model.inner.bias * 0).sqrt().sum(), unit="sequence")

    model, bitwise = bit_runs.TwoLayers(), samestep.Bitwise()
    step(plain_loss, bitwise, model)
    before = bitwise.state_dict()
    with pytest.raises(samestep.NotFiniteError, match=r"inner\.bias"):
        step(broken, bitwise, model)
    assert bitwise.state_dict()["exponents"]["inner.bias"] == before["exponents"]["inner.bias"]


def test_what_has_no_bits_to_keep_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"embed\.weight is float64"):
        step(plain_loss, samestep.Bitwise(), bit_runs.TwoLayers().double())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with pytest.raises(ConfigError, match="gradient scaler"):
        step(plain_loss, samestep.Bitwise(), bit_runs.TwoLayers(), scaler=scaler)

    def unrepeatable(model: nn.Module, pack: Any) -> Any:
        raise RuntimeError("put_ does not have a deterministic implementation, but you set ...")

    with pytest.raises(ConfigError, match="put_ does not have a deterministic"):
        step(unrepeatable, samestep.Bitwise(), bit_runs.TwoLayers())
    monkeypatch.setattr(bitwise_module, "is_sharded", lambda model: True)
    with pytest.raises(ConfigError, match="FSDP2 sums gradients by itself"):
        step(plain_loss, samestep.Bitwise(), bit_runs.TwoLayers())
