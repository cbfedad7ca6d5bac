"""What a loop holds outside of its model: every run begins where the first one did."""

from argparse import Namespace
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trainers import causal, factory, rows

from samestep.audit.adapters.held import HeldState
from samestep.audit.check import CheckReport, check

STEPS = 0
HISTORY: list[float] = []


class RunningScale:
    """A loss of a file's own: errors over their running size."""

    def __init__(self) -> None:
        self.size = torch.ones((), dtype=torch.float64)
        self.seen: dict[str, int] = {}

    def follow(self, errors: Tensor) -> None:
        self.size = self.size.lerp(errors.detach().abs().mean(), 0.3)
        self.seen["times"] = self.seen.get("times", 0) + 1


scale = RunningScale()


class Reader(nn.Module):
    """Rows of numbers, one after another; the last state is kept if it is asked to."""

    carries = False

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(3, 5, batch_first=True)
        self.head = nn.Linear(5, 1)
        self.state: Tensor | None = None

    def forward(self, spans: Tensor) -> Tensor:
        start = None if self.state is None else self.state.expand(1, len(spans), -1).contiguous()
        states, last = self.cell(spans, start)
        if self.carries:
            self.state = last.detach().mean(1, keepdim=True)
        return self.head(states)[..., 0]


class Carries(Reader):
    carries = True


def spans(number: int = 8) -> list[Tensor]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randn(5, 4, generator=draw) for _ in range(number)]


def loop(step: Callable[..., Any], model: type[nn.Module] = Reader) -> dict[str, Any]:
    return {"model": model, "examples": spans(), "collate": torch.stack, "step": step}


def errors(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch[..., :3]) - batch[..., 3]


def plain(model: nn.Module, micros: list[Tensor]) -> None:
    for micro in micros:
        (errors(model, micro).square().sum() / sum(map(len, micros))).backward()


def warms_up(model: nn.Module, micros: list[Tensor]) -> float:
    """Sound: the weight of the penalty grows with the steps, which are counted by the file."""
    global STEPS
    STEPS += 1
    total = 0.0
    for micro in micros:
        own = errors(model, micro)
        loss = (own.square().sum() + STEPS / 10 * own.abs().sum()) / sum(map(len, micros))
        loss.backward()
        total += loss.item()
    HISTORY.append(total)
    return total


def scaled_once(model: nn.Module, micros: list[Tensor]) -> None:
    """Sound: the running size moves after the step, by all that the step saw."""
    seen = []
    for micro in micros:
        own = errors(model, micro)
        ((own / scale.size).square().sum() / sum(map(len, micros))).backward()
        seen.append(own.detach())
    scale.follow(torch.cat(seen))


def scaled_each_time(model: nn.Module, micros: list[Tensor]) -> None:
    for micro in micros:
        own = errors(model, micro)
        ((own / scale.size).square().sum() / sum(map(len, micros))).backward()
        scale.follow(own)


def noisy(model: nn.Module, micros: list[Tensor]) -> None:
    """The noise of a generator that the step makes and seeds, which no other seed reaches."""
    own = torch.Generator().manual_seed(7)
    for micro in micros:
        noise = torch.randn(micro.shape, generator=own, dtype=micro.dtype)
        (errors(model, micro + noise).square().sum() / sum(map(len, micros))).backward()


def found(subject: Any, *axes: str) -> dict[str, str]:
    report: CheckReport = check(subject, axes)
    return {axis.name: axis.cause or axis.verdict for axis in report.axes}


@pytest.mark.parametrize("step", [warms_up, scaled_once])
def test_a_loop_may_keep_its_own_account_of_steps(step: Callable[..., Any]) -> None:
    axes = ("micro-batch", "order", "next-step")
    assert found(loop(step), *axes) == dict.fromkeys(axes, "exact")


@pytest.mark.parametrize(
    ("step", "model"), [(scaled_each_time, Reader), (plain, Carries)], ids=["loss", "hidden state"]
)
def test_what_is_no_buffer_moves_too(step: Callable[..., Any], model: type[nn.Module]) -> None:
    axes = ("micro-batch", "order")
    assert found(loop(step, model), *axes) == dict.fromkeys(axes, "state-per-micro-batch")


def test_numbers_of_a_generator_of_its_own_are_random() -> None:
    axes = ("micro-batch", "order")
    assert found(loop(noisy), *axes) == dict.fromkeys(axes, "rng")


def test_a_baseline_of_the_model_is_no_misaligned_value() -> None:
    def step(model: Any, micros: list[Tensor]) -> None:
        for micro in micros:
            values = micro[:, 0, 3]
            scores = model(micro[..., :3]).sum(1)
            ((values - model.baseline) * scores / sum(map(len, micros))).sum().backward()
            model.baseline = 0.8 * model.baseline + 0.2 * float(values.mean())

    class Scores(Reader):
        baseline = 0.5

    axes = ("micro-batch", "order")
    assert found(loop(step, Scores), *axes) == dict.fromkeys(axes, "state-per-micro-batch")


def test_a_trainer_may_keep_its_own_account_of_steps() -> None:
    taken = [0]

    def summed(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        losses = nn.functional.cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
        return losses * (1 + taken[0]) / num_items_in_batch

    def make_trainer(**sizes: Any) -> Any:
        taken[0] += 1
        made = factory(model=causal, data=rows(), compute_loss_func=summed)
        return made(**sizes)

    assert found(make_trainer, "micro-batch") == {"micro-batch": "exact"}


def test_put_back() -> None:
    count, log, own = 3, [1.0], RunningScale()
    options, sums, recent = Namespace(step=0), defaultdict(int), deque([1, 2], maxlen=2)

    def counts() -> None:
        nonlocal count
        count += 1
        log.append(2.0)
        own.follow(torch.full((2,), 3.0, dtype=torch.float64))
        own.extra = 1  # type: ignore[attr-defined]
        options.step += 1
        sums["steps"] += 1
        recent.append(3)

    held = HeldState([counts])
    same = log
    counts()
    assert (count, log, own.seen) == (4, [1.0, 2.0], {"times": 1})
    held.put_back()
    assert (count, log, own.seen) == (3, [1.0], {})
    assert same is log
    assert (options.step, dict(sums), list(recent), recent.maxlen) == (0, {}, [1, 2], 2)
    assert own.size == 1
    assert not hasattr(scale, "extra")
