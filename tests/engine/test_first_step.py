"""The trial before a first step: what is no sum over examples is refused, sound losses are not."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import build, cut, ragged
from torch import Tensor, nn
from torch.nn import functional as F

import samestep
from samestep.engine.terms import Coupled, Term
from samestep.engine.two_pass import TwoPass
from samestep.errors import ConfigError, SamestepError, StepError

ROWS, LABELS = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 3
PACK = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
PADDINGS: list[Any] = ["right", "left", "none"]


def mlp(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), *layers, nn.Linear(8, 3))


def rows(*sizes: int) -> list[dict[str, Tensor]]:
    x, y = ROWS.split(sizes), LABELS.split(sizes)
    return [{"x": one, "labels": other} for one, other in zip(x, y, strict=True)]


def summed(model: nn.Module, batch: dict[str, Tensor]) -> Term:
    return Term(F.cross_entropy(model(batch["x"]), batch["labels"], reduction="sum"), "example")


def averaged(model: nn.Module, batch: dict[str, Tensor]) -> Term:
    return Term(F.cross_entropy(model(batch["x"]), batch["labels"]), "example")


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def step(model: nn.Module, batch: Any, loss_fn: Any, **options: Any) -> Any:
    return samestep.step(model, sgd(model), batch, loss_fn, **options)


WAYS: list[Callable[..., Any]] = [step, samestep.backward, samestep.evaluate]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sizes", [(9,), (4, 5), (1, 8), (1,) * 9], ids=str)
def test_a_mean_is_refused_and_named(way: Callable[..., Any], sizes: tuple[int, ...]) -> None:
    model = mlp()
    before = [weight.detach().clone() for weight in model.parameters()]
    with pytest.raises(StepError, match=r"term 'loss' is no sum.*a mean over.*reduction='sum'"):
        way(model, rows(*sizes), averaged)
    assert all(torch.equal(w, b) for w, b in zip(model.parameters(), before, strict=True))
    assert all(weight.grad is None for weight in model.parameters())
    way(model, rows(*sizes), averaged, check_sums=False)
    way(model, rows(*sizes), summed)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_language_models_own_mean(padding: Any, dtype: torch.dtype) -> None:
    model = build("llama", dtype)
    micro_batches = cut(model, ragged(8), [8], padding)

    def own_mean(model: Any, micro_batch: dict[str, Tensor]) -> Term:
        names = ("input_ids", "labels", "attention_mask", "position_ids", *PACK)
        return Term(model(**{n: micro_batch[n] for n in names if n in micro_batch}).loss)

    with pytest.raises(StepError, match="a mean over"):
        samestep.backward(model, micro_batches, own_mean)
    samestep.backward(model, micro_batches, samestep.CausalLMLoss())


def test_a_tuple_of_tensors_and_a_tensor_are_cut_too() -> None:
    counters = {"row": lambda batch: len(batch[0]) if isinstance(batch, tuple) else len(batch)}
    for batch in [(ROWS, LABELS), ROWS]:
        for reduce, sound in ((torch.sum, True), (torch.mean, False)):

            def loss_fn(model: nn.Module, batch: Any, reduce: Any = reduce) -> Term:
                out = model(batch[0] if isinstance(batch, tuple) else batch)
                return Term(reduce(out.square()), "row")

            if sound:
                samestep.backward(mlp(), [batch], loss_fn, counters=counters)
            else:
                with pytest.raises(StepError, match="a mean over"):
                    samestep.backward(mlp(), [batch], loss_fn, counters=counters)


def test_a_metric_that_is_a_mean_and_one_that_is_a_sum() -> None:
    def with_metric(kind: Callable[[Tensor], Tensor]) -> Any:
        def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Term]:
            right = (model(batch["x"]).detach().argmax(1) == batch["labels"]).float()
            return {"nll": summed(model, batch), "right": Term(kind(right), "example", weight=0.0)}

        return loss_fn

    with pytest.raises(StepError, match="term 'right' is no sum"):
        samestep.backward(mlp(), rows(9), with_metric(lambda right: right.mean() + 0.5))
    samestep.backward(mlp(), rows(9), with_metric(torch.sum))


def test_a_term_that_couples_its_examples_is_refused_and_a_coupled_one_is_not() -> None:
    def contrast(out: Tensor) -> Tensor:
        return -torch.diagonal((out @ out.T).log_softmax(1)).mean()

    with pytest.raises(StepError, match=r"couples its examples.*samestep\.Coupled"):
        samestep.backward(
            mlp(), rows(9), lambda m, b: Term(contrast(m(b["x"])) * len(b["x"]), "example")
        )
    coupled = TwoPass(lambda m, b: Coupled(m(b["x"]), contrast, gather="rows"))
    samestep.backward(mlp(), rows(9), coupled)


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.AlphaDropout(0.3)], ids=repr)
def test_dropout_hides_no_mean_and_makes_no_false_alarm(layer: nn.Module) -> None:
    model = mlp(layer)
    samestep.backward(model, rows(9), summed)
    assert model.training
    with pytest.raises(StepError, match="a mean over"):
        samestep.backward(model, rows(9), averaged)


def test_noise_of_the_loss_itself_is_said_to_be_the_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def noisy(model: nn.Module, batch: dict[str, Tensor]) -> Term:
        out = model(batch["x"] + torch.randn_like(batch["x"]))
        return Term(F.cross_entropy(out, batch["labels"], reduction="sum"), "example")

    model = mlp()
    with caplog.at_level(logging.INFO, "samestep"):
        for _ in range(2):
            samestep.backward(model, rows(9), noisy)
    assert caplog.text.count("was not checked: the loss or the model draws random numbers") == 1


def test_nothing_of_a_sound_run_changes() -> None:
    """The trial moves no generator, no gradient and no buffer: the same step to the bit."""
    found = []
    for check_sums in (True, False):
        model = mlp(nn.Dropout(0.5))
        torch.manual_seed(3)
        loss, _ = samestep.backward(model, rows(4, 5), summed, check_sums=check_sums)
        found.append([torch.tensor(loss), *(weight.grad for weight in model.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_it_is_done_once_for_a_model_and_a_loss() -> None:
    model, calls = mlp(), []

    def made_anew() -> Any:
        def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Term:
            calls.append(len(batch["x"]))
            return summed(model, batch)

        return loss_fn

    for _ in range(3):
        samestep.backward(model, rows(4, 5), made_anew())
    assert calls == [4, 2, 2, *[4, 5] * 3]


def test_rows_that_are_no_examples_are_not_refused(caplog: pytest.LogCaptureFixture) -> None:
    """Chosen rows above rejected ones: rows are cut where pairs are not."""

    def pairs(model: nn.Module, batch: Tensor) -> Term:
        chosen, rejected = model(batch).sum(1).chunk(2)
        return Term(F.softplus(rejected - chosen).sum(), "pair")

    counters = {"pair": lambda batch: len(batch) // 2}
    with caplog.at_level(logging.WARNING, "samestep"):
        samestep.backward(mlp(), [ROWS[:8]], pairs, counters=counters)
    assert "If its rows are no examples by themselves, all is well" in caplog.text


class Running(nn.Module):
    """Running statistics without the name of BatchNorm; or a sum over examples in their place."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, states: Tensor) -> Tensor:
        if self.training and self.kind == "running mean":
            self.seen.lerp_(states.detach().mean(0), 0.1)
        elif self.training and self.kind == "replaced":
            self.seen = 0.9 * self.seen + 0.1 * states.detach().mean(0)
        elif self.training:
            self.seen += states.detach().square().sum(0)
        return states


@pytest.mark.parametrize("kind", ["running mean", "replaced"])
@pytest.mark.parametrize("sizes", [(9,), (2, 7)], ids=str)
def test_running_statistics_are_found_by_what_they_do(kind: str, sizes: tuple[int, ...]) -> None:
    model = mlp(Running(kind))
    with pytest.raises(StepError, match=r"changes the buffer '1\.seen'.*depend on how it is split"):
        step(model, rows(*sizes), summed)
    assert torch.equal(model[1].seen, torch.zeros(8))
    model[1].eval()
    step(model, rows(*sizes), summed)


def test_sums_in_buffers_are_sound() -> None:
    step(mlp(Running("sum")), rows(4, 5), summed)


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(8),
        nn.SyncBatchNorm(8),
        nn.BatchNorm1d(8, track_running_stats=False),
        nn.BatchNorm1d(8, track_running_stats=False).eval(),
    ],
    ids=repr,
)
def test_batch_norm_is_refused(layer: nn.Module) -> None:
    model, before = mlp(layer), layer.state_dict()
    layer_was = {name: value.clone() for name, value in before.items()}
    with pytest.raises(ConfigError, match=r"BatchNorm\w* '1'.*GroupNorm or LayerNorm"):
        step(model, rows(4, 5), summed)
    assert all(torch.equal(layer.state_dict()[name], was) for name, was in layer_was.items())


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(8).eval(),
        nn.LayerNorm(8),
        nn.GroupNorm(2, 8),
        nn.RMSNorm(8),
        nn.Sequential(nn.Unflatten(1, (2, 4)), nn.InstanceNorm1d(2), nn.Flatten()),
    ],
    ids=repr,
)
def test_norms_of_each_example_and_frozen_ones_are_sound(layer: nn.Module) -> None:
    found = []
    for sizes in ((9,), (3, 3, 3), (2, 7)):
        model = mlp(layer).double()
        batch = [{**micro, "x": micro["x"].double()} for micro in rows(*sizes)]
        found.append(samestep.backward(model, batch, summed)[0])
    assert found == pytest.approx([found[0]] * 3, rel=1e-12)
    layer.float()


def test_a_batch_norm_evaluates_by_its_running_statistics() -> None:
    model = mlp(nn.BatchNorm1d(8))
    losses = [samestep.evaluate(model, rows(*sizes), summed).loss for sizes in ((9,), (4, 5))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_terms_keep_their_gradient_under_autocast() -> None:
    """Casts that the trial made without a graph must not be used again by the step."""
    model = mlp()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step(model, rows(9), lambda m, b: Term(summed(m, b).total.float(), "example"))


def test_tied_weights_and_an_eval_model_with_gradients() -> None:
    model = build("llama-tied", torch.float32).eval()
    micro_batches = cut(model, ragged(8), [3, 5], "none")
    assert step(model, micro_batches, samestep.CausalLMLoss()).grad_norm > 0


def test_all_errors_are_samesteps_own() -> None:
    with pytest.raises(SamestepError):
        step(mlp(nn.BatchNorm1d(8)), rows(9), averaged)
