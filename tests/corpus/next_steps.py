"""Loops whose first step is exact: what they keep shows in the step after it."""

from typing import Any

import torch
from kit import Case, Tiny, nll, rows, targets, tokens
from torch import Tensor, nn
from trainer_subclasses import over_items
from trainer_subclasses import rows as trainer_rows
from trainers import factory
from transformers import Trainer

AXES = ("micro-batch", "next-step")


class Kept:
    """A loop as an object: its model, its optimizer, and what else it keeps between steps."""

    optimizer_of = torch.optim.SGD

    def __init__(self, seed: int) -> None:
        self.examples = rows(seed)

    def model(self) -> nn.Module:
        self.network = Tiny()
        self.optimizer = self.optimizer_of(self.network.parameters(), lr=0.05)
        self.seen = 0
        return self.network

    def collate(self, examples: list[Tensor]) -> dict[str, Tensor]:
        pad = nn.utils.rnn.pad_sequence
        labels = pad(examples, batch_first=True, padding_value=-100)
        return {"input_ids": pad(examples, batch_first=True), "labels": labels}

    def loss(self, model: nn.Module, micro: Any, micros: list[Any]) -> Tensor:
        return nll(model, micro) / targets(micros)

    def train(self, model: nn.Module, micro_batches: list[Any]) -> None:
        self.optimizer.zero_grad()
        for micro in micro_batches:
            self.loss(model, micro, micro_batches).backward()
        self.optimizer.step()
        self.after(micro_batches)

    def after(self, micro_batches: list[Any]) -> None:
        """What happens after the update."""


class Adam(Kept):
    optimizer_of = torch.optim.AdamW


class RateByMicroBatches(Kept):
    """The rate of the next step falls with the micro-batches so far."""

    def after(self, micro_batches: list[Any]) -> None:
        self.seen += len(micro_batches)

    def train(self, model: nn.Module, micro_batches: list[Any]) -> None:
        self.optimizer.param_groups[0]["lr"] = 0.05 / (1 + self.seen)
        super().train(model, micro_batches)


class RateBySteps(RateByMicroBatches):
    def after(self, micro_batches: list[Any]) -> None:
        self.seen += 1


class RunningCount(Kept):
    """Normalises by a running mean of the targets of micro-batches so far."""

    moves_each = True

    def model(self) -> nn.Module:
        self.mean = 40.0
        return super().model()

    def loss(self, model: nn.Module, micro: Any, micros: list[Any]) -> Tensor:
        return nll(model, micro) / self.mean

    def after(self, micro_batches: list[Any]) -> None:
        held = [[micro] for micro in micro_batches] if self.moves_each else [micro_batches]
        for each in held:
            self.mean = 0.9 * self.mean + 0.1 * targets(each)


class RunningCountOfSteps(RunningCount):
    moves_each = False


class MomentumEachTime(Kept):
    """After the update it damps the momentum, once for each micro-batch."""

    times: Any = len

    def model(self) -> nn.Module:
        network = super().model()
        self.optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
        return network

    def after(self, micro_batches: list[Any]) -> None:
        for state in self.optimizer.state.values():
            state["momentum_buffer"].mul_(0.9 ** len(micro_batches))


class MomentumOnce(MomentumEachTime):
    def after(self, micro_batches: list[Any]) -> None:
        for state in self.optimizer.state.values():
            state["momentum_buffer"].mul_(0.9)


class CopyEveryTwo(Kept):
    """Pulls to a copy of the model that follows after every second micro-batch, not step."""

    each_step = False

    def model(self) -> nn.Module:
        network = super().model()
        self.copy: Any = None
        return network

    def loss(self, model: nn.Module, micro: Any, micros: list[Any]) -> Tensor:
        if self.copy is None or (self.seen % 2 == 0 and not self.each_step):
            self.copy = model.head.weight.detach().clone()
        self.seen += 1
        near = (model.head.weight - self.copy).square().sum()
        return (nll(model, micro) + near * targets([micro])) / targets(micros)


class CopyOfTheFirst(CopyEveryTwo):
    each_step = True


class ClearsTheHead(Kept):
    """Two optimizers, of which one alone clears."""

    also = False

    def train(self, model: Tiny, micro_batches: list[Any]) -> None:
        head = torch.optim.SGD(model.head.parameters(), lr=0.1)
        rest = torch.optim.SGD([*model.embed.parameters(), *model.hidden.parameters()], lr=0.05)
        head.zero_grad()
        if self.also:
            rest.zero_grad()
        for micro in micro_batches:
            self.loss(model, micro, micro_batches).backward()
        head.step()
        rest.step()


class ClearsBoth(ClearsTheHead):
    also = True


def clears_when_cut(model: nn.Module, micros: list[Any]) -> None:
    """Clears between micro-batches' windows only where there are several."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for micro in micros:
        (nll(model, micro) / targets(micros)).backward()
    optimizer.step()
    if len(micros) > 1:
        optimizer.zero_grad()


def clears_nothing(model: nn.Module, micros: list[Any]) -> None:
    """What follows the step empties the gradients."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for micro in micros:
        (nll(model, micro) / targets(micros)).backward()
    optimizer.step()


class SchedulesEachTime(Trainer):
    def training_step(self, *args: Any, **options: Any) -> Tensor:
        loss = super().training_step(*args, **options)
        self.lr_scheduler.step()
        return loss


class Baseline(Trainer):
    """Weights the loss by a running mean of the losses of micro-batches so far."""

    running = 1.0

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        self.seen = [*getattr(self, "seen", []), super().training_step(*args, **options).detach()]
        return self.seen[-1]

    def compute_loss(self, *args: Any, **options: Any) -> Any:
        if len(getattr(self, "seen", [])) == self.args.gradient_accumulation_steps:
            for loss in self.seen:
                self.running = 0.5 * self.running + 0.5 * float(loss)
            self.seen = []
        return super().compute_loss(*args, **options) * self.running


def trainer(kind: type[Trainer]) -> Any:
    return lambda seed: factory(kind=kind, data=trainer_rows(seed), compute_loss_func=over_items)


def case(name: str, loop: Any, cause: str | None = None, axis: str = "next-step") -> Case:
    return Case(name, loop, cause, axis=axis, axes=AXES)


CASES = [
    case("optimizer that is kept", Kept),
    case("AdamW that is kept", Adam),
    case("rate by steps", RateBySteps),
    case("running count of steps", RunningCountOfSteps),
    case("momentum damped once", MomentumOnce),
    case("copy of the first step", CopyOfTheFirst),
    case("two optimizers, both cleared", ClearsBoth),
    case("nothing cleared", tokens(clears_nothing, train=clears_nothing)),
    case("rate by micro-batches", RateByMicroBatches, "state-per-micro-batch"),
    case("running count of micro-batches", RunningCount, "state-per-micro-batch"),
    case("momentum damped each time", MomentumEachTime, "state-per-micro-batch", "micro-batch"),
    case("copy every second micro-batch", CopyEveryTwo, "state-per-micro-batch"),
    case("two optimizers, one cleared", ClearsTheHead, "gradients-left-over"),
    case("cleared only if cut", tokens(clears_when_cut, train=clears_when_cut),
         "gradients-left-over"),
    case("trainer that steps its schedule", trainer(SchedulesEachTime), "state-per-micro-batch",
         "micro-batch"),
    case("trainer with a running baseline", trainer(Baseline), "state-per-micro-batch"),
]  # fmt: skip
